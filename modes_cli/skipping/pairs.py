"""What the engine does with single (token, expert) pairs: their scores, and computing the kept ones."""

from collections.abc import Callable

import torch
from torch import Tensor

from modes_cli.models.blocks import MoEBlock
from modes_cli.skipping.operator import Base
from modes_cli.skipping.policy import routing_probability

Operator = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor | None]


def score(block: MoEBlock, weights: Tensor) -> Tensor:
    """pi [T, k], float32: the weight itself where there is only one and the model does not renormalise it."""
    return weights.float() if block.scales_input and block.top_k == 1 else routing_probability(weights)


def survivors(base: Base, hidden: Tensor, index: Tensor, weights: Tensor, keep: Tensor) -> Tensor:
    """Only the kept pairs: each goes through `base` with weight 1, is weighted outside, and summed in float32."""
    token, slot = keep.nonzero(as_tuple=True)
    w = weights[token, slot][:, None]
    return _summed(hidden, token, base(hidden[token], index[token, slot][:, None], torch.ones_like(w)) * w)


def scaled(operator: Operator | None, base: Base, hidden: Tensor, index: Tensor, weights: Tensor, keep: Tensor) -> Tensor:
    """The same where weights multiply what goes into an expert. `operator` None: `base` computes all."""
    token, slot = keep.nonzero(as_tuple=True)
    rows, expert = hidden[token] * weights[token, slot][:, None], index[token, slot][:, None]
    ones = torch.ones(expert.shape, dtype=weights.dtype, device=weights.device)
    out = None if operator is None else operator(rows, expert, ones, ones.bool())
    return _summed(hidden, token, base(rows, expert, ones) if out is None else out)


def _summed(hidden: Tensor, token: Tensor, rows: Tensor) -> Tensor:
    out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    return out.index_add_(0, token, rows.float()).to(hidden.dtype)
