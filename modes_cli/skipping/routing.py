"""What one layer's routers chose, for whoever watches, and what is left out of it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from modes_cli.models.blocks import MoEBlock
from modes_cli.skipping.contribution import Pairs
from modes_cli.skipping.operator import Base


@dataclass(frozen=True)
class Drop:
    """Which routed experts contribute nothing, for measuring importance: a layer's, for all tokens or for some groups."""

    layer: int  # among the MoE layers
    groups: tuple[int, ...] | None = None

    def lost(self, group: Tensor) -> Tensor:
        """(tokens,) bool: whose routed experts contribute nothing; `group` (tokens,)."""
        if self.groups is None:
            return torch.ones_like(group, dtype=torch.bool)
        return torch.stack([group == lost for lost in self.groups]).any(0)


@dataclass(frozen=True)
class Routing:
    """One layer's routing in one forward, of real tokens only.

    Attributes:
        pi: (tokens, k) float32.
        experts: (tokens, k).
        group: (tokens,) int32.
        hidden: (tokens, H), what the experts are given.
        compute: (rows [n, H], experts [n, 1], weights [n, 1]) -> [n, H], the block's own implementation.
        block: whose layer it is.
        score: (tokens, k) float32, what the rule in force compares with its threshold; None without one.
        keep: (tokens, k) bool, what that rule keeps.
    """

    layer: int
    pi: Tensor
    experts: Tensor
    group: Tensor
    hidden: Tensor
    compute: Base
    block: MoEBlock
    score: Tensor | None = None
    keep: Tensor | None = None

    @classmethod
    def real(
        cls, pairs: Pairs, real: Tensor, compute: Base, block: MoEBlock, score: Tensor | None, keep: Tensor | None
    ) -> "Routing":
        """Without padding; `real` is (tokens,) bool."""
        assert pairs.experts is not None
        assert pairs.hidden is not None
        chosen, kept = (None if whole is None else whole[real] for whole in (score, keep))
        pi, experts, group, hidden = (part[real] for part in (pairs.pi, pairs.experts, pairs.group, pairs.hidden))
        return cls(pairs.layer, pi, experts, group, hidden, compute, block, chosen, kept)


# routing, which tokens are real (tokens,) bool, the experts' outputs [tokens, H] -> what takes their place
Trace = Callable[[Routing, Tensor, Callable[[], Tensor]], Tensor]
