"""Ridge regression of log ||E(x)|| for each expert, from sums that batches are added to.

With z = (features, 1, log-norm), only the sum of z z^T over an expert's pairs is kept: (E + 3)^2 numbers, symmetric, so its
upper triangle. Everything is solved from these, in closed form (the normal equations of centred features, float64).
"""

import torch
from torch import Tensor

RIDGE = 1.0  # the penalty: this many pairs of the layer's mean feature variance


def width(experts: int) -> int:
    """Numbers kept for an expert."""
    size = experts + 3
    return size * (size + 1) // 2


def add_pairs(sums: Tensor, features: Tensor, experts: Tensor, log_norms: Tensor) -> None:
    """Add one layer's pairs to `sums` (E, width) float64.

    Args:
        features: (tokens, E + 1).
        experts: (tokens, k).
        log_norms: (tokens, k).
    """
    count, size = sums.shape[0], features.shape[1] + 2
    ones = torch.ones(features.shape[0], 1, dtype=torch.float64)
    known = torch.cat([features.double(), ones], 1)
    token = torch.arange(len(known)).repeat_interleave(experts.shape[1])
    flat, target = experts.reshape(-1), log_norms.double().reshape(-1)
    order = torch.argsort(flat, stable=True)
    ends = torch.bincount(flat, minlength=count).cumsum(0).tolist()
    upper = torch.triu_indices(size, size)
    begin = 0
    for expert, end in enumerate(ends):
        if end > begin:
            own = order[begin:end]
            z = torch.cat([known[token[own]], target[own][:, None]], 1)
            sums[expert] += (z.T @ z)[upper[0], upper[1]]
        begin = end


def solve(sums: Tensor, ridge: float = RIDGE) -> Tensor:
    """(E, E + 2) float64 coefficients of (features, 1) from one layer's `sums` (E, width).

    The intercept is not penalised. An expert without pairs gets the layer's mean log-norm.
    """
    count = sums.shape[0]
    size = count + 3
    upper = torch.triu_indices(size, size)
    gram = torch.zeros(count, size, size, dtype=torch.float64)
    gram[:, upper[0], upper[1]] = sums
    gram[:, upper[1], upper[0]] = sums
    pairs, d = gram[:, -2, -2], size - 2
    means = gram[:, -2] / pairs.clamp_min(1)[:, None]
    centred = gram - pairs[:, None, None] * means[:, :, None] * means[:, None, :]
    variance = centred[:, :d, :d].diagonal(dim1=1, dim2=2).sum() / (d * pairs.sum().clamp_min(1))
    penalty = (ridge * variance).clamp_min(1e-12) * torch.eye(d, dtype=torch.float64)
    slopes = torch.linalg.solve(centred[:, :d, :d] + penalty, centred[:, :d, -1])
    slopes[pairs == 0] = 0.0
    intercepts = means[:, -1] - (slopes * means[:, :d]).sum(1)
    intercepts[pairs == 0] = gram[:, -2, -1].sum() / pairs.sum().clamp_min(1)
    return torch.cat([slopes, intercepts[:, None]], 1)
