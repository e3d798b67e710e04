"""A linear prediction from sums that batches are added to: features centred and scaled, the penalty chosen by two halves.

Of each cell (a layer and a token group) only the sum of z z^T over its tokens is kept, z = (features, 1, target): symmetric, so
its upper triangle. The sums are kept for every other batch and for the rest, so that each half can judge what the other one
predicts.
"""

import torch
from torch import Tensor

PENALTIES = (0.001, 0.01, 0.1, 1.0)  # in tokens of unit variance, per token
WITHOUT_HALVES = 0.1  # where one half has no tokens
SPREAD = 3.0  # standard deviations of a prediction from its mean that are believed


def width(features: int) -> int:
    """Numbers kept for a cell."""
    size = features + 2
    return size * (size + 1) // 2


def add_tokens(sums: Tensor, features: Tensor, target: Tensor) -> None:
    """Add one cell's tokens to `sums` (width,) float64; features (tokens, D), target (tokens,)."""
    z = torch.cat([features.double(), torch.ones_like(target, dtype=torch.float64)[:, None], target.double()[:, None]], 1)
    upper = torch.triu_indices(z.shape[1], z.shape[1])
    sums += (z.T @ z).cpu()[upper[0], upper[1]]


def solve(halves: Tensor, features: int) -> tuple[Tensor, Tensor]:
    """Coefficients and the range of what they predict.

    Args:
        halves: (2, width) float64, of one cell.

    Returns:
        (D + 1,) float64, the intercept last, and (2,) float64: `SPREAD` standard deviations below and above the mean
        prediction. All 0 for a cell without tokens.
    """
    grams = [_full(half, features) for half in halves]
    both = grams[0] + grams[1]
    if float(both[-2, -2]) == 0:
        return torch.zeros(features + 1, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    penalty = WITHOUT_HALVES
    if all(float(gram[-2, -2]) > 0 for gram in grams):
        missed = [_missed(_fit(grams[0], one), grams[1]) + _missed(_fit(grams[1], one), grams[0]) for one in PENALTIES]
        penalty = PENALTIES[missed.index(min(missed))]
    found = _fit(both, penalty)
    mean, spread = float(both[-1, -2] / both[-2, -2]), float(found[:-1] @ _centred(both) @ found[:-1]) / float(both[-2, -2])
    reach = SPREAD * max(0.0, spread) ** 0.5
    return found, torch.tensor([mean - reach, mean + reach], dtype=torch.float64)


def _full(half: Tensor, features: int) -> Tensor:
    size = features + 2
    upper = torch.triu_indices(size, size)
    gram = torch.zeros(size, size, dtype=torch.float64)
    gram[upper[0], upper[1]] = half
    gram[upper[1], upper[0]] = half
    return gram


def _centred(gram: Tensor) -> Tensor:
    """(D, D): the features' sums of products about their means."""
    means = gram[:-2, -2] / gram[-2, -2]
    return gram[:-2, :-2] - gram[-2, -2] * means[:, None] * means


def _fit(gram: Tensor, penalty: float) -> Tensor:
    """(D + 1,): ridge regression of standardised features; one that never changes gets 0."""
    count, means = gram[-2, -2], gram[:-2, -2] / gram[-2, -2]
    target = gram[-1, -2] / count
    centred = _centred(gram)
    variance = centred.diagonal() / count
    varies = variance > 1e-12 * (means.square() + variance)
    scale = torch.where(varies, variance.clamp_min(1e-300).rsqrt(), torch.zeros_like(variance))
    products = (gram[:-2, -1] - count * means * target) * scale
    system = centred * scale[:, None] * scale + penalty * count * torch.eye(len(scale), dtype=torch.float64)
    slopes = torch.linalg.solve(system, products) * scale
    return torch.cat([slopes, (target - slopes @ means)[None]])


def _missed(coefficients: Tensor, gram: Tensor) -> float:
    """Sum of squared errors of a prediction over the tokens that `gram` is about."""
    z = torch.cat([coefficients, -torch.ones(1, dtype=torch.float64)])
    return float(z @ gram @ z)
