"""An objective whose damage is a formula, so that the best thresholds are known without a model."""

from collections.abc import Callable

import torch
from torch import Tensor

from modes_cli.calibration.scores import ScoreHistogram
from modes_cli.models.groups import DECODE, GROUPS, TEXT, VISION
from modes_cli.search.objective import Point
from modes_cli.search.problem import Candidate, Problem, Target
from modes_cli.search.staircase import Staircase
from modes_cli.skipping.policy import Policy, Rule

Damage = Callable[[float, float], float]  # from the shares of text and vision pairs that are skipped
TOKENS = (60, 120, 15, 0, 10)  # of each group


def scores(seed: int, layers: int = 3, tokens: tuple[int, ...] = TOKENS, top_k: int = 4) -> list[list[Tensor]]:
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
    scale[:, :3] = 0.1 + torch.rand(layers, 3, generator=torch.Generator().manual_seed(seed))
    return scale


class FakeObjective:
    """Measures like `Objective`: g as predicted plus `error`, f by `damage`; each new rule costs its share of a pass."""

    samples = 1000

    def __init__(self, staircase: Staircase, damage: Damage, error: Damage = lambda t, v: 0.0) -> None:
        self.staircase, self.damage, self.error = staircase, damage, error
        self.seen: dict[tuple[float, ...], Point] = {}
        self.passes = 0.0

    def part(self, share: float) -> float:
        return share

    def measure(self, rule: Rule, share: float = 1.0) -> Point:
        text, vision, decode = (float(rule.tau[group]) for group in (TEXT, VISION, DECODE))
        key = (text, vision, decode, share)
        if key not in self.seen:
            stairs = self.staircase
            parts = {"text": ((TEXT,), text), "vision": ((VISION,), vision), "decode": ((DECODE,), decode)}
            per_group = {name: stairs.skipped(*part) / max(stairs.pairs(part[0]), 1.0) for name, part in parts.items()}
            t, v = (
                stairs.skipped(groups, tau) / max(stairs.pairs(groups), 1.0)
                for groups, tau in ((stairs.text, text), (stairs.vision, vision))
            )
            skipped = sum(stairs.skipped(*part) for part in parts.values()) / stairs.total
            ratio = min(max(skipped + self.error(t, v), 0.0), 1.0)
            kl = float(self.damage(t, v))
            self.seen[key] = Point(rule, kl, kl, kl, ratio, per_group, [], share)
            self.passes += share
        return self.seen[key]


class NoPolicy(Policy):
    name = "none"

    def scale(self, measured: object) -> Tensor:
        raise NotImplementedError


class OneThreshold(NoPolicy):
    one_threshold = True


def problem(
    target: float,
    damage: Damage,
    *,
    error: Damage = lambda t, v: 0.0,
    one_threshold: bool = False,
    seed: int = 0,
    decode: float | None = None,
) -> tuple[Problem, FakeObjective]:
    counts, scale = counts_of(scores(seed, tokens=(600, 1200, 150, 0, 60))), random_scale(seed)
    kind = OneThreshold if one_threshold else NoPolicy
    candidate = Candidate(kind(), Rule(scale, torch.zeros(len(GROUPS))), counts)
    objective = FakeObjective(Staircase(counts, scale), damage, error)
    return Problem(candidate, Target(target, decode), objective), objective  # type: ignore[arg-type]
