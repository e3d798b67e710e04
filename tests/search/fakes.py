"""An objective whose damage is a formula, so that the best thresholds are known without a model."""

from collections.abc import Callable

import torch
from torch import Tensor

from modes_cli.calibration.scores import ScoreHistogram
from modes_cli.models.groups import GROUPS, TEXT, VISION
from modes_cli.search.objective import Point
from modes_cli.search.staircase import Staircase
from modes_cli.search.strategies import Problem
from modes_cli.skipping.policy import Rule

Damage = Callable[[float, float], float]  # from the shares of text and vision pairs that are skipped


def scores(seed: int, layers: int = 3, tokens: tuple[int, int, int] = (60, 120, 10), top_k: int = 4) -> list[list[Tensor]]:
    """Random pi, [layer][group] of (tokens, k)."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(n, top_k, generator=generator).mul(1.5).softmax(-1) for n in tokens] for _ in range(layers)]


def counts_of(pi: list[list[Tensor]]) -> Tensor:
    histogram = ScoreHistogram(len(pi))
    for layer, groups in enumerate(pi):
        for group, values in enumerate(groups):
            histogram.add(layer, values, torch.full((len(values),), group))
    return histogram.counts


def random_scale(seed: int, layers: int = 3) -> Tensor:
    scale = torch.ones(layers, len(GROUPS))
    scale[:, :2] = 0.1 + torch.rand(layers, 2, generator=torch.Generator().manual_seed(seed))
    return scale


class FakeObjective:
    """Measures like `Objective`: g as predicted plus `error`, f by `damage`; each new rule costs its share of a pass."""

    def __init__(self, staircase: Staircase, damage: Damage, error: Damage = lambda t, v: 0.0) -> None:
        self.staircase, self.damage, self.error = staircase, damage, error
        self.seen: dict[tuple[float, float, float], Point] = {}
        self.passes = 0.0

    def measure(self, rule: Rule, share: float = 1.0) -> Point:
        text, vision = float(rule.tau[TEXT]), float(rule.tau[VISION])
        if (text, vision, share) not in self.seen:
            pairs = self.staircase.pairs
            t, v = (
                self.staircase.skipped(group, tau) / max(pairs[group], 1.0) for group, tau in ((TEXT, text), (VISION, vision))
            )
            ratio = min(max(self.staircase.ratio(text, vision) + self.error(t, v), 0.0), 1.0)
            self.seen[text, vision, share] = Point(rule, float(self.damage(t, v)), ratio, {"text": t, "vision": v}, [], share)
            self.passes += share
        return self.seen[text, vision, share]


def problem(
    target: float, damage: Damage, *, error: Damage = lambda t, v: 0.0, one_threshold: bool = False, seed: int = 0
) -> tuple[Problem, FakeObjective]:
    scale = random_scale(seed)
    staircase = Staircase(counts_of(scores(seed, tokens=(600, 1200, 60))), scale)
    objective = FakeObjective(staircase, damage, error)
    return Problem(Rule(scale, torch.zeros(len(GROUPS))), staircase, target, one_threshold, objective), objective  # type: ignore[arg-type]
