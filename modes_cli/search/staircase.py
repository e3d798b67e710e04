"""How much any thresholds skip, without running the model.

g, the skip ratio, is counted from the score histograms of one unskipped pass (`calibration.scores`): a pair is skipped
when score_scale[layer, group] * pi < tau[group]. Inside a histogram bin pairs are taken to be spread evenly. What this
cannot see is that skipping in early layers changes the routing in later ones; measured ratios correct for that.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from modes_cli.calibration.scores import bin_edges
from modes_cli.models.groups import TEXT, VISION

Array = NDArray[np.float64]


class Staircase:
    """Predicted skip ratios for one score scale.

    Args:
        counts: (layers, groups, bins) int64, pairs per bin.
        scale: (layers, groups), the score scale.
    """

    def __init__(self, counts: Tensor, scale: Tensor) -> None:
        per_bin = counts.numpy().astype(np.float64)
        self._edges = bin_edges()
        self._below = np.concatenate([np.zeros((*per_bin.shape[:2], 1)), per_bin.cumsum(-1)], -1)
        self._scale = scale.double().numpy()
        self.pairs = per_bin.sum((0, 2))  # per group
        self.total = float(self.pairs.sum())

    @property
    def largest(self) -> float:
        """The skip ratio when every text and vision pair is skipped; special tokens keep theirs."""
        return float((self.pairs[TEXT] + self.pairs[VISION]) / self.total)

    def skipped(self, group: int, tau: float) -> float:
        """Pairs of a group that threshold `tau` skips."""
        if tau <= 0:
            return 0.0
        skipped = 0.0
        for layer, scale in enumerate(self._scale[:, group]):
            pi = tau / scale if scale > 0 else np.inf
            skipped += float(np.interp(pi, self._edges, self._below[layer, group]))
        return skipped

    def ratio(self, tau_text: float, tau_vision: float) -> float:
        """g: skipped share of all top-k pairs."""
        return (self.skipped(TEXT, tau_text) + self.skipped(VISION, tau_vision)) / self.total

    def top(self, group: int) -> float:
        """A threshold that skips every pair of a group."""
        return float(np.nextafter(np.float32(self._scale[:, group].max() * self._edges[-1]), np.float32(np.inf)))

    def tau_for(self, group: int, share: float) -> float:
        """The smallest threshold, as a float32, that skips at least `share` of a group's pairs."""
        if share <= 0 or self.pairs[group] == 0:
            return 0.0
        if share >= 1:
            return self.top(group)
        return _bisect(lambda tau: self.skipped(group, tau) >= share * self.pairs[group], self.top(group))

    def pair_for(self, target: float, text_share: float) -> tuple[float, float]:
        """Thresholds on the staircase's edge: `text_share` of text pairs skipped, and just enough vision pairs."""
        need = (target * self.total - text_share * self.pairs[TEXT]) / max(self.pairs[VISION], 1.0)
        return self.tau_for(TEXT, text_share), self.tau_for(VISION, min(max(need, 0.0), 1.0))

    def text_range(self, target: float) -> tuple[float, float]:
        """The text shares between which the staircase's edge runs."""
        need, text, vision = target * self.total, max(self.pairs[TEXT], 1.0), self.pairs[VISION]
        return max(0.0, (need - vision) / text), min(1.0, need / text)

    def single_for(self, target: float) -> float:
        """The smallest common threshold of text and vision that reaches `target`."""
        return _bisect(lambda tau: self.ratio(tau, tau) >= target, max(self.top(TEXT), self.top(VISION)))


def _bisect(enough: Callable[[float], bool], high: float) -> float:
    """The smallest float32 in (0, high] for which `enough` holds; `enough(high)` is taken for granted.

    Positive floats are ordered like their bits, so this halves the bit patterns: at most 31 steps, exact.
    """
    low_bits, high_bits = 0, int(np.float32(high).view(np.int32))
    while high_bits - low_bits > 1:
        middle = (low_bits + high_bits) // 2
        if enough(float(np.int32(middle).view(np.float32))):
            high_bits = middle
        else:
            low_bits = middle
    return float(np.int32(high_bits).view(np.float32))
