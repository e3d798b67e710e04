"""What skipping needs on a GPU, so that a forward neither waits for the device nor reads from it.

The operator routes, decides and counts there. Its thresholds, scales and counters stay at their place for as long as the
engine lives: a CUDA graph of a forward can be replayed, and follows a rule that replaces the one it was captured with as
soon as a forward has run with that.
"""

import torch
from torch import Tensor

from modes_cli.models.groups import GROUPS, SPECIAL, VISION, TokenGroups
from modes_cli.runtime.devices import refuse_while_capturing
from modes_cli.skipping.policy import Rule
from modes_cli.skipping.statistics import PairCounts

_G = len(GROUPS)


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
            self._scale = torch.zeros(layers, 2 * _G, dtype=torch.float32, device=device)
            self._kept = torch.zeros(layers, 2 * _G, dtype=torch.int64, device=device)
            self._vision = torch.tensor(tokens.vision_ids, dtype=torch.int64, device=device)
            self._special = torch.tensor(tokens.special_ids, dtype=torch.int64, device=device)
            self._groups = torch.arange(_G, dtype=torch.int32, device=device)
            self._scales, self._kepts = self._scale.unbind(0), self._kept.unbind(0)
        self._rule: Rule | None = None
        self.keeps_all = True
        self._device, self._forward = device, 0
        self.group = torch.zeros(0, dtype=torch.int32, device=device)
        self._ran: dict[int, tuple[int, bool]] = {}  # by layer: k, and whether the operator routed

    @property
    def known_ids(self) -> Tensor:
        """The ids that are not text."""
        return torch.cat([self._vision, self._special])

    def groups_of(self, ids: Tensor) -> Tensor:
        """As `TokenGroups.of`, whose `torch.isin` and fresh id tensors wait for the device."""
        group = (ids[..., None] == self._special).any(-1).to(torch.int32) * SPECIAL
        return group.masked_fill_((ids[..., None] == self._vision).any(-1), VISION)

    def use(self, rule: Rule) -> None:
        """Take over a rule's thresholds and scales; nothing to do for the one that is in use."""
        if rule is self._rule:
            return
        refuse_while_capturing(self._device, "a rule is used for the first time")
        self.tau.copy_(rule.tau.repeat(2))
        self._scale.copy_(rule.score_scale.repeat(1, 2))
        self._rule, self.keeps_all = rule, rule.keeps_all

    def start(self, forward: int, group: Tensor, real: Tensor) -> None:
        """Take over the tokens of a forward; nothing to do for the one that is running."""
        if forward != self._forward:
            self._forward, self._ran = forward, {}
            group, real = group.to(self._device), real.to(self._device)
            self.group = torch.where(real, group, group + _G)

    def scale(self, layer: int) -> Tensor:
        """(2 * groups,) float32."""
        return self._scales[layer]

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


def cannot_capture(device: torch.device, label: str, reason: str) -> None:
    """Raise KernelError if skipping without the operator, which reads the device, is to be captured."""
    refuse_while_capturing(
        device, f"transformers computes the kept pairs of `{label}` ({reason}), which reads the device",
        hint="`SkipEngine.implementations` says why the operator does not",
    )  # fmt: skip
