"""What a policy is: a rule that says which of a token's top-k experts are computed.

All threshold policies are one rule with different scales (MoDES, arXiv:2511.15690, eq. 3 and 5):

    pi   = w / sum(w)                                    the routing weight, renormalised over the top-k
    keep <=> score_scale[layer, group] * pi >= tau[group]

so one kernel serves them all. Kept weights are not renormalised; a token may lose all its experts; `special` tokens have
tau = 0 and lose none.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, TypeVar

import torch
from torch import Tensor

from modes_cli.errors import BadOption
from modes_cli.models.groups import GROUPS, SPECIAL

if TYPE_CHECKING:  # kernels are measured and checked on machines that have PyTorch, and not what reads artifacts
    from modes_cli.artifacts import Calibration


@dataclass(frozen=True)
class Rule:
    """A policy ready to run.

    Attributes:
        score_scale: (layers, groups) float32, layers counted among the MoE layers.
        tau: (groups,) float32.
    """

    score_scale: Tensor
    tau: Tensor

    def keep(self, pi: Tensor, layer: int, group: Tensor) -> Tensor:
        """Which top-k slots survive.

        Args:
            pi: (tokens, k) float32.
            layer: index among the MoE layers.
            group: (tokens,) integer.

        Returns:
            (tokens, k) bool.
        """
        group = group.long()
        scale, tau = self.score_scale[layer].to(pi.device), self.tau.to(pi.device)
        return scale.index_select(0, group)[:, None] * pi >= tau.index_select(0, group)[:, None]

    @property
    def keeps_all(self) -> bool:
        return bool((self.tau <= 0).all())

    def with_tau(self, tau: Mapping[str, float]) -> "Rule":
        return replace(self, tau=tau_vector(tau))


def routing_probability(weights: Tensor) -> Tensor:
    """pi = w / sum(w), float32, the sum taken slot by slot.

    The order of the sum is part of the contract: the C kernels add in the same order, so a pair on the threshold is
    decided the same way everywhere. A factor that a model multiplies its weights with cancels out.
    """
    w = weights.float()
    first, *others = w.unbind(1)
    total = first.clone()
    for slot in others:
        total += slot
    return w / total[:, None]


def tau_vector(tau: Mapping[str, float]) -> Tensor:
    """(groups,) float32 from thresholds by name; groups that are not named are never skipped."""
    unknown = set(tau) - set(GROUPS)
    if unknown or tau.get("special", 0.0) != 0.0:
        raise BadOption(f"tau has no group `{', '.join(sorted(unknown)) or 'special'}`", hint="groups are text and vision")
    for name, value in tau.items():
        if not value >= 0:
            raise BadOption(f"tau of `{name}` is `{value}`", hint="a threshold is 0 or more; `inf` skips everything")
    return torch.tensor([tau.get(name, 0.0) for name in GROUPS], dtype=torch.float32)


class Policy(ABC):
    """A family of rules. `one_threshold`: text and vision share tau, as in rules that know no modality."""

    name: ClassVar[str]
    one_threshold: ClassVar[bool] = False

    def __init__(self, **parameters: float) -> None:
        self.parameters = parameters

    @abstractmethod
    def scale(self, importance: Tensor) -> Tensor:
        """(layers, 3) importance, columns all, text, vision -> (layers, 2) score scale for text and vision tokens."""

    def rule(self, calibration: "Calibration", tau: Mapping[str, float]) -> Rule:
        """The rule for a calibrated model at the given thresholds."""
        text_and_vision = self.scale(importance_matrix(calibration))
        scale = torch.ones(calibration.moe_layers, len(GROUPS), dtype=torch.float64)
        scale[:, :SPECIAL] = text_and_vision
        return Rule(scale.float(), tau_vector(tau))


def importance_matrix(calibration: "Calibration") -> Tensor:
    """(layers, 3) float64: alpha over all tokens, text tokens only, vision tokens only."""
    rows = [[layer.all, layer.text, layer.vision] for layer in calibration.importance.values()]
    return torch.tensor(rows, dtype=torch.float64)


# By name; `modes_cli.skipping.registry` reads it once every policy has put itself in.
REGISTRY: dict[str, type[Policy]] = {}
P = TypeVar("P", bound=type[Policy])


def register(name: str) -> Callable[[P], P]:
    """Make a policy available under a name on the command line."""

    def add(cls: P) -> P:
        cls.name = name
        REGISTRY[name] = cls
        return cls

    return add
