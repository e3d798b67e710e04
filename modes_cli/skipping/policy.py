"""What a policy is: a rule that says which of a token's top-k experts are computed.

Every policy is one rule with other scales or another contribution in the place of pi (MoDES, arXiv:2511.15690, eq. 3 and 5,
has pi and one scale per layer):

    pi   = w / sum(w)                                    the routing weight, renormalised over the top-k
    keep <=> score_scale[layer, group(, expert)] * contribution >= tau[group]

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
from modes_cli.models.groups import DECODE, GROUPS, SKIPPABLE, SPECIAL, TEXT, VISION
from modes_cli.skipping.contribution import Contribution, Pairs

if TYPE_CHECKING:  # kernels are measured and checked on machines that have PyTorch, and not what reads artifacts
    from modes_cli.skipping.formula import Formula
    from modes_cli.skipping.measured import Measured


@dataclass(frozen=True)
class Rule:
    """A policy ready to run.

    Attributes:
        score_scale: (layers, groups) or (layers, groups, experts) float32, layers counted among the MoE layers.
        tau: (groups,) float32.
        contribution: None for pi.
    """

    score_scale: Tensor
    tau: Tensor
    contribution: Contribution | None = None

    def keep(
        self, pi: Tensor, layer: int, group: Tensor, experts: Tensor | None = None, hidden: Tensor | None = None
    ) -> Tensor:
        """Which top-k slots survive: (tokens, k) bool. Arguments as in `Pairs`."""
        return self.reaches(self.score(Pairs(layer, pi, group, experts, hidden)), group)

    def reaches(self, score: Tensor, group: Tensor) -> Tensor:
        """(tokens, k) bool: whether a score (tokens, k) reaches the threshold of its token's group (tokens,).

        NaN does, as in the kernels: a broken token must not become one whose experts are all skipped.
        """
        return ~(score < self.tau.to(score.device).index_select(0, group.long())[:, None])

    def score(self, pairs: Pairs) -> Tensor:
        """(tokens, k) float32: what is compared with tau."""
        base = pairs.pi if self.contribution is None else self.contribution(pairs)
        return self.scale(pairs) * base

    def scale(self, pairs: Pairs) -> Tensor:
        """(tokens, 1) or (tokens, k) float32: the part of `score` that does not depend on the token."""
        return scale_of(self.score_scale[pairs.layer].to(pairs.pi.device), pairs)

    @property
    def keeps_all(self) -> bool:
        return bool((self.tau <= 0).all())

    @property
    def key(self) -> tuple[bytes, bytes, str]:
        """Equal for rules that decide alike."""
        contribution = "" if self.contribution is None else self.contribution.key
        return self.score_scale.cpu().numpy().tobytes(), self.tau.cpu().numpy().tobytes(), contribution

    def with_tau(self, tau: Mapping[str, float]) -> "Rule":
        return replace(self, tau=tau_vector(tau))


def scale_of(own: Tensor, pairs: Pairs) -> Tensor:
    """(tokens, 1) or (tokens, k): each pair's scale, from those of its layer, (groups,) or (groups, experts)."""
    scale = own.index_select(0, pairs.group.long())
    if scale.dim() == 1:
        return scale[:, None]
    assert pairs.experts is not None, "this rule has a scale per expert"
    return scale.gather(1, pairs.experts.long())


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
    """(groups,) float32 from thresholds by name. `decode` has that of `text` unless it is named; other groups that are not
    named are never skipped.
    """
    unknown = set(tau) - set(GROUPS)
    if unknown or tau.get("special", 0.0) != 0.0:
        raise BadOption(
            f"tau has no group `{', '.join(sorted(unknown)) or 'special'}`", hint=f"groups are {', '.join(SKIPPABLE)}"
        )
    for name, value in tau.items():
        if not value >= 0:
            raise BadOption(f"tau of `{name}` is `{value}`", hint="a threshold is 0 or more; `inf` skips everything")
    defaults = {"decode": tau.get("text", 0.0)}
    return torch.tensor([tau.get(name, defaults.get(name, 0.0)) for name in GROUPS], dtype=torch.float32)


class Policy(ABC):
    """A family of rules.

    Attributes:
        one_threshold: all groups share tau, as in rules that know no modality.
        variants: the parameters that a search tries, the most promising first.
        automatic: its place in the order in which `--policy auto` tries policies; 0: it does not.
        formula: what stands in the place of pi, made of `tensors` and the parameters; None: pi itself.
        obstacle: why a graph cannot have it; empty where it can.
    """

    name: ClassVar[str]
    one_threshold: ClassVar[bool] = False
    variants: ClassVar[tuple[dict[str, float], ...]] = ({},)
    automatic: ClassVar[int] = 0
    formula: ClassVar["type[Formula] | None"] = None
    obstacle: ClassVar[str] = ""

    def __init__(self, **parameters: float) -> None:
        self.parameters = parameters

    @property
    def exportable(self) -> bool:
        """Whether a graph can have it: as a score scale, or as the operator's `score`."""
        return not self.obstacle

    @abstractmethod
    def scale(self, measured: "Measured") -> Tensor:
        """(layers, groups) float64, or (layers, groups, experts): the score scale. Special tokens' has no effect."""

    def tensors(self, measured: "Measured") -> dict[str, Tensor]:
        """What `formula` needs, (layers, ...) each."""
        return {}

    def contribution(self, measured: "Measured") -> Contribution | None:
        """What stands in the place of pi, if anything does."""
        return None if self.formula is None else self.formula(self.tensors(measured), self.parameters)

    def rule(self, measured: "Measured", tau: Mapping[str, float]) -> Rule:
        """The rule for a calibrated model at the given thresholds.

        Raises:
            BadArtifact: the calibration lacks what this policy needs.
        """
        return Rule(self.scale(measured).float().contiguous(), tau_vector(tau), self.contribution(measured))


def by_modality(text: Tensor, vision: Tensor) -> Tensor:
    """(layers, groups) from a scale of text tokens, decode's among them, and one of vision tokens, (layers,) each."""
    scale = torch.ones(len(text), len(GROUPS), dtype=torch.float64)
    scale[:, TEXT] = scale[:, DECODE] = text
    scale[:, VISION] = vision
    scale[:, SPECIAL] = 1.0
    return scale


def tempered(alpha: Tensor, power: float) -> Tensor:
    """alpha ** power; all 1 for power 0, also where a layer does not matter at all. Same shape, float64."""
    if power == 0:
        return torch.ones_like(alpha)
    return torch.where(alpha > 0, alpha.clamp_min(1e-300) ** power, torch.zeros_like(alpha))


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
