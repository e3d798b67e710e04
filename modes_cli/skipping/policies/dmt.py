"""Dual-modality thresholding alone: s = pi, one threshold per modality (the paper's ablation)."""

import torch
from torch import Tensor

from modes_cli.skipping.policy import Policy, register


@register("dmt")
class DualModalityThresholding(Policy):
    def scale(self, importance: Tensor) -> Tensor:
        return torch.ones_like(importance[:, :2])
