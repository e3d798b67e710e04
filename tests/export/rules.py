"""Bundles of the tiny checkpoint with rules of every kind, and what they decide in both runtimes."""

import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from modes_cli import files
from modes_cli.artifacts import Calibration, Thresholds
from modes_cli.artifacts.base import TensorFile
from modes_cli.export import bundle as exporter
from modes_cli.export import export_bundle
from modes_cli.models.groups import GROUPS
from modes_cli.requests import ExportRequest
from modes_cli.run_folder import RunFolder
from tests.export.bundles import EXPERTS, MOE_LAYERS, TOP_K, make_run, shared_bundle, shared_checkpoint
from tests.once import once

HIDDEN = 64


@dataclass(frozen=True)
class Kind:
    """A rule: which policy, at which thresholds."""

    policy: str
    tau: dict[str, float]
    parameters: dict[str, float] = field(default_factory=dict)
    decode_target: float | None = None


# Thresholds that skip a part of every group.
KINDS = {
    "experts": Kind("norm", {"text": 0.1, "vision": 0.09, "decode": 0.07}, {"power": 0.25, "grouped": 1.0}, 0.5),
    "predicted": Kind("predicted", {"text": 0.02, "vision": 0.018}, {"power": 0.25}),
    "salient": Kind("salient", {"text": 0.005, "vision": 0.01}, {"power": 0.7}),
    "topp": Kind("topp", {"text": 0.55, "vision": 0.55}),
}


def measured_tensors() -> dict[str, Tensor]:
    """What calibrations of this checkpoint measure beyond importance, made up."""
    layers, generator = len(MOE_LAYERS), torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    ratio = random(layers, TOP_K).sort(1, descending=True).values
    ratio[:, 0] = 1.0
    low = -1 - random(layers)
    return {
        "slot_ratio": ratio,
        "expert_similarity": 2 * random(layers, EXPERTS, EXPERTS) - 1,
        "output_norm": 0.2 + random(layers, len(GROUPS), EXPERTS),
        "norm_predictor": 0.3 * (random(layers, EXPERTS, EXPERTS + 2) - 0.5),
        "norm_range": torch.stack([low, low + 2 + random(layers)], 1),
        "router": 0.3 * (random(layers, EXPERTS, HIDDEN) - 0.5),
        "router_bias": random(layers, EXPERTS) - 0.5,
        "saliency": 0.2 * (random(layers, len(GROUPS), HIDDEN + 1) - 0.5),
        "saliency_range": torch.tensor([-1.0, 1.0, 1.0]).expand(layers, len(GROUPS), 3).contiguous(),
    }


def make_kind(folder: Path, checkpoint: Path, kind: Kind) -> Path:
    """A run folder whose one result, for target 0.3, is of the given kind, beside the same without a decode target."""
    run = RunFolder(make_run(folder, checkpoint))
    save_file(measured_tensors(), folder / "calibration.safetensors")
    held = folder / "calibration.safetensors"
    calibration = run.read(Calibration)
    importance = {
        layer: row.model_copy(
            update={f"kl_{name}": getattr(row, name) for name in ("all", "text", "vision", "prompt", "decode")}
        )
        for layer, row in calibration.importance.items()
    }
    tensors = TensorFile(file=held.name, sha256=files.sha256(held), bytes=held.stat().st_size)
    tokens = {"text": 30, "vision": 90, "decode": 20}
    run.write(calibration.model_copy(update={"tensors": tensors, "importance": importance, "tokens": tokens}))
    thresholds = run.read(Thresholds)
    found = {"policy": kind.policy, "parameters": kind.parameters, "tau": kind.tau}
    result = thresholds.results[-1].model_copy(update=found)
    results = [result]
    if kind.decode_target is not None:
        without = {group: tau for group, tau in kind.tau.items() if group != "decode"}
        more = {"decode_target": kind.decode_target, "skip_ratio_per_group": {"decode": 0.6}}
        results = [result.model_copy(update={"tau": without}), result.model_copy(update=more)]
    digest = files.sha256(run.file(Calibration.FILE))
    run.write(thresholds.model_copy(update={"results": results, "calibration": digest}))
    return folder


@functools.cache
def shared_kind(base: Path, name: str) -> Path:
    """A bundle of a kind; copy it before changing anything. The graphs that rules have no part in are those of
    `shared_bundle`.
    """
    bundle, checkpoint, kind = shared_bundle(base), shared_checkpoint(base), KINDS[name]

    def make(folder: Path) -> None:
        run = make_kind(folder / "run", checkpoint, kind)
        with pytest.MonkeyPatch.context() as patch:
            for part in ("embedding", "vision"):
                patch.setattr(exporter, f"export_{part}", functools.partial(_stored, bundle / f"{part}.onnx"))
            patch.setattr(exporter, "_save", _saver(exporter._save))
            export_bundle(ExportRequest(run, decode_target=kind.decode_target))

    return once(base, f"tiny-{kind.policy}", make) / "run" / "bundle"


def _stored(path: Path, *_: object) -> Path:
    return path


def _saver(save: Callable[..., None]) -> Callable[..., None]:
    def stored_or_made(graph: object, path: Path, plan: object) -> None:
        if isinstance(graph, Path):
            shutil.copy(graph, path)
        else:
            save(graph, path, plan)

    return stored_or_made
