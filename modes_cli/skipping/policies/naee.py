"""NAEE: s = pi_j / (beta_j * pi_1), with pi in falling order.

Lu et al., "Not All Experts are Equal", arXiv:2402.14800: a token's second expert is skipped where pi_2 < beta * pi_1, beta
being the median of pi_2 / pi_1 on calibration data. Here slot by slot, with the median beta_j of pi_j / pi_1 for each; tau = 1
is their rule. They never skip a token's first expert; its score is above all others, (1 + pi_1) / min(beta), so that first
experts are skipped where nothing else is left to skip, those of the smallest pi first.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from modes_cli.models.groups import GROUPS
from modes_cli.skipping.contribution import Pairs
from modes_cli.skipping.formula import Formula, Sizes, rank
from modes_cli.skipping.measured import Measured
from modes_cli.skipping.policy import Policy, register


class Ratio(Formula):
    """s * min(beta) / 2. Tensors: `share` (layers, k), min(beta) / beta by rank."""

    @classmethod
    def shapes(cls, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        return {"share": (sizes.top_k,)}

    def of(self, own: Mapping[str, Tensor], pairs: Pairs) -> Tensor:
        ranks = rank(pairs)
        return first_above(pairs, ranks, ratio(pairs) * own["share"][ranks])


def ratio(pairs: Pairs) -> Tensor:
    """(tokens, k): pi / pi_1, at least 2^-23."""
    pi = pairs.pi
    return (pi / pi.amax(1, keepdim=True)).clamp(2.0**-23, 1.0)


def first_above(pairs: Pairs, ranks: Tensor, others: Tensor) -> Tensor:
    """(tokens, k), at most 1: `others` / 2, which are at most 1, and (1 + pi) / 2 for first experts."""
    return 0.5 * torch.where(ranks == 0, 1.0 + pairs.pi, others.clamp(2.0**-23, 1.0))


def betas(measured: Measured) -> Tensor:
    """(layers, k) float64: medians of pi_j / pi_1."""
    return measured.tensor("slot_ratio", (measured.layers, measured.calibration.top_k)).clamp_min(2.0**-24)


@register("naee")
class NAEE(Policy):
    one_threshold = True
    formula = Ratio

    def tensors(self, measured: Measured) -> dict[str, Tensor]:
        beta = betas(measured)
        return {"share": beta.amin(1, keepdim=True) / beta}

    def scale(self, measured: Measured) -> Tensor:
        return (2.0 / betas(measured).amin(1, keepdim=True)).expand(-1, len(GROUPS)).contiguous()
