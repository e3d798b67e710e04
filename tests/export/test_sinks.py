"""What the GPT-OSS graphs make of attention sinks and of the sliding window, against transformers' own."""

import pytest
import torch
import torch.nn.functional as F
from transformers.masking_utils import sliding_window_causal_mask_function
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from modes_cli.export.families.internvl_gpt_oss import within
from modes_cli.export.sinks import with_sinks

WINDOW = 8


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 16), (8, 1, 12), (2, 2, 64)])
def test_sinks_are_one_more_key(heads: int, kv_heads: int, size: int) -> None:
    generator = torch.Generator().manual_seed(size)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    query, sinks = noise(2, heads, 5, size), noise(heads) * 3
    key, value = noise(2, kv_heads, 9, size), noise(2, kv_heads, 9, size)
    mask = torch.rand(2, 1, 5, 9, generator=generator) > 0.5
    mask[..., 0] = True
    module = torch.nn.Module()
    module.sinks, module.num_key_value_groups = torch.nn.Parameter(sinks), heads // kv_heads  # type: ignore[assignment]
    added = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    expected, _ = eager_attention_forward(module, query, key, value, added, size**-0.5)
    found = F.scaled_dot_product_attention(
        *(given := with_sinks(query, key, value, mask, sinks, size**-0.5))[:3],
        attn_mask=given[3], scale=size**-0.5, enable_gqa=heads != kv_heads,
    )  # fmt: skip
    torch.testing.assert_close(found.transpose(1, 2), expected.detach(), atol=1e-5, rtol=1e-5)
    assert given[0].shape[-1] % 8 == 0


@pytest.mark.parametrize(("length", "past"), [(1, 0), (20, 0), (1, 30), (7, 13)])
def test_the_window_is_transformers_own(length: int, past: int) -> None:
    allowed = sliding_window_causal_mask_function(WINDOW)
    found = within(torch.ones(1, 1, length, past + length, dtype=torch.bool), WINDOW)
    for row in range(length):
        for place in range(past + row + 1):
            assert bool(found[row, place]) == bool(allowed(0, 0, torch.tensor(past + row), torch.tensor(place)))
