"""Load balancing without an auxiliary loss, for routers that add a bias when they choose (DeepSeek-V3)."""

import torch
from torch import Tensor


def expert_load(chosen: Tensor, real: Tensor, experts: int) -> Tensor:
    """How often each expert was chosen: [experts] float32.

    Args:
        chosen: [T, k] int64, the experts of each token.
        real: [T] bool; padding (False) is not counted.
    """
    return torch.bincount(chosen[real].flatten(), minlength=experts).float()


@torch.no_grad()
def update_bias(bias: Tensor, load: Tensor, rate: float) -> None:
    """Raise, in place, the bias of experts with less than the mean load by `rate`, and lower that of those with more.

    The bias decides which experts are chosen, not how they are weighted, so no gradient passes through it. DeepSeek-V3
    technical report (arXiv:2412.19437), section 2.1.2; Wang et al. (arXiv:2408.15664), algorithm 1: b += u * sign(mean - load).

    Args:
        bias: [experts].
        load: [experts], the tokens that chose each expert in one step.
        rate: the report's bias update speed.
    """
    bias += rate * torch.sign(load.mean() - load)


def unevenness(load: Tensor) -> float:
    """Largest load over the mean, minus 1: 0 when every expert is used equally (MaxVio of Wang et al.)."""
    return (load.max() / load.mean() - 1).item()
