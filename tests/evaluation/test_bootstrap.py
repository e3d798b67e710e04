"""The paired bootstrap: against drawing one by one, against what is known of binomials, and by its own symmetries."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from modes_cli.evaluation import bootstrap
from modes_cli.evaluation.bootstrap import difference, percentiles, resampled, retained

ANSWERS = st.integers(1, 40).flatmap(
    lambda samples: st.lists(st.lists(st.booleans(), min_size=samples, max_size=samples), min_size=2, max_size=4)
)
SEEDS = st.integers(-(1 << 70), 1 << 70)
quick = settings(max_examples=40)


def one_by_one(right: list[list[bool]], seed: int, resamples: int) -> list[list[float]]:
    """What the module says that it does, without a single vectorised step."""
    stream, samples = np.random.PCG64(seed % 2**128), len(right[0])
    drawn = [[int(stream.random_raw()) % samples for _ in range(samples)] for _ in range(resamples)]
    return [[sum(way[index] for index in one) / samples for one in drawn] for way in right]


@quick
@given(right=ANSWERS, seed=SEEDS)
def test_is_what_drawing_one_by_one_gives(right: list[list[bool]], seed: int) -> None:
    assert resampled(right, seed, 25).tolist() == one_by_one(right, seed, 25)


@quick
@given(right=ANSWERS, seed=SEEDS)
def test_what_is_drawn_at_once_makes_no_difference(right: list[list[bool]], seed: int) -> None:
    whole = resampled(right, seed, 60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "_AT_ONCE", 7 * len(right[0]))
        parts = resampled(right, seed, 60)
    assert parts.tobytes() == whole.tobytes()


@quick
@given(right=ANSWERS, seed=SEEDS)
def test_symmetries(right: list[list[bool]], seed: int) -> None:
    drawn = resampled(right, seed, 200)
    assert resampled(right[::-1], seed, 200).tolist() == drawn[::-1].tolist()  # who stands where does not matter
    low, high = difference(drawn[0], drawn[1])
    assert -1 <= low <= high <= 1
    assert difference(drawn[1], drawn[0]) == pytest.approx((-high, -low), abs=1e-12)
    assert difference(drawn[0], drawn[0]) == (0.0, 0.0)
    found = retained(drawn[0], drawn[1])
    assert (found is None) == (not any(drawn[0]))
    if found is not None:
        assert 0 <= found[0] <= found[1] <= len(right[0])
        assert retained(drawn[0], drawn[0]) == (1.0, 1.0)


def test_nothing_right_has_no_ratio() -> None:
    drawn = resampled([[False] * 20, [True] * 20, [True] + [False] * 19], 0)
    none, every, single = drawn
    assert retained(none, every) is None
    assert retained(every, none) == (0.0, 0.0)
    found = retained(single, every)  # a third of the resamples has nothing right
    assert found is not None
    assert 0.3 < np.mean(single == 0) < 0.42
    assert np.isfinite(found).all()
    assert found[0] >= 20 / 5


def test_resamples_spread_as_binomials_do() -> None:
    """Mean p and standard deviation sqrt(p (1 - p) / n); of a paired difference, from the samples where the two differ."""
    n = 400
    one, other = np.arange(n) < 320, (np.arange(n) >= 8) & (np.arange(n) < 316)
    drawn = resampled([one.tolist(), other.tolist()], 3)
    assert drawn.shape == (2, bootstrap.RESAMPLES)
    for row, share in zip(drawn, (0.8, 0.77), strict=True):
        assert row.mean() == pytest.approx(share, abs=0.002)
        assert row.std() == pytest.approx(np.sqrt(share * (1 - share) / n), rel=0.06)
    gap = one.astype(float) - other.astype(float)
    assert (drawn[0] - drawn[1]).std() == pytest.approx(gap.std() / np.sqrt(n), rel=0.06)
    low, high = difference(drawn[0], drawn[1])
    assert low < gap.mean() < high
    unpaired = difference(drawn[0], resampled([other.tolist()], 4)[0])
    assert unpaired[1] - unpaired[0] > 2 * (high - low)  # what pairing is for


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """400 evaluations of two models, of which the truth is known: 0.8 right, and 0.75 of those plus a few others."""
    random, held = np.random.default_rng(0), {"retained": 0, "difference": 0}
    truth = (0.8 * 0.9 + 0.2 * 0.15) / 0.8
    for number in range(400):
        one = random.random(120) < 0.8
        other = random.random(120) < np.where(one, 0.9, 0.15)
        full, skipped = resampled([one.tolist(), other.tolist()], number, 500)
        found = retained(full, skipped)
        assert found is not None
        held["retained"] += found[0] <= truth <= found[1]
        low, high = difference(full, skipped)
        held["difference"] += low <= 0.8 - 0.75 <= high
    assert all(0.91 <= count / 400 <= 0.98 for count in held.values()), held


def test_percentiles_leave_a_fortieth_on_each_side() -> None:
    assert percentiles(np.arange(41, dtype=np.float64)) == (1.0, 39.0)


@pytest.mark.parametrize("right", [[], [[]], [[True, False], [True]]])
def test_what_cannot_be_resampled(right: list[list[bool]]) -> None:
    with pytest.raises(ValueError, match=r"shape|inhomogeneous"):
        resampled(right, 0)
