"""Dual-modality thresholding alone: s = pi, one threshold per modality (the paper's ablation)."""

import torch
from torch import Tensor

from modes_cli.models.groups import GROUPS
from modes_cli.skipping.measured import Measured
from modes_cli.skipping.policy import Policy, register


@register("dmt")
class DualModalityThresholding(Policy):
    automatic = 6

    def scale(self, measured: Measured) -> Tensor:
        return torch.ones(measured.layers, len(GROUPS), dtype=torch.float64)
