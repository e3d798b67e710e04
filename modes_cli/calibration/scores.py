"""Routing scores of a calibration set, small enough for any model: one histogram of pi per layer and token group.

A threshold policy decides each pair from its pi, layer and group alone, so these counts are all that is needed to know how
many pairs any thresholds skip. Bins follow the bits of a float32: 512 per power of two, a relative width of 0.2%, from
2^-24 to 1. Counts are integers, so adding batches or processes in any order gives the same result.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modes_cli.models.groups import GROUPS

SHIFT = 14  # float32 bits dropped: 23 - 14 = 9 bits of mantissa are kept
_FIRST = (127 - 24) << (23 - SHIFT)
BINS = (127 << (23 - SHIFT)) - _FIRST + 1


def bin_of(pi: Tensor) -> Tensor:
    """Bin numbers, int64, of positive float32 values up to 1; smaller and larger values go to the outermost bins."""
    return ((pi.contiguous().view(torch.int32) >> SHIFT).long() - _FIRST).clamp_(0, BINS - 1)


def bin_edges() -> NDArray[np.float64]:
    """(BINS + 1,): where each bin begins, and where the last one ends."""
    return ((np.arange(BINS + 1) + _FIRST) << SHIFT).astype(np.int32).view(np.float32).astype(np.float64)


class ScoreHistogram:
    """`counts` (layers, groups, BINS) int64."""

    def __init__(self, layers: int) -> None:
        self.counts = torch.zeros(layers, len(GROUPS), BINS, dtype=torch.int64)

    def add(self, layer: int, pi: Tensor, group: Tensor) -> None:
        """One layer's real tokens: pi (tokens, k) float32, group (tokens,)."""
        flat = bin_of(pi.float()) + group.long()[:, None] * BINS
        self.counts[layer] += torch.bincount(flat.reshape(-1), minlength=len(GROUPS) * BINS).cpu().view(len(GROUPS), BINS)
