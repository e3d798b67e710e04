"""Strategies on objectives whose optimum is known."""

import itertools

import numpy as np
import pytest

from modes_cli.search.problem import TOLERANCE
from modes_cli.search.strategies import _grids, exhaustive, frontier, two_pointer
from tests.search.fakes import Damage, problem

# Convex and rising in both shares; their best places lie at both ends and in the middle of the staircase's edge.
DAMAGES: dict[str, Damage] = {
    "even": lambda t, v: 1e-4 + t**2 + v**2,
    "text matters": lambda t, v: 1e-4 + 8 * t**3 + 0.1 * v**2,
    "vision matters": lambda t, v: 1e-4 + 0.2 * t**2 + 5 * v**3,
    "steep": lambda t, v: np.exp(6 * t) + np.exp(3 * v),
    "linear": lambda t, v: 0.001 + 3 * t + v,
}
TARGETS = [0.3, 0.6, 0.85]
PASSES = 12


def finest(target: float, damage: Damage, error: Damage) -> float:
    """The least damage among two million pairs of shares."""
    staircase = problem(target, damage)[0].staircase
    t, v = np.linspace(0, 1, 2001)[:, None], np.linspace(0, 1, 1001)[None]
    text, vision = staircase.pairs(staircase.text), staircase.pairs(staircase.vision)
    ratio = (t * text + v * vision) / staircase.total + error(t, v)  # type: ignore[arg-type]
    return float(np.where(ratio >= target, damage(t, v), np.inf).min())  # type: ignore[arg-type]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", DAMAGES)
def test_two_pointers_find_the_optimum_of_the_grid(name: str, target: float) -> None:
    grid = 12
    all_pairs, _ = problem(target, DAMAGES[name])
    exhaustive(all_pairs, grid, 0)
    assert all_pairs.objective.passes == grid**2
    walk, _ = problem(target, DAMAGES[name])
    two_pointer(walk, grid, 0)
    best, expected = walk.best(), all_pairs.best()
    assert best is not None
    assert expected is not None
    assert (best.kl, best.tau, best.skip_ratio) == (expected.kl, expected.tau, expected.skip_ratio)
    assert best.skip_ratio >= target
    assert walk.objective.passes <= 2 * grid


@pytest.mark.parametrize("strategy", [two_pointer, exhaustive])
def test_one_threshold_takes_the_first_that_is_enough(strategy: object) -> None:
    grid = 20
    given, _ = problem(0.6, DAMAGES["even"], one_threshold=True)
    strategy(given, grid, 0)  # type: ignore[operator]
    best = given.best()
    assert best is not None
    text, _vision = _grids(given, grid)
    assert best.tau[0] == best.tau[1] == next(t for t in text if given.staircase.ratio(t, t) >= 0.6)
    assert given.objective.passes <= grid


def test_grids_run_from_nothing_to_everything() -> None:
    given, _ = problem(0.5, DAMAGES["even"])
    for taus, group in zip(_grids(given, 7), (given.staircase.text, given.staircase.vision), strict=True):
        assert len(taus) == 7
        assert taus == sorted(taus)
        assert taus[0] == 0.0
        assert given.staircase.skipped(group, taus[-1]) == given.staircase.pairs(group)


ERRORS: dict[str, Damage] = {
    "exact": lambda t, v: 0.0,
    "too low": lambda t, v: -0.004 * t - 0.003 * v,
    "too high": lambda t, v: 0.005 * t * v,
}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", DAMAGES)
def test_the_frontier_comes_within_two_percent_in_a_dozen_passes(name: str, target: float, error: str) -> None:
    given, _ = problem(target, DAMAGES[name], error=ERRORS[error])
    frontier(given, 100, PASSES)
    best = given.best()
    assert best is not None
    assert target <= best.skip_ratio <= target + TOLERANCE
    assert given.objective.passes <= PASSES
    assert best.kl <= 1.02 * finest(target, DAMAGES[name], ERRORS[error])


@pytest.mark.parametrize("target", [0.0, *TARGETS])
def test_the_frontier_with_one_threshold(target: float) -> None:
    given, _ = problem(target, DAMAGES["even"], error=ERRORS["too low"], one_threshold=True)
    frontier(given, 100, PASSES)
    best = given.best()
    assert best is not None
    assert best.tau[0] == best.tau[1]
    assert target <= best.skip_ratio <= target + TOLERANCE
    assert given.objective.passes <= 4


@pytest.mark.parametrize("passes", range(1, 9))
def test_the_frontier_keeps_to_small_budgets(passes: int) -> None:
    given, _ = problem(0.6, DAMAGES["even"], error=ERRORS["too low"])
    frontier(given, 100, passes)
    assert 0 < given.objective.passes <= passes


@pytest.mark.timeout(20)
@pytest.mark.parametrize("target", [0.31, 0.55, 0.75])
def test_a_ratio_that_moves_in_steps_ends_the_search(target: float) -> None:
    """Where measured ratios jump over the target's tolerance no threshold helps; the search must say so, not go on."""
    width = 0.2

    def rounded(t: float, v: float) -> float:
        exact = (t * pairs(stairs.text) + v * pairs(stairs.vision)) / total
        return round(exact / width) * width - exact

    given, _ = problem(target, DAMAGES["even"], error=rounded)
    stairs = given.staircase
    pairs, total = stairs.pairs, stairs.total
    frontier(given, 100, PASSES)
    assert given.objective.passes <= PASSES
    feasible = [point.skip_ratio for point in given.measured if point.skip_ratio >= target]
    assert min(feasible, default=1.0) >= target + TOLERANCE


def test_the_best_point_has_least_damage_then_fewest_skips() -> None:
    given, _ = problem(0.5, lambda t, v: 0.25)
    assert given.best() is None
    grid = [given.staircase.tau_for(given.staircase.vision, share) for share in (0.2, 0.85, 0.95)]
    for text, vision in itertools.product((0.0, given.staircase.tau_for(given.staircase.text, 0.5)), grid):
        given.at(text, vision)
    best = given.best()
    assert best is not None
    assert best.skip_ratio == min(point.skip_ratio for point in given.measured if point.skip_ratio >= 0.5)
    part = given.at(0.0, grid[0], share=0.25)
    assert not any(point is part for point in given.measured)


@pytest.mark.parametrize("decode", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("target", TARGETS)
def test_the_frontier_with_a_target_for_decode(target: float, decode: float) -> None:
    given, objective = problem(target, DAMAGES["even"], error=ERRORS["too low"], decode=decode)
    frontier(given, 100, PASSES)
    best = given.best()
    assert best is not None
    assert target <= best.skip_ratio <= target + TOLERANCE
    assert decode <= best.per_group["decode"] <= decode + 0.02
    assert objective.passes <= PASSES
