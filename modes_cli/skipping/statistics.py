"""Counting kept and skipped (token, expert) pairs, per MoE layer, token group and phase."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from modes_cli.models.groups import GROUPS
from modes_cli.runtime.devices import asynchronous, refuse_while_capturing

PHASES = ("prefill", "decode")


@dataclass
class PairCounts:
    """Counts of real tokens' pairs: (phases, layers, groups) int64. Padding is in neither.

    What is counted on a GPU stays there until `kept` or `total` is asked for.
    """

    layers: int
    _sums: Tensor = field(init=False, repr=False)  # (2, phases, layers, groups): kept and total
    _elsewhere: dict[torch.device, Tensor] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._sums = torch.zeros(2, len(PHASES), self.layers, len(GROUPS), dtype=torch.int64, device="cpu")
        for sums in self._elsewhere.values():
            sums.zero_()

    @property
    def kept(self) -> Tensor:
        return self._read()[0]

    @kept.setter
    def kept(self, value: Tensor) -> None:
        self._read()[0] = value

    @property
    def total(self) -> Tensor:
        return self._read()[1]

    @total.setter
    def total(self, value: Tensor) -> None:
        self._read()[1] = value

    def _read(self) -> Tensor:
        for sums in self._elsewhere.values():
            self._sums += sums.cpu()
            sums.zero_()
        return self._sums

    def on(self, device: torch.device) -> Tensor:
        """(2, phases, layers, groups): what was counted on a device since it was last read, to be added to there.

        Always the same memory, so that a CUDA graph may add to it.
        """
        if device not in self._elsewhere:
            refuse_while_capturing(device, "pairs are counted for the first time")
            with torch.inference_mode(False):
                self._elsewhere[device] = torch.zeros(self._sums.shape, dtype=torch.int64, device=device)
        return self._elsewhere[device]

    def add(
        self, phase: int, layer: int, group: Tensor, kept_per_token: Tensor, top_k: int, real: Tensor | None = None
    ) -> None:
        """Add one layer's call: `group` (tokens,) and `kept_per_token` (tokens,); `real` (tokens,) is False at padding."""
        kept = kept_per_token.long()
        pairs = torch.stack([kept, torch.full_like(kept, top_k)])
        if real is not None:
            pairs *= real
        sums = torch.zeros(2, len(GROUPS), dtype=torch.int64, device=group.device).index_add_(1, group.long(), pairs)
        counted = self.on(group.device) if asynchronous(group.device) else self._sums
        counted[:, phase, layer] += sums

    def skip_ratio(self) -> float:
        """Skipped share of all top-k pairs, special tokens' included."""
        return _ratio(self.kept.sum(), self.total.sum())

    def per_group(self) -> dict[str, float]:
        """Skipped share within each group that can be skipped; groups without tokens are left out."""
        kept, total = self.kept.sum((0, 1)), self.total.sum((0, 1))
        return {name: _ratio(kept[i], total[i]) for i, name in enumerate(GROUPS[:-1]) if total[i] > 0}

    def per_layer(self) -> list[dict[str, float]]:
        """Of each MoE layer: skipped share of all pairs (`all`), and within each group that can be skipped and has tokens."""
        kept, total = self.kept.sum(0), self.total.sum(0)
        return [
            {"all": _ratio(k.sum(), t.sum())} | {name: _ratio(k[i], t[i]) for i, name in enumerate(GROUPS[:-1]) if t[i] > 0}
            for k, t in zip(kept, total, strict=True)
        ]


def _ratio(kept: Tensor, total: Tensor) -> float:
    return float(1.0 - kept.double() / total.double()) if int(total) else 0.0
