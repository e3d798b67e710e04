"""What is asked of a layout: an MoE module whose experts are not called in the common form."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

Experts = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden [T, H], expert ids [T, k], weights [T, k]) -> [T, H]"""


@dataclass(frozen=True)
class Computed:
    """How a set's experts can be computed.

    Attributes:
        whole: every pair, with the bits of the unmodified module.
        pairs: any pairs, weights multiplied with what an expert returns; work is done for these pairs only.
    """

    whole: Experts
    pairs: Experts


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Returns what takes it back. Weights that are elsewhere until they are needed come with a `forward` of the instance."""
    own = module.__dict__.get("forward")
    module.forward = forward
    return partial(module.__dict__.pop, "forward", None) if own is None else partial(setattr, module, "forward", own)


class Engine(Protocol):
    """What a layout may use of the skipping engine."""

    def layout_experts(self, name: str, computed: Computed, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """What the set called `name` returns under the current rule, drop and watcher."""
        ...

    def only_rows(self, rows: Mapping[str, Tensor]) -> None:
        """Which tokens [T] bool each set of the MoE module sees in the call that follows; a set not named sees all."""
        ...


class Layout(Protocol):
    """One MoE module class.

    Attributes:
        sets: module path below the MoE module of each set of experts.
        arguments: how many tensors an experts' forward takes.
        transposed: whether weights are [E, H, 2I] and [E, I, H]; None: the experts' class says it.
        scales_input: a weight multiplies what goes into an expert, not what comes out, and is itself the score: with one
            expert for each token, renormalised weights would all be 1.
    """

    sets: tuple[str, ...]
    arguments: int
    transposed: bool | None
    scales_input: bool

    def install(self, moe: Any, names: tuple[str, ...], engine: Engine) -> Callable[[], None]:
        """Make the module ask the engine; returns what undoes that. `names`: of the sets, in the order of `sets`."""
        ...

    def pairs(self, experts: nn.Module) -> Experts | None:
        """As `Computed.pairs`, for modules whose own implementation cannot do it; None where that can."""
        ...
