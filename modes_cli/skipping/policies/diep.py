"""DiEP: s = pi_j / (beta_j * c(1, j) * pi_1): NAEE's ratio, lower for an expert that resembles the token's first one.

Bai et al., "DiEP: Adaptive Mixture-of-Experts Compression through Differentiable Expert Pruning", arXiv:2509.16105. The pruning
that it learns is no part of this; what is left is its way of skipping, an expert the sooner the more it resembles the first.
How alike two experts are is measured here without training: c = (1 + cos) / 2, where cos is the mean cosine of what both
return for the same token, over calibration tokens that have both (`expert_similarity`). First experts as in `naee`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from modes_cli.models.groups import GROUPS
from modes_cli.skipping.contribution import Pairs
from modes_cli.skipping.formula import Formula, Sizes, chosen, rank
from modes_cli.skipping.measured import Measured
from modes_cli.skipping.policies.naee import betas, first_above, ratio
from modes_cli.skipping.policy import Policy, register

_LEAST = 0.05  # of c: opposite outputs do not make an expert indispensable


class DissimilarRatio(Formula):
    """s * min(beta) * min(c) / 2. With `share` (layers, k), min(beta) / beta, and `apart` (layers, E, E): min(c) / c."""

    @classmethod
    def shapes(cls, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        return {"share": (sizes.top_k,), "apart": (sizes.experts, sizes.experts)}

    def of(self, own: Mapping[str, Tensor], pairs: Pairs) -> Tensor:
        ranks, experts = rank(pairs), chosen(pairs)
        first = (experts * (ranks == 0).to(torch.int64)).sum(1)
        apart = own["apart"].index_select(0, first).gather(1, experts)
        return first_above(pairs, ranks, ratio(pairs) * own["share"][ranks] * apart)


@register("diep")
class DiEP(Policy):
    one_threshold = True
    formula = DissimilarRatio

    def tensors(self, measured: Measured) -> dict[str, Tensor]:
        beta, alike = betas(measured), _alike(measured)
        return {"share": beta.amin(1, keepdim=True) / beta, "apart": alike.amin((1, 2), keepdim=True) / alike}

    def scale(self, measured: Measured) -> Tensor:
        smallest = betas(measured).amin(1, keepdim=True) * _alike(measured).amin((1, 2))[:, None]
        return (2.0 / smallest).expand(-1, len(GROUPS)).contiguous()


def _alike(measured: Measured) -> Tensor:
    """(layers, E, E) float64: c."""
    experts = measured.calibration.experts
    cosine = measured.tensor("expert_similarity", (measured.layers, experts, experts))
    return ((1.0 + cosine) / 2.0).clamp(_LEAST, 1.0)
