"""Counting kept and skipped (token, expert) pairs, per MoE layer, token group and phase."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from modes_cli.models.groups import GROUPS

PHASES = ("prefill", "decode")


@dataclass
class PairCounts:
    """Counts of real tokens' pairs: (phases, layers, groups) int64. Padding is in neither."""

    layers: int
    kept: Tensor = field(init=False)
    total: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.kept = torch.zeros(len(PHASES), self.layers, len(GROUPS), dtype=torch.int64)
        self.total = torch.zeros_like(self.kept)

    def add(
        self, phase: int, layer: int, group: Tensor, kept_per_token: Tensor, top_k: int, real: Tensor | None = None
    ) -> None:
        """Add one layer's call: `group` (tokens,) and `kept_per_token` (tokens,); `real` (tokens,) is False at padding."""
        kept = kept_per_token.long()
        pairs = torch.stack([kept, torch.full_like(kept, top_k)])
        if real is not None:
            pairs *= real
        sums = torch.zeros(2, len(GROUPS), dtype=torch.int64, device=group.device).index_add_(1, group.long(), pairs).cpu()
        self.kept[phase, layer] += sums[0]
        self.total[phase, layer] += sums[1]

    def skip_ratio(self) -> float:
        """Skipped share of all top-k pairs, special tokens' included."""
        return _ratio(self.kept.sum(), self.total.sum())

    def per_group(self) -> dict[str, float]:
        """Skipped share within each group that can be skipped; groups without tokens are left out."""
        kept, total = self.kept.sum((0, 1)), self.total.sum((0, 1))
        return {name: _ratio(kept[i], total[i]) for i, name in enumerate(GROUPS[:-1]) if total[i] > 0}

    def per_layer(self) -> list[float]:
        kept, total = self.kept.sum((0, 2)), self.total.sum((0, 2))
        return [_ratio(k, t) for k, t in zip(kept, total, strict=True)]


def _ratio(kept: Tensor, total: Tensor) -> float:
    return float(1.0 - kept.double() / total.double()) if int(total) else 0.0
