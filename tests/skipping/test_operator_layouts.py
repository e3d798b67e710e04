"""The operator for experts of every layout, made by hand: two matrices, biases, an activation."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modes_cli.models.blocks import MoEBlock
from modes_cli.skipping.operator import BlockOperator
from tests.kernels.reference import ACTIVATIONS, ALPHA, LIMIT, Case, assert_close, random_case
from tests.kernels.reference import skip_experts as plainly

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Stack(nn.Module):
    """Experts in any layout, by the plain definition."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        biases = {"gate_up_proj_bias": case.gate_up_bias, "down_proj_bias": case.down_bias}
        for name, value in {"gate_up_proj": case.gate_up, "down_proj": case.down, **biases}.items():
            if value is not None:
                self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        if case.activation == "swiglu_oai":
            self.alpha, self.limit = ALPHA, LIMIT

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        group = torch.zeros(len(hidden), dtype=torch.int32)
        return plainly(replace(self.case, x=hidden, expert_ids=index, expert_weights=weights, group=group, score=None,
                               tau=torch.zeros(1), score_scale=torch.ones(1)))  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_layout(activation: str, dtype: torch.dtype) -> None:
    for transposed, interleaved, biases in itertools.product((False, True), repeat=3):
        layout: dict[str, Any] = {"transposed": transposed, "interleaved": interleaved}
        case = random_case(dtype=dtype, weight_dtype=dtype, activation=activation, biases=biases, **layout)
        stack = Stack(case)
        block = MoEBlock(0, 0, "experts", stack, 6, 3, 24, 16, transposed, interleaved, biases, activation)
        operator = BlockOperator(block, stack.forward)
        keep = torch.rand(9, 3, generator=torch.Generator().manual_seed(1)) < 0.5
        out = operator(case.x, case.expert_ids, case.expert_weights, keep)
        assert out is not None, operator.implementation.reason
        masked = case.but(score=keep.float(), tau=torch.full((2,), 0.5))
        assert_close(out, masked)

        for wrong in ({"transposed": not transposed}, {"interleaved": not interleaved}, {"activation": other(activation)}):
            mistaken = BlockOperator(replace(block, **wrong), stack.forward)  # type: ignore[arg-type]
            stack.alpha, stack.limit = ALPHA, LIMIT
            assert mistaken(case.x, case.expert_ids, case.expert_weights, keep) is None


def other(activation: str) -> str:
    return ACTIVATIONS[(ACTIVATIONS.index(activation) + 1) % 3]


def test_routing_weights_in_float32_are_not_rounded() -> None:
    case = random_case(dtype=torch.bfloat16, weight_dtype=torch.bfloat16)
    stack = Stack(case)
    weights = case.expert_weights.float() * 1.001
    block = MoEBlock(0, 0, "experts", stack, 6, 3, 24, 16, False, False, False, "silu")
    keep = torch.ones(9, 3, dtype=torch.bool)
    out = BlockOperator(block, lambda x, index, w: stack(x.float(), index, w).bfloat16())(
        case.x, case.expert_ids, weights, keep
    )
    assert out is not None
    expected = case.but(x=case.x.float(), expert_weights=weights, score=keep.float())
    assert torch.equal(out, plainly(expected).bfloat16())
