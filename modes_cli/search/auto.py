"""Which of several candidates: successive halving over samples, places of the edge and candidates.

Every policy's first candidate is tried at one place of its edge on a part of the samples, then the other parameters of the best
policies; the best go on to more places on all samples, the best of those to a whole search, and the paper's rule with them. KL
decides that was measured on every other sample; on the other half it is only reported. So the answer is never worse than the
paper's rule on the samples that decide, where the budget is enough for two whole searches (20 passes).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from modes_cli.search.candidates import PAPER
from modes_cli.search.edge import Edge
from modes_cli.search.objective import Objective, Point
from modes_cli.search.problem import TOLERANCE, Candidate, Problem, Target

Strategy = Callable[[Problem, int, int], None]

LEAST_SAMPLES = 96  # of the first round; on fewer, the best candidate often was another
LEAST_SHARE = 0.25
SURVIVORS, FINALISTS = 4, 2
FIRST, MORE = 0.3, (0.1, 0.6)  # places of the edge
TRYING = 0.4  # of the passes, for the first round
WHOLE = 5  # fewest passes that a whole search is worth


@dataclass(frozen=True)
class Choice:
    """The winner with its best point (None: nothing reaches the target), all points of whole passes, and every candidate's
    best point, the winner first.
    """

    winner: Candidate
    best: Point | None
    measured: list[Point]
    tried: list[tuple[Candidate, Point]]


@dataclass
class _Trial:
    candidate: Candidate
    problem: Problem
    edge: Edge

    def best(self) -> Point | None:
        """On the target or close to it; one that skips too little looks better than it is."""
        target, points = self.problem.target.ratio, [*self.edge.points.values(), *self.problem.measured]
        close = [point for point in points if target - TOLERANCE / 2 <= point.skip_ratio <= target + 2 * TOLERANCE]
        return min(close, key=lambda point: (point.kl_selection, point.kl), default=None)

    def rank(self) -> tuple[bool, float, float]:
        best = self.best()
        return (True, math.inf, math.inf) if best is None else (False, best.kl_selection, best.kl)


def choose(
    options: list[Candidate], objective: Objective, target: Target, strategy: Strategy, grid: int, passes: int
) -> Choice:
    """Search with at most `passes` passes over the calibration set."""
    trials = [_Trial(option, problem, Edge(problem)) for option in options for problem in [Problem(option, target, objective)]]
    budget = objective.passes + passes
    finalists = trials if len(trials) == 1 else _finalists(trials, objective, passes)
    for left, trial in zip(range(len(finalists), 0, -1), finalists, strict=True):
        if trial.edge.points:
            trial.problem.start = _around(trial.edge)
        strategy(trial.problem, grid, math.floor((budget - objective.passes) / left))
    ended = [(trial, best) for trial in finalists if (best := trial.problem.best()) is not None]
    if not ended:
        return Choice(finalists[0].candidate, None, [point for trial in trials for point in trial.problem.measured], [])
    winner, best = min(ended, key=lambda one: (not target.close_to(one[1]), one[1].kl_selection, one[1].kl))
    others = [(trial, trial.best()) for trial in trials if trial is not winner]
    tried = [(trial.candidate, point) for trial, point in others if point is not None]
    tried.sort(key=lambda one: (one[1].kl_selection, one[1].kl))
    return Choice(winner.candidate, best, winner.problem.measured, [(winner.candidate, best), *tried])


def _finalists(trials: list[_Trial], objective: Objective, passes: int) -> list[_Trial]:
    """Those that a whole search is spent on. Half of the passes go into finding them, at most."""
    paper = [trial for trial in trials if trial.candidate.policy.name == PAPER]
    share = min(1.0, max(LEAST_SHARE, LEAST_SAMPLES / objective.samples))
    affordable = math.floor(TRYING * passes / objective.part(share))
    if affordable < 2:
        return trials[:1]
    best: list[_Trial] = []
    for trial in _in_turn(trials, best):
        if len(best) == affordable:
            break
        trial.edge.measure(0.5 if trial.problem.one_threshold else FIRST, share=share)
        best.append(trial)
    best.sort(key=_Trial.rank)
    survivors = best[: max(FINALISTS, min(SURVIVORS, math.floor(0.2 * passes / len(MORE))))]
    if 0.2 * passes >= len(MORE) * len(survivors):
        for trial in survivors:
            for place in () if trial.problem.one_threshold else MORE:
                trial.edge.measure(place)
    final = sorted(survivors, key=_Trial.rank)[:FINALISTS]
    if paper and not any(trial in paper for trial in final):
        final.append(min(paper, key=_Trial.rank))
    most = max(1, math.floor(0.5 * passes / WHOLE))
    return final if len(final) <= most else _fewer(final, paper, most)


def _in_turn(trials: list[_Trial], tried: list[_Trial]) -> Iterator[_Trial]:
    """Each policy's first, then all others of the policy that was best among those, of the next, and so on."""
    of: dict[str, list[_Trial]] = {}
    for trial in trials:
        of.setdefault(trial.candidate.policy.name, []).append(trial)
    yield from (every[0] for every in of.values())
    for first in sorted(tried, key=_Trial.rank):
        yield from of[first.candidate.policy.name][1:]


def _fewer(final: list[_Trial], paper: list[_Trial], most: int) -> list[_Trial]:
    """So few that each gets a search worth the name; with one only, the best one that the trials showed."""
    if most == 1 or not paper:
        return final[:most]
    return [*[trial for trial in final if trial not in paper][: most - 1], next(trial for trial in final if trial in paper)]


def _around(edge: Edge) -> tuple[float, ...]:
    """Where a whole search begins: around the place that was best."""
    near = next(edge.by_damage())
    return tuple(dict.fromkeys(min(1.0, max(0.0, round(near + step, 6))) for step in (0.0, -0.15, 0.15)))
