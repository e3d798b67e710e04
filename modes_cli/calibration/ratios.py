"""How much smaller a token's further pi are than its largest: medians per layer and rank, from a histogram.

Bins are those of the score histogram. Counts are integers, so adding batches in any order gives the same result.
"""

import torch
from torch import Tensor

from modes_cli.calibration.scores import BINS, bin_edges, bin_of


class SlotRatios:
    """`counts` (layers, k, BINS) int64, of pi_j / pi_1 with pi in falling order."""

    def __init__(self, layers: int, top_k: int) -> None:
        self.counts = torch.zeros(layers, top_k, BINS, dtype=torch.int64)

    def add(self, layer: int, pi: Tensor) -> None:
        """One layer's real tokens: pi (tokens, k) float32."""
        ordered = pi.float().cpu().sort(1, descending=True).values
        bins = bin_of(ordered / ordered[:, :1].clamp_min(1e-30))
        flat = bins + torch.arange(bins.shape[1]) * BINS
        self.counts[layer] += torch.bincount(flat.reshape(-1), minlength=self.counts[layer].numel()).view_as(self.counts[layer])

    def medians(self) -> Tensor:
        """(layers, k) float32: within a bin's width of 0.2%. The lower one of two in the middle; 1 for the first rank."""
        below = self.counts.cumsum(-1)
        middle = (below[..., -1:] + 1) // 2
        edges = torch.from_numpy(bin_edges())
        centres = (edges[:-1] * edges[1:]).sqrt()
        medians = centres[torch.searchsorted(below, middle.clamp_min(1)).clamp_max(BINS - 1)].squeeze(-1)
        medians[:, 0] = 1.0
        return medians.clamp_max(1.0).float()
