"""What a calibration measured, as policies use it: importance by what was left out, token counts, and tensors by name."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from modes_cli.artifacts import Calibration
from modes_cli.errors import BadArtifact
from modes_cli.run_folder import RunFolder

ABSENT = "absent"  # metadata of calibration.safetensors: JSON, why a tensor is not there, by name


@dataclass(frozen=True)
class Measured:
    """A calibration and, where they are needed, its tensors.

    Attributes:
        run: where the tensors lie; None where there are no others than `tensors`.
        tensors: instead of the file's; for tests.
    """

    calibration: Calibration
    run: RunFolder | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        return self.calibration.moe_layers

    def alpha(self, column: str) -> Tensor:
        """(layers,) float64: importance as shares that sum to 1. Columns are those of `LayerImportance`."""
        return torch.tensor([getattr(row, column) for row in self.calibration.importance.values()], dtype=torch.float64)

    def damage(self, column: str) -> Tensor:
        """(layers,) float64: mean KL at answer tokens, nats, when `column` loses a layer's routed experts."""
        return self.alpha(f"kl_{column}")

    def tokens(self, group: str) -> int:
        """Tokens of a group in the calibration set."""
        return self.calibration.tokens.get(group, 0)

    @cached_property
    def path(self) -> Path:
        """Of calibration.safetensors. Raises BadArtifact if it is not what the calibration wrote."""
        assert self.run is not None
        return self.run.check_tensors(self.calibration.tensors, Calibration)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor of calibration.safetensors, as float64. A size of -1 stands for any.

        Raises:
            BadArtifact: it is not there, has another shape, or values that are not finite.
        """
        where = self.calibration.tensors.file
        try:
            if self.run is None or name in self.tensors:
                found = self.tensors[name]
            else:
                with safe_open(self.path, framework="pt") as file:
                    if name not in file.keys():  # noqa: SIM118
                        raise self._absent(name, file.metadata() or {})
                    found = file.get_tensor(name)
        except (OSError, SafetensorError, KeyError) as error:
            raise BadArtifact(where, f"tensor `{name}`", f"cannot be read: {error}") from error
        fits = len(shape) == found.dim() and all(n in (-1, size) for n, size in zip(shape, found.shape, strict=True))
        if not fits or not bool(torch.isfinite(found).all()):
            problem = f"is {tuple(found.shape)}, should be {shape}, all finite"
            raise BadArtifact(where, f"tensor `{name}`", problem)
        return found.double()

    def _absent(self, name: str, metadata: Mapping[str, str]) -> BadArtifact:
        """The calibration says what it could not measure, and why; one of an earlier version does not."""
        reason = json.loads(metadata.get(ABSENT, "{}")).get(name)
        hint = f"make it again: `modes calibrate {self.calibration.model.id} --fresh`"
        if reason is not None:
            hint = "take another policy"
        where = self.calibration.tensors.file
        return BadArtifact(where, f"tensor `{name}`", f"was not measured: {reason or 'by an earlier version'}", hint=hint)
