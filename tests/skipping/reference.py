"""Skipping in plain steps: one (token, expert) pair at a time, from the weights and the definition alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

from modes_cli.models.blocks import MoEBlock
from modes_cli.models.groups import DECODE, GROUPS, SPECIAL, TEXT, VISION, TokenGroups
from modes_cli.skipping.policy import Rule, tau_vector


def groups(tokens: TokenGroups, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B * S,) int32, token by token: as its id says, but `decode` if it is text and the last of its row that `mask` has."""
    mask = torch.ones_like(ids) if mask is None else mask
    rows = []
    for row, real in zip(ids.tolist(), mask.tolist(), strict=True):
        group = [VISION if i in tokens.vision_ids else SPECIAL if i in tokens.special_ids else TEXT for i in row]
        last = max((place for place, token in enumerate(real) if token), default=None)
        if last is not None and group[last] == TEXT:
            group[last] = DECODE
        rows += group
    return torch.tensor(rows, dtype=torch.int32)


def keep(rule: Rule, pi: Tensor, layer: int, group: Tensor) -> Tensor:
    """Pair by pair in float32: kept when score_scale[layer, group] * pi is at or above tau[group]."""
    scale, tau = rule.score_scale.numpy(), rule.tau.numpy()
    kept = [[bool(scale[layer, g] * p >= tau[g]) for p in row] for row, g in zip(pi.numpy(), group.tolist(), strict=True)]
    return torch.tensor(kept, dtype=torch.bool).reshape(pi.shape)


def probability(weights: Tensor) -> Tensor:
    """w / sum(w): float32, added from the first slot to the last."""
    rows = weights.float().numpy()
    out = np.zeros_like(rows)
    for t, row in enumerate(rows):
        total = np.float32(0)
        for w in row:
            total = np.float32(total + w)
        out[t] = row / total
    return torch.from_numpy(out)


def experts_output(block: MoEBlock, hidden: Tensor, index: Tensor, weights: Tensor, kept: Tensor) -> Tensor:
    """Sum of the kept experts' outputs times their weights, in float32, by what the block's description says."""
    experts: Any = block.experts
    out = torch.zeros(hidden.shape, dtype=torch.float32)
    for token, slot in kept.nonzero().tolist():
        expert = int(index[token, slot])
        up_weight, down = experts.gate_up_proj[expert].float(), experts.down_proj[expert].float()
        if block.transposed:
            up_weight, down = up_weight.T, down.T
        both = up_weight @ hidden[token].float()
        if block.has_bias:
            both = both + experts.gate_up_proj_bias[expert].float()
        gate, up = (both[0::2], both[1::2]) if block.interleaved else both.chunk(2)
        result = down @ _activate(block, experts, gate, up)
        if block.has_bias:
            result = result + experts.down_proj_bias[expert].float()
        out[token] += weights[token, slot].float() * result
    return out


def _activate(block: MoEBlock, experts: Any, gate: Tensor, up: Tensor) -> Tensor:
    if block.activation == "silu":
        return F.silu(gate) * up
    assert block.activation == "swiglu_oai"
    gate, up = gate.clamp(max=experts.limit), up.clamp(-experts.limit, experts.limit)
    return gate * torch.sigmoid(experts.alpha * gate) * (up + 1)


@dataclass(frozen=True)
class Call:
    """What one layer's experts were given, and what they returned."""

    block: MoEBlock
    hidden: Tensor
    index: Tensor
    weights: Tensor
    output: Tensor


@contextmanager
def listening(blocks: list[MoEBlock]) -> Iterator[list[Call]]:
    """All calls of the experts, in order, seen from outside."""
    calls: list[Call] = []

    def hook(block: MoEBlock) -> Any:
        return lambda _module, args, output: calls.append(Call(block, *(part.clone() for part in args), output.clone()))

    handles = [block.experts.register_forward_hook(hook(block)) for block in blocks]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Computed:
    """The (token row, expert) pairs that the implementation below the engine was asked to compute."""

    rows: list[int] = field(default_factory=list)  # of each call: rows times experts per row
    experts: list[Tensor] = field(default_factory=list)


COMPUTED = Computed()


def _counting(self: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    COMPUTED.rows.append(index.numel())
    COMPUTED.experts.append(index.clone())
    out: Tensor = ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden, index, weights)
    return out


ExpertsInterface.register("counting", _counting)


@contextmanager
def counting(inner: Any) -> Iterator[Computed]:
    """`inner`, the model that owns the experts, with grouped_mm experts that count; install engines inside."""
    before = inner.config._experts_implementation
    inner.set_experts_implementation("counting")
    COMPUTED.rows, COMPUTED.experts = [], []
    try:
        yield COMPUTED
    finally:
        inner.set_experts_implementation(before)


def rule(layers: int, text: float, vision: float, *, decode: float | None = None, seed: int | None = None) -> Rule:
    """Thresholds, decode's that of text unless it has one of its own; score scales of 1, or random ones around it."""
    scale = torch.ones(layers, len(GROUPS))
    if seed is not None:
        scale[:, [TEXT, VISION, DECODE]] = 0.2 + 1.6 * torch.rand(layers, 3, generator=torch.Generator().manual_seed(seed))
    tau = {"text": text, "vision": vision}
    return Rule(scale, tau_vector(tau if decode is None else {**tau, "decode": decode}))
