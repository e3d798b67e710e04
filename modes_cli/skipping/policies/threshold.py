"""A plain threshold: s = pi, one tau for every layer and token."""

import torch
from torch import Tensor

from modes_cli.models.groups import GROUPS
from modes_cli.skipping.measured import Measured
from modes_cli.skipping.policy import Policy, register


@register("threshold")
class Threshold(Policy):
    one_threshold = True

    def scale(self, measured: Measured) -> Tensor:
        return torch.ones(measured.layers, len(GROUPS), dtype=torch.float64)
