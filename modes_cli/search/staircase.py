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
from modes_cli.models.groups import DECODE, TEXT, VISION

Array = NDArray[np.float64]
Groups = tuple[int, ...]


class Staircase:
    """Predicted skip ratios for one score scale.

    Two thresholds span it: one of text, one of vision. `decode` goes with text, unless a rule gives it a threshold of its own:
    then `decode_tau` is that, and a constant number of pairs is skipped there.

    Args:
        counts: (layers, groups, bins) int64, pairs per bin of what `scale` is multiplied with.
        scale: (layers, groups), the score scale.
        decode_tau: the threshold of `decode`; None: that of text.
    """

    def __init__(self, counts: Tensor, scale: Tensor, decode_tau: float | None = None) -> None:
        per_bin = counts.numpy().astype(np.float64)
        self._edges = bin_edges()
        self._below = np.concatenate([np.zeros((*per_bin.shape[:2], 1)), per_bin.cumsum(-1)], -1)
        self._scale = scale.double().numpy()
        self._pairs = per_bin.sum((0, 2))  # per group
        self.total = float(self._pairs.sum())
        self.text: Groups = (TEXT, DECODE) if decode_tau is None else (TEXT,)
        self.vision: Groups = (VISION,)
        self.decode_tau = decode_tau
        self._apart = 0.0 if decode_tau is None else self.skipped((DECODE,), decode_tau)

    def pairs(self, groups: Groups) -> float:
        """Top-k pairs of some groups' tokens."""
        return float(sum(self._pairs[group] for group in groups))

    @property
    def largest(self) -> float:
        """The skip ratio when every text and vision pair is skipped; special tokens keep theirs."""
        return (self.pairs(self.text) + self.pairs(self.vision) + self._apart) / self.total

    def skipped(self, groups: Groups, tau: float) -> float:
        """Pairs of some groups that threshold `tau` skips."""
        if tau <= 0:
            return 0.0
        skipped = 0.0
        for group in groups:
            for layer, scale in enumerate(self._scale[:, group]):
                value = tau / scale if scale > 0 else np.inf
                skipped += float(np.interp(value, self._edges, self._below[layer, group]))
        return skipped

    def ratio(self, tau_text: float, tau_vision: float) -> float:
        """g: skipped share of all top-k pairs."""
        return (self.skipped(self.text, tau_text) + self.skipped(self.vision, tau_vision) + self._apart) / self.total

    def top(self, groups: Groups) -> float:
        """A threshold that skips every pair of some groups."""
        return float(np.nextafter(np.float32(self._scale[:, list(groups)].max() * self._edges[-1]), np.float32(np.inf)))

    def tau_for(self, groups: Groups, share: float) -> float:
        """The smallest threshold, as a float32, that skips at least `share` of some groups' pairs."""
        pairs = self.pairs(groups)
        if share <= 0 or pairs == 0:
            return 0.0
        if share >= 1:
            return self.top(groups)
        return _bisect(lambda tau: self.skipped(groups, tau) >= share * pairs, self.top(groups))

    def pair_for(self, target: float, text_share: float) -> tuple[float, float]:
        """Thresholds on the staircase's edge: `text_share` of text pairs skipped, and just enough vision pairs."""
        need = target * self.total - self._apart - text_share * self.pairs(self.text)
        share = need / max(self.pairs(self.vision), 1.0)
        return self.tau_for(self.text, text_share), self.tau_for(self.vision, min(max(share, 0.0), 1.0))

    def text_range(self, target: float) -> tuple[float, float]:
        """The text shares between which the staircase's edge runs."""
        need, text, vision = target * self.total - self._apart, max(self.pairs(self.text), 1.0), self.pairs(self.vision)
        return min(1.0, max(0.0, (need - vision) / text)), max(0.0, min(1.0, need / text))

    def single_for(self, target: float) -> float:
        """The smallest common threshold of text and vision that reaches `target`."""
        return _bisect(lambda tau: self.ratio(tau, tau) >= target, max(self.top(self.text), self.top(self.vision)))


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
