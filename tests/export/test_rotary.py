"""Angles of positions, against transformers' own modules."""

import pytest
import torch
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3VLMoeTextConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextRotaryEmbedding

from modes_cli.errors import UnknownLayout
from modes_cli.export import rotary

SIZE = 32


def text(module: nn.Module) -> nn.Module:
    made = nn.Module()
    made.add_module("rotary_emb", module)
    return made


@pytest.mark.parametrize("sections", [[8, 4, 4], [6, 5, 5], [4, 6, 6], [16, 0, 0]])
@pytest.mark.parametrize("multimodal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_three_rows_of_positions(sections: list[int], multimodal: bool, dtype: torch.dtype) -> None:
    """The same bits; looked up by row and section where the operator does that."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections, "mrope_interleaved": True}
    module = Qwen3VLMoeTextRotaryEmbedding(Qwen3VLMoeTextConfig(head_dim=SIZE, rope_parameters=rope))
    positions = torch.randint(0, 5000, (3, 2, 7), generator=torch.Generator().manual_seed(0))
    hidden = torch.zeros(2, 7, 8, dtype=dtype)
    expected = [part[..., : SIZE // 2] for part in module(hidden, positions)]
    whole = text(module)
    rotary.replace(whole, multimodal=multimodal)
    found = module(hidden, positions)
    assert isinstance(found, rotary.MultimodalRotation if multimodal else rotary.Rotation)
    for table, angles in zip((found.cos, found.sin), expected, strict=True):
        if isinstance(found, rotary.MultimodalRotation):
            assert found.sections == sections
            rows = table[found.positions]  # [3, B, S, D / 2]
            table = rows[0].clone()
            for row in (1, 2):
                own = slice(row, 3 * sections[row], 3)
                table[..., own] = rows[row][..., own]
        assert table.dtype == dtype
        assert torch.equal(table, angles)


@pytest.mark.parametrize("rope", [{}, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}])
def test_one_row_of_positions(rope: dict[str, object]) -> None:
    parameters = {"rope_type": "default", "rope_theta": 1e4, **rope}
    module = Qwen3MoeRotaryEmbedding(Qwen3MoeConfig(head_dim=SIZE, rope_parameters=parameters))
    assert (module.attention_scaling == 1) == (not rope)
    positions = torch.arange(12).view(2, 6) * 7
    expected = [part[..., : SIZE // 2] for part in module(torch.zeros(2, 6, 8), positions)]
    rotary.replace(text(module), multimodal=True)
    found = module(torch.zeros(2, 6, 8), positions)
    assert torch.equal(found.cos, expected[0])
    assert torch.equal(found.sin, expected[1])


def test_frequencies_that_change_are_refused() -> None:
    parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    module = Qwen3MoeRotaryEmbedding(Qwen3MoeConfig(head_dim=SIZE, rope_parameters=parameters))
    with pytest.raises(UnknownLayout, match="`dynamic`"):
        rotary.replace(text(module), multimodal=False)
