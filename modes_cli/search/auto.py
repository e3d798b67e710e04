"""Which policy: the one that was named, or with `auto` the candidate that measures best.

Candidates are alpha ** power * pi for a few powers, alpha per layer or per layer and modality; power 1 is the paper's
rule. Each is tried at one place of its own frontier; the best goes on to the full search from there. `auto` ends with the
paper's rule whenever that measures best. Trials take half of the passes at most; where that is too few for all, the paper's
rule is taken.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from modes_cli.artifacts import Calibration
from modes_cli.models.groups import SKIPPABLE
from modes_cli.search.objective import Objective, Point
from modes_cli.search.staircase import Staircase
from modes_cli.search.strategies import TOLERANCE, Problem, edge_point
from modes_cli.skipping.policy import Policy, Rule
from modes_cli.skipping.registry import policy

AUTO = "auto"
_TRIED: tuple[tuple[str, dict[str, float]], ...] = (
    ("modes", {}),
    ("tempered", {"power": 0.5, "per_modality": 0.0}),
    ("tempered", {"power": 0.25, "per_modality": 0.0}),
    ("tempered", {"power": 0.25, "per_modality": 1.0}),
    ("tempered", {"power": 0.125, "per_modality": 1.0}),
    ("dmt", {}),
)
TRIAL_SHARE = 1.0  # of the calibration set; on a part of it, the best candidate often was another
TRIAL_POSITIONS = ((0.3,),)
AROUND = {0.3: (0.3, 0.15, 0.45)}


@dataclass(frozen=True)
class Candidate:
    policy: Policy
    rule: Rule
    staircase: Staircase


def candidates(name: str, strategy: str, calibration: Calibration, counts: Tensor) -> list[Candidate]:
    """The policies to try. The paper's own strategies with `auto` take the paper's own policy."""
    if name != AUTO:
        policies = [policy(name)]
    elif strategy == "frontier":
        policies = [policy(tried, **parameters) for tried, parameters in _TRIED]
    else:
        policies = [policy("modes")]
    nothing = dict.fromkeys(SKIPPABLE, 0.0)
    rules = [(p, p.rule(calibration, nothing)) for p in policies]
    return [Candidate(p, rule, Staircase(counts, rule.score_scale)) for p, rule in rules]


def choose(
    options: list[Candidate],
    objective: Objective,
    target: float,
    strategy: Callable[[Problem, int, int], None],
    grid: int,
    passes: int,
) -> tuple[Candidate, Point | None, list[Point]]:
    """The winning candidate, its best point, and every point that was measured on the whole set."""
    spent = objective.passes
    winner, near = _winner(options, objective, target, passes)
    problem = Problem(winner.rule, winner.staircase, target, winner.policy.one_threshold, objective)
    if near in AROUND:  # the trial has shown on which side of the edge the minimum lies
        problem.start = AROUND[near]
    strategy(problem, grid, passes - math.ceil(objective.passes - spent))
    return winner, problem.best(), problem.measured


def _winner(options: list[Candidate], objective: Objective, target: float, passes: int) -> tuple[Candidate, float | None]:
    """The best candidate, and the place of its edge that was best; None if nothing was tried."""
    each = objective.part(TRIAL_SHARE)
    affordable = [positions for positions in TRIAL_POSITIONS if each * len(positions) * len(options) <= passes / 2]
    if len(options) == 1 or not affordable:
        return options[0], None
    trials = [(_trial(option, objective, target, affordable[0]), option) for option in options]
    (_, _, near), winner = min(trials, key=lambda trial: trial[0])
    return winner, near


def _trial(
    candidate: Candidate, objective: Objective, target: float, positions: tuple[float, ...]
) -> tuple[bool, float, float]:
    """Whether it misses the target, the least damage, and where on the edge.

    One that skips too little looks better than it is; one with a layer whose scores are all but 0 skips far too much at once.
    """
    problem = Problem(candidate.rule, candidate.staircase, target, candidate.policy.one_threshold, objective)
    points = [(edge_point(problem, position, TRIAL_SHARE), position) for position in positions]
    low, high = target - TOLERANCE / 2, target + 2 * TOLERANCE
    return min((not low <= point.skip_ratio <= high, point.kl, position) for point, position in points)
