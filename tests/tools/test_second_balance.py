"""The bias update evens out an uneven router, through transformers' own DeepSeek-V3 gate, and leaves weights alone."""

import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from tools.second_balance import expert_load, unevenness, update_bias

EXPERTS, TOP_K = 16, 4


def skewed_gate() -> tuple[DeepseekV3TopkRouter, torch.Tensor]:
    """A gate that favours its first experts, and 512 tokens."""
    config = DeepseekV3Config(
        hidden_size=8, n_routed_experts=EXPERTS, num_experts_per_tok=TOP_K, n_group=1, topk_group=1, routed_scaling_factor=1.0
    )
    gate, generator = DeepseekV3TopkRouter(config), torch.Generator().manual_seed(0)
    tokens = torch.randn(512, 8, generator=generator)
    tokens[:, 0] = 1.0  # a constant to hang the preference on
    gate.weight.data = torch.randn(EXPERTS, 8, generator=generator) * 0.3
    gate.weight.data[:, 0] = torch.linspace(1.5, -1.5, EXPERTS)
    return gate, tokens


def test_one_update_by_hand() -> None:
    bias = torch.tensor([0.5, 0.0, 0.0, -0.5])
    update_bias(bias, torch.tensor([6.0, 2.0, 4.0, 4.0]), 0.125)
    assert bias.tolist() == [0.375, 0.125, 0.0, -0.5]


def test_padding_is_not_counted() -> None:
    chosen = torch.tensor([[0, 1], [1, 2], [3, 3]])
    assert expert_load(chosen, torch.tensor([True, True, False]), 5).tolist() == [1, 2, 1, 0, 0]


@torch.no_grad()
def test_a_skewed_router_becomes_even() -> None:
    gate, tokens = skewed_gate()
    real = torch.ones(len(tokens), dtype=torch.bool)
    before = unevenness(expert_load(gate(tokens)[2], real, EXPERTS))
    logits = gate(tokens)[0]
    for step in range(400):
        update_bias(gate.e_score_correction_bias, expert_load(gate(tokens)[2], real, EXPERTS), 0.01 if step < 300 else 0.001)
    logits_after, weights, chosen = gate(tokens)
    assert before > 2
    assert unevenness(expert_load(chosen, real, EXPERTS)) < 0.1
    # The scores, and so the weights of what is chosen, do not know the bias.
    assert torch.equal(logits, logits_after)
    own = logits.sigmoid().gather(1, chosen)
    torch.testing.assert_close(weights, own / own.sum(-1, keepdim=True))
