"""Ways to look for the best thresholds. All answer with measured points; they differ in how many passes that takes."""

from collections.abc import Callable

import numpy as np

from modes_cli.search.edge import Edge
from modes_cli.search.problem import Problem


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
            if problem.target.met_by(problem.at(t, t)):
                return
        return
    i, j = 0, len(vision) - 1
    while i < len(text) and j >= 0:
        if problem.target.met_by(problem.at(text[i], vision[j])):
            j -= 1
        else:
            i += 1


def _grids(problem: Problem, grid: int) -> tuple[list[float], list[float]]:
    """Thresholds at evenly spaced quantiles of each modality's scores, from skipping nothing to skipping all.

    The authors' fixed grid fits the scores of their models; quantiles fit any.
    """
    stairs, shares = problem.staircase, np.linspace(0.0, 1.0, grid)
    text, vision = ([stairs.tau_for(groups, share) for share in shares] for groups in (stairs.text, stairs.vision))
    return text, vision


def frontier(problem: Problem, grid: int, passes: int) -> None:
    """Ours: the staircase's edge is known from the scores, so only f along it is measured.

    One number, the share of text pairs skipped, walks the edge. A coarse scan brackets the minimum of log f, which is close
    to unimodal there, and a bracketing search with parabolic steps closes in. Measured ratios correct the prediction as
    the search goes on; `passes` bounds the whole.
    """
    edge = Edge(problem)
    budget = problem.objective.passes + passes
    for position in (0.5,) if problem.one_threshold else problem.start:
        if problem.objective.passes + 1 <= budget:
            edge.measure(position)
    if not problem.one_threshold:
        while edge.points and problem.objective.passes + 3 <= budget:
            if (place := edge.next_position()) is None:
                break
            edge.measure(place)
    for position in edge.by_damage():
        if edge.settle(position, budget):
            return


STRATEGIES: dict[str, Callable[[Problem, int, int], None]] = {
    "frontier": frontier,
    "two-pointer": two_pointer,
    "exhaustive": exhaustive,
}
