"""How sure a comparison of accuracies is: the paired bootstrap (Efron and Tibshirani, "An Introduction to the Bootstrap").

All ways of answering saw the same samples. A resample draws as many samples as there are, with replacement, the same ones for
every way; what a ratio or a difference of two accuracies is over 2,000 resamples says how far it may be from what more samples
would show. Intervals are percentiles. Drawing uses the raw stream of PCG64, which NumPy keeps the same from version to version,
and counts are added as integers in float64: the same samples and seed give the same bits.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
TAILS = (0.025, 0.975)  # between which 95% lie
_AT_ONCE = 1 << 21  # draws held in memory at a time

Floats = NDArray[np.float64]


def resampled(right: Sequence[Sequence[bool]], seed: int, resamples: int = RESAMPLES) -> Floats:
    """The accuracy of each way of answering in each resample.

    Args:
        right: (ways, samples), whether an answer is right; one sample or more.
        seed: of the drawing; any integer.

    Returns:
        (ways, resamples) float64.

    Raises:
        ValueError: no samples, or not as many for one way as for another.
    """
    table = np.array([list(row) for row in right], dtype=np.float64)  # raises ValueError where rows differ in length
    if table.ndim != 2 or not table.shape[1]:
        raise ValueError(f"right has shape {table.shape}, should be (ways, samples), one or more")
    samples = table.shape[1]
    stream = np.random.PCG64(seed % (1 << 128))
    parts = []
    step = max(1, _AT_ONCE // samples)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        # Of 2^64 values; what the remainder favours is beyond any number of samples.
        drawn = (stream.random_raw(rows * samples) % samples).astype(np.int64).reshape(rows, samples)
        drawn += samples * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * samples).reshape(rows, samples)
        parts.append(table @ times.T.astype(np.float64))
    return np.concatenate(parts, axis=1) / samples


def retained(full: Floats, other: Floats) -> tuple[float, float] | None:
    """The interval of other / full, from `resampled` accuracies, (resamples,) each.

    Resamples in which the full model has nothing right have no ratio and are left out; None where that is all of them.
    """
    some = full > 0
    return percentiles(other[some] / full[some]) if some.any() else None


def difference(one: Floats, other: Floats) -> tuple[float, float]:
    """The interval of one - other, from `resampled` accuracies, (resamples,) each. The two are a tie where it holds 0."""
    return percentiles(one - other)


def percentiles(values: Floats) -> tuple[float, float]:
    """What the middle 95% of some values lies between, linearly interpolated."""
    low, high = np.quantile(values, TAILS)
    return float(low), float(high)
