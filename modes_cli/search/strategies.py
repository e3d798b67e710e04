"""Ways to look for the best thresholds. All answer with measured points; they differ in how many passes that takes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from modes_cli.models.groups import TEXT, VISION
from modes_cli.search.objective import Objective, Point
from modes_cli.search.staircase import Staircase
from modes_cli.skipping.policy import Rule

TOLERANCE = 0.01  # how far above its target a result may skip


@dataclass
class Problem:
    """One policy's rule (its tau is a placeholder), one target."""

    rule: Rule
    staircase: Staircase
    target: float
    one_threshold: bool
    objective: Objective
    start: tuple[float, ...] = (0.3, 0.15, 0.5, 0.75)  # places of the edge that are measured first
    measured: list[Point] = field(default_factory=list)

    def at(self, text: float, vision: float, share: float = 1.0) -> Point:
        point = self.objective.measure(self.rule.with_tau({"text": text, "vision": vision}), share)
        if share == 1.0:
            self.measured.append(point)
        return point

    def feasible(self) -> list[Point]:
        return [point for point in self.measured if point.skip_ratio >= self.target]

    def best(self) -> Point | None:
        """The least damage among measured points that reach the target; fewer skipped pairs where damage is equal.

        Points that skip much more than was asked for count only where no other reaches the target.
        """
        feasible = self.feasible()
        close = [point for point in feasible if point.skip_ratio <= self.target + TOLERANCE]
        return min(close or feasible, key=lambda p: (p.kl, p.skip_ratio, p.tau), default=None)


def exhaustive(problem: Problem, grid: int, passes: int) -> None:
    """Every pair of grid thresholds."""
    text, vision = _grids(problem, grid)
    for t in text:
        for v in text if problem.one_threshold else vision:
            if not problem.one_threshold or t == v:
                problem.at(t, v)


def two_pointer(problem: Problem, grid: int, passes: int) -> None:
    """The paper's walk along the staircase: at most 2 * grid measured pairs (MoDES, algorithm 1).

    From the smallest text threshold and the largest vision one: while the target is met, lower the vision threshold;
    when it is not, raise the text one.
    """
    text, vision = _grids(problem, grid)
    if problem.one_threshold:
        for t in text:
            if problem.at(t, t).skip_ratio >= problem.target:
                return
        return
    i, j = 0, len(vision) - 1
    while i < len(text) and j >= 0:
        if problem.at(text[i], vision[j]).skip_ratio >= problem.target:
            j -= 1
        else:
            i += 1


def _grids(problem: Problem, grid: int) -> tuple[list[float], list[float]]:
    """Thresholds at evenly spaced quantiles of each modality's scores, from skipping nothing to skipping all.

    The authors' fixed grid fits the scores of their models; quantiles fit any.
    """
    shares = np.linspace(0.0, 1.0, grid)
    text = [problem.staircase.tau_for(TEXT, share) for share in shares]
    return text, [problem.staircase.tau_for(VISION, share) for share in shares]


def frontier(problem: Problem, grid: int, passes: int) -> None:
    """Ours: the staircase's edge is known from the scores, so only f along it is measured.

    One number, the share of text pairs skipped, walks the edge. A coarse scan brackets the minimum of log f, which is close
    to unimodal there, and a bracketing search with parabolic steps closes in. Measured ratios correct the prediction as
    the search goes on; `passes` bounds the whole.
    """
    edge = _Edge(problem)
    budget = problem.objective.passes + passes
    for position in (0.5,) if problem.one_threshold else problem.start:
        if problem.objective.passes + 1 <= budget:
            edge.measure(position)
    if not problem.one_threshold:
        while problem.objective.passes + 3 <= budget:
            if (place := edge.next_position()) is None:
                break
            edge.measure(place)
    for position in edge.by_damage():
        if edge.settle(position, budget):
            return


class _Edge:
    """The edge of the staircase for one problem, by position: 0 where vision skips most, 1 where text does."""

    MARGIN = 0.0005  # aimed above the target, so that a small error of the prediction does not miss it

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.low, self.high = problem.staircase.text_range(problem.target)
        self.points: dict[float, Point] = {}
        self.bias: dict[float, float] = {}  # measured minus predicted ratio, by position

    def measure(self, position: float, extra: float = 0.0) -> Point:
        problem = self.problem
        aim = min(problem.target + self.MARGIN + extra - self._bias(position), problem.staircase.largest)
        text, vision = self.taus(position, aim)
        point = problem.at(text, vision)
        self.bias[position] = point.skip_ratio - problem.staircase.ratio(text, vision)
        if position not in self.points or point.skip_ratio >= problem.target:
            self.points[position] = point
        return point

    def taus(self, position: float, aim: float) -> tuple[float, float]:
        if self.problem.one_threshold:
            tau = self.problem.staircase.single_for(aim)
            return tau, tau
        low, high = self.problem.staircase.text_range(aim)
        return self.problem.staircase.pair_for(aim, low + position * (high - low))

    def _bias(self, position: float) -> float:
        if not self.bias:
            return 0.0
        known = sorted(self.bias)
        return float(np.interp(position, known, [self.bias[p] for p in known]))

    def _damage(self, position: float) -> float:
        return float(np.log(max(self.points[position].kl, 1e-12)))

    def by_damage(self) -> Iterator[float]:
        yield from sorted(self.points, key=lambda p: (self._damage(p), p))

    def next_position(self) -> float | None:
        """Where to look next: a parabola's minimum inside the bracket, or the middle of its longer half."""
        known = sorted(self.points)
        best = min(known, key=self._damage)
        at = known.index(best)
        if (at == 0 and best > 0.0) or (at + 1 == len(known) and best < 1.0):
            return float(at > 0)  # the end of the edge itself
        left = known[at - 1] if at > 0 else best
        right = known[at + 1] if at + 1 < len(known) else best
        if max(best - left, right - best) < 0.01:
            return None
        guess = self._parabola(left, best, right) if at > 0 and at + 1 < len(known) else None
        least = 0.15 * min(best - left or 1.0, right - best or 1.0)
        if guess is None or abs(guess - best) < least or min(guess - left, right - guess) < least:
            guess = (best + right) / 2 if right - best >= best - left else (best + left) / 2
        return None if guess in self.points else guess

    def _parabola(self, a: float, b: float, c: float) -> float | None:
        fa, fb, fc = self._damage(a), self._damage(b), self._damage(c)
        below = (b - a) * (fb - fc) - (b - c) * (fb - fa)
        if below == 0:
            return None
        return b - 0.5 * ((b - a) ** 2 * (fb - fc) - (b - c) ** 2 * (fb - fa)) / below

    def settle(self, position: float, budget: float) -> bool:
        """Make the point at a position reach its target, and not by more than the tolerance."""
        target, extra = self.problem.target, 0.0
        while not target <= self.points[position].skip_ratio <= target + TOLERANCE:
            if self.problem.objective.passes + 1 > budget:
                return False
            short, spent = self.points[position].skip_ratio < target, self.problem.objective.passes
            self.measure(position, extra)
            if self.problem.objective.passes == spent:  # the same thresholds again: nothing new will come of it
                return False
            extra += 0.001 if short else 0.0
        return True


def edge_point(problem: Problem, position: float, share: float) -> Point:
    """Measure one place of the predicted edge on a part of the calibration set."""
    edge = _Edge(problem)
    return problem.at(*edge.taus(position, problem.target + edge.MARGIN), share)


STRATEGIES: dict[str, Callable[[Problem, int, int], None]] = {
    "frontier": frontier,
    "two-pointer": two_pointer,
    "exhaustive": exhaustive,
}
