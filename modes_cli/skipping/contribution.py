"""What a rule may look at, and what can stand in the place of pi."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """One layer's top-k pairs, as far as a rule may look at them.

    Attributes:
        layer: index among the MoE layers.
        pi: (tokens, k) float32.
        group: (tokens,) integer.
        experts: (tokens, k) integer; only rules that look at experts need it.
        hidden: (tokens, H), what the experts are given; only contributions that look at it need it.
        standing: (tokens,) float32, share of a sequence's tokens that receive more attention (`modes_cli.skipping.attention`);
            only for contributions with `needs_attention`.
    """

    layer: int
    pi: Tensor
    group: Tensor
    experts: Tensor | None = None
    hidden: Tensor | None = None
    standing: Tensor | None = None


class Contribution(ABC):
    """What stands in the place of pi: a pure function of a layer's pairs, with tensors of its own.

    All that it needs is in `Pairs` and in its own tensors, a copy of the router among them where it looks at logits: so it is
    the same function in PyTorch, in a graph and on a GPU, with weights that are offloaded too, and a bundle can carry it.

    Attributes:
        key: equal for two contributions that give equal values; for recognising rules that were measured already.
        needs_attention: whether it looks at `Pairs.standing`, for which the engine runs eager attention.
    """

    key: str
    needs_attention: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, pairs: Pairs) -> Tensor:
        """(tokens, k) float32, 0 or more; within 2^-24 and 1 it is predicted precisely how much thresholds skip."""
