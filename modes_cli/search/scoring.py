"""What is counted in a pass over the calibration set, beside the damage: scores, and the experts that are needed."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from modes_cli.calibration.scores import ScoreHistogram
from modes_cli.skipping.policy import Rule
from modes_cli.skipping.routing import Routing


class Listener(Protocol):
    """Hears each layer's routing; its state is added up over processes."""

    def hear(self, routing: Routing) -> None: ...

    def state(self) -> dict[str, Tensor]:
        """What was heard by this process."""
        ...

    def take(self, everyone: Sequence[Mapping[str, Tensor]]) -> None:
        """What was heard by all processes, in their order."""
        ...


def common_scale(rule: Rule) -> Tensor:
    """(layers, groups): the score scale; of one per expert, the largest of each layer and group."""
    return rule.score_scale if rule.score_scale.dim() == 2 else rule.score_scale.amax(-1)


class Scores:
    """Histograms of a rule's score without its `common_scale`, as `Staircase` reads them.

    Args:
        rule: its thresholds do not matter.
        histogram: filled.
    """

    def __init__(self, rule: Rule, histogram: ScoreHistogram) -> None:
        self.histogram = histogram
        self._common = common_scale(rule)

    def hear(self, routing: Routing) -> None:
        assert routing.score is not None
        common = self._common[routing.layer].to(routing.pi.device)[routing.group.long()][:, None]
        relative = torch.where(common > 0, routing.score / common, torch.zeros_like(common))
        self.histogram.add(routing.layer, relative.clamp(0.0, 1.0), routing.group)

    def state(self) -> dict[str, Tensor]:
        return {"counts": self.histogram.counts}

    def take(self, everyone: Sequence[Mapping[str, Tensor]]) -> None:
        self.histogram.counts = torch.stack([one["counts"] for one in everyone]).sum(0)
