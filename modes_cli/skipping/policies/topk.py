"""A smaller k for every token: s = (k - rank - u) / k.

rank is 0 for the token's largest pi, u a hash of the token's routing, uniform in [0, 1). So tau = 1 - k' / k keeps k' experts
of each token, and where k' is not whole, floor(k') of every token and one more of a share k' - floor(k') of the tokens. The
hash looks at bits: another runtime, whose last bits differ, takes other tokens, equally many.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from modes_cli.models.groups import GROUPS
from modes_cli.skipping.contribution import Pairs
from modes_cli.skipping.formula import Formula, rank, token_hash, uniform
from modes_cli.skipping.measured import Measured
from modes_cli.skipping.policy import Policy, register


class Rank(Formula):
    def of(self, own: Mapping[str, Tensor], pairs: Pairs) -> Tensor:
        k = pairs.pi.shape[1]
        return (k - rank(pairs) - uniform(token_hash(pairs))).float() / k


@register("topk")
class TopK(Policy):
    one_threshold = True
    formula = Rank

    def scale(self, measured: Measured) -> Tensor:
        return torch.ones(measured.layers, len(GROUPS), dtype=torch.float64)
