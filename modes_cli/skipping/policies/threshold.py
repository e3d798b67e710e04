"""A plain threshold: s = pi, one tau for every layer and token."""

import torch
from torch import Tensor

from modes_cli.skipping.policy import Policy, register


@register("threshold")
class Threshold(Policy):
    one_threshold = True

    def scale(self, importance: Tensor) -> Tensor:
        return torch.ones_like(importance[:, :2])
