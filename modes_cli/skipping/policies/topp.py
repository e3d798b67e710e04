"""Top-p: the smallest set of a token's experts whose pi reach p together.

s = 1 - sum of pi before the slot, in falling order; tau = 1 - p. The first expert's is 1 + pi: the set is never empty up to
tau = 1, and above that first experts are skipped too, those of the smallest pi first.

Huang et al., "Harder Tasks Need More Experts: Dynamic Routing in MoE Models", arXiv:2403.07652, routes like that.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from modes_cli.models.groups import GROUPS
from modes_cli.skipping.contribution import Pairs
from modes_cli.skipping.formula import ONE, Formula, before, fixed
from modes_cli.skipping.measured import Measured
from modes_cli.skipping.policy import Policy, register


class RemainingMass(Formula):
    """s / 2. Sums are of integers, so that they do not depend on the order of the slots."""

    def of(self, own: Mapping[str, Tensor], pairs: Pairs) -> Tensor:
        earlier = before(pairs).to(torch.int64)
        mass = (earlier * fixed(pairs.pi)[:, None, :]).sum(-1)
        left = (ONE - mass).clamp(min=1).to(torch.float32) * (1.0 / ONE)
        first = earlier.sum(-1) == 0
        return 0.5 * torch.where(first, 1.0 + pairs.pi, left)


@register("topp")
class TopP(Policy):
    one_threshold = True
    formula = RemainingMass

    def scale(self, measured: Measured) -> Tensor:
        return torch.full((measured.layers, len(GROUPS)), 2.0, dtype=torch.float64)
