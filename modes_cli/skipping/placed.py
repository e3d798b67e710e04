"""What skipping needs on a GPU, so that a forward neither waits for the device nor reads from it.

The operator routes, decides and counts there. Its thresholds, scales and counters stay at their place for as long as the
engine lives: a CUDA graph of a forward can be replayed, and follows a rule of the same kind that replaces the one it was
captured with as soon as a forward has run with that. Of one kind are rules with scales of the same shape and the same formula
in the place of pi, whatever is in the formula's tensors.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from modes_cli.errors import KernelError
from modes_cli.models.groups import GROUPS, TokenGroups, groups_by_id
from modes_cli.runtime.devices import refuse_while_capturing
from modes_cli.skipping.contribution import Pairs
from modes_cli.skipping.formula import Formula
from modes_cli.skipping.policy import Rule, scale_of
from modes_cli.skipping.statistics import PairCounts

_G = len(GROUPS)


class Kind(NamedTuple):
    """What a captured forward computes with."""

    scale: tuple[int, ...]
    formula: type[Formula] | None
    parameters: tuple[tuple[str, float], ...]
    tensors: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, rule: Rule) -> "Kind":
        if rule.contribution is None:
            return cls(tuple(rule.score_scale.shape), None, (), ())
        formula = rule.contribution
        assert isinstance(formula, Formula)
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in formula.tensors.items())
        return cls(tuple(rule.score_scale.shape), type(formula), tuple(sorted(formula.parameters.items())), shapes)


class Numbers:
    """The scales of one kind of rules and the tensors of their formula, on a device; rules replace each other in them."""

    def __init__(self, rule: Rule, device: torch.device) -> None:
        with torch.inference_mode(False):
            self._scale = _twice(rule.score_scale).to(device, copy=True)
            self._tensors = {name: part.to(device, copy=True) for name, part in _formula_tensors(rule).items()}
        self.scales = self._scale.unbind(0)  # by layer: (2 * groups,) or (2 * groups, experts)
        parts = {name: tensor.unbind(0) for name, tensor in self._tensors.items()}
        self.own = [{name: layers[layer] for name, layers in parts.items()} for layer in range(len(self._scale))]

    def take(self, rule: Rule) -> None:
        self._scale.copy_(_twice(rule.score_scale))
        for name, tensor in _formula_tensors(rule).items():
            self._tensors[name].copy_(tensor)


class Placed:
    """One device's part of an engine.

    Padding is skipped as its ids say, but not counted: it has groups of its own, `_G` higher, with the same thresholds.

    Attributes:
        tau: (2 * groups,) float32.
        keeps_all: whether the rule keeps every pair whatever the routing is; known without reading the device.
        group: (tokens,) int32, of the running forward.
    """

    def __init__(self, device: torch.device, layers: int, tokens: TokenGroups) -> None:
        refuse_while_capturing(device, "skipping is prepared for the first time")
        with torch.inference_mode(False):
            self.tau = torch.zeros(2 * _G, dtype=torch.float32, device=device)
            self._kept = torch.zeros(layers, 2 * _G, dtype=torch.int64, device=device)
            self._vision = torch.tensor(tokens.vision_ids, dtype=torch.int64, device=device)
            self._special = torch.tensor(tokens.special_ids, dtype=torch.int64, device=device)
            self._audio = torch.tensor(tokens.audio_ids, dtype=torch.int64, device=device)
            self._groups = torch.arange(_G, dtype=torch.int32, device=device)
            self._kepts = self._kept.unbind(0)
        self._rule: Rule | None = None
        self._kind: Kind | None = None
        self._numbers: dict[Kind, Numbers] = {}
        self.keeps_all = True
        self._device, self._forward = device, 0
        self.group = torch.zeros(0, dtype=torch.int32, device=device)
        self._ran: dict[int, tuple[int, bool]] = {}  # by layer: k, and whether the operator routed

    @property
    def known_ids(self) -> Tensor:
        """The ids that are not text."""
        return torch.cat([self._vision, self._special, self._audio])

    def groups_of(self, ids: Tensor) -> Tensor:
        """As `TokenGroups.of`, whose fresh id tensors wait for the device."""
        return groups_by_id(ids, self._vision, self._special, self._audio)

    def use(self, rule: Rule) -> None:
        """Take over a rule's thresholds, scales and tensors; nothing to do for the one that is in use."""
        if rule is self._rule:
            return
        refuse_while_capturing(self._device, "a rule is used for the first time")
        kind = Kind.of(rule)
        if kind in self._numbers:
            self._numbers[kind].take(rule)
        else:
            self._numbers[kind] = Numbers(rule, self._device)
        self.tau.copy_(rule.tau.repeat(2))
        self._rule, self._kind, self.keeps_all = rule, kind, rule.keeps_all

    def replace(self, rule: Rule) -> None:
        """As `use`, for forwards that were captured with the rule in use. Raises KernelError if they cannot follow."""
        if self._kind not in (None, Kind.of(rule)):
            raise KernelError(
                "a captured forward cannot follow a rule with other scales or another formula",
                hint="capture it again with that rule",
            )
        self.use(rule)

    def start(self, forward: int, group: Tensor, real: Tensor) -> None:
        """Take over the tokens of a forward; nothing to do for the one that is running."""
        if forward != self._forward:
            self._forward, self._ran = forward, {}
            group, real = group.to(self._device), real.to(self._device)
            self.group = torch.where(real, group, group + _G)

    def scale(self, layer: int) -> Tensor:
        """(2 * groups,) or (2 * groups, experts) float32."""
        return self._in_use[0].scales[layer]

    def score(self, pairs: Pairs) -> Tensor:
        """(tokens, k) float32: what a rule with a formula compares with tau. `pairs.group` as in `group`."""
        numbers, rule = self._in_use
        assert isinstance(rule.contribution, Formula)
        return scale_of(numbers.scales[pairs.layer], pairs) * rule.contribution.of(numbers.own[pairs.layer], pairs)

    @property
    def _in_use(self) -> tuple[Numbers, Rule]:
        assert self._kind is not None
        assert self._rule is not None
        return self._numbers[self._kind], self._rule

    def kept(self, layer: int) -> Tensor:
        """(2 * groups,) int64: where the operator leaves the kept pairs of each group."""
        return self._kepts[layer]

    def ran(self, layer: int, top_k: int, *, routed: bool) -> None:
        """Note that a layer was computed: `routed` by the operator, which counted in `kept`, or with all its pairs."""
        self._ran[layer] = top_k, routed

    def finish(self, forward: int, counts: PairCounts, phase: int) -> None:
        """Add the forward's pairs to `counts`, for all layers at once where they ran alike."""
        if forward != self._forward or not self._ran:
            return
        kept, total = counts.on(self._device)[:, phase].unbind(0)  # (layers, groups)
        tokens = (self.group[:, None] == self._groups).sum(0)  # (groups,)
        how = set(self._ran.values())
        alike = len(how) == 1 and len(self._ran) == len(self._kepts)
        for where, (top_k, routed) in [(slice(None), how.pop())] if alike else self._ran.items():
            pairs = tokens * top_k
            total[where] += pairs
            kept[where] += self._kept[where][..., :_G] if routed else pairs
        self._ran = {}


def placeable(rule: Rule) -> bool:
    """Whether a device can decide by a rule alone: not by one that asks for attention weights, or for foreign code."""
    contribution = rule.contribution
    return contribution is None or (isinstance(contribution, Formula) and not contribution.needs_attention)


def _twice(scale: Tensor) -> Tensor:
    """(layers, 2 * groups) or (layers, 2 * groups, experts): padding has the scales of what its ids say."""
    return torch.cat([scale, scale], 1)


def _formula_tensors(rule: Rule) -> Mapping[str, Tensor]:
    return rule.contribution.tensors if isinstance(rule.contribution, Formula) else {}


def cannot_capture(device: torch.device, label: str, reason: str) -> None:
    """Raise KernelError if skipping without the operator, which reads the device, is to be captured."""
    refuse_while_capturing(
        device, f"transformers computes the kept pairs of `{label}` ({reason}), which reads the device",
        hint="`SkipEngine.implementations` says why the operator does not",
    )  # fmt: skip
