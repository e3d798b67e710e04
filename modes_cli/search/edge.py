"""The edge of the staircase for one problem, by position: 0 where vision skips most, 1 where text does."""

from collections.abc import Iterator

import numpy as np

from modes_cli.search.objective import Point
from modes_cli.search.problem import MARGIN, Problem


class Edge:
    """Measures places of the edge and says where to look next.

    The prediction does not see that skipping in early layers changes the routing in later ones; what was measured corrects it.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.points: dict[float, Point] = {}
        self.bias: dict[float, float] = {}  # measured minus predicted ratio, by position

    def measure(self, position: float, extra: float = 0.0, share: float = 1.0) -> Point:
        problem = self.problem
        stairs, target = problem.staircase, problem.target
        text, vision = self.taus(position, min(target.ratio + MARGIN + extra - self._bias(position), stairs.largest))
        point = problem.at(text, vision, share)
        self.bias[position] = point.skip_ratio - stairs.ratio(text, vision)
        if position not in self.points or target.met_by(point):
            self.points[position] = point
        return point

    def taus(self, position: float, aim: float) -> tuple[float, float]:
        stairs = self.problem.staircase
        if self.problem.one_threshold:
            tau = stairs.single_for(aim)
            return tau, tau
        low, high = stairs.text_range(aim)
        return stairs.pair_for(aim, low + position * (high - low))

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
        target, objective, extra = self.problem.target, self.problem.objective, 0.0
        while not (target.met_by(self.points[position]) and target.close_to(self.points[position])):
            if objective.passes + 1 > budget:
                return False
            short, spent = self.points[position].skip_ratio < target.ratio, objective.passes
            self.measure(position, extra)
            if objective.passes == spent:  # the same thresholds again: nothing new will come of it
                return False
            extra += 0.001 if short else 0.0
        return True
