"""Llama 4: a sigmoid score multiplies what goes into an expert, and every expert computes every token.

The module repeats all tokens once for each expert, those that an expert was not chosen for multiplied with 0. So its own
implementation cannot leave work out; where pairs are skipped, the others are gathered by expert instead.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from modes_cli.models.layouts.base import Computed, Engine, Experts, replace_forward


class ScaledInput:
    sets: tuple[str, ...] = ("experts",)
    arguments: int = 1
    transposed: bool | None = True
    scales_input: bool = True

    def install(self, moe: Any, names: tuple[str, ...], engine: Engine) -> Callable[[], None]:
        computed = Computed(partial(_dense, moe), self.pairs(moe.experts))
        return replace_forward(moe, partial(_forward, moe, partial(engine.layout_experts, names[0], computed)))

    def pairs(self, experts: nn.Module) -> Experts:
        return partial(_pairs, experts)


def _forward(moe: Any, experts: Experts, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    hidden = hidden_states.reshape(-1, moe.hidden_dim)
    scores, logits = moe.router(hidden)  # (T, E): 0 where an expert was not chosen
    weights, index = scores.topk(moe.top_k, dim=1)
    out: Tensor = moe.shared_expert(hidden)
    return out.add_(experts(hidden, index, weights)), logits


def _dense(moe: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The sum over experts as the module computes it, bit for bit. Weights of 0 take a pair out."""
    scores = weights.new_zeros(hidden.shape[0], moe.num_experts).scatter_(1, index, weights)
    repeated = hidden.repeat(moe.num_experts, 1) * scores.transpose(0, 1).reshape(-1, 1)
    out: Tensor = moe.experts(repeated)
    return out.reshape(moe.num_experts, -1, out.shape[-1]).sum(dim=0)


def _pairs(experts: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for expert in index.unique().tolist():
        token, slot = (index == expert).nonzero(as_tuple=True)
        gate, up = (hidden[token] @ experts.gate_up_proj[expert]).chunk(2, dim=-1)
        rows = (up * experts.act_fn(gate)) @ experts.down_proj[expert]
        out.index_add_(0, token, (rows * weights[token, slot][:, None]).float())
    return out.to(hidden.dtype)
