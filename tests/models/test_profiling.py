"""`modes profile`: structure and routing statistics against direct computation."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from modes_cli.data.sample import DataSpec
from modes_cli.errors import BadModel, StaleArtifact
from modes_cli.models.groups import GROUPS, SPECIAL, TEXT, VISION
from modes_cli.models.inputs import measuring_batch
from modes_cli.models.loading import Loaded
from modes_cli.models.profiling import profile_model
from modes_cli.requests import ModelSpec, ProfileRequest
from tests.checkpoints import small_samples


def request(checkpoint: Path, run: Path, samples: int = 4) -> ProfileRequest:
    return ProfileRequest(ModelSpec(str(checkpoint), device="cpu"), DataSpec("digits", "validation", samples), run, 2)


def test_structure_and_statistics(tiny_checkpoint: Path, tiny: Loaded, tmp_path: Path) -> None:
    profile = profile_model(request(tiny_checkpoint, tmp_path)).artifact

    blocks = tiny.blocks
    assert (profile.moe_layers, profile.experts, profile.top_k) == (len(blocks), blocks[0].num_experts, blocks[0].top_k)
    assert [layer.layer for layer in profile.layers] == [block.layer for block in blocks]
    assert profile.parameters == sum(p.numel() for p in tiny.model.parameters())
    batch = measuring_batch(tiny, small_samples(4))
    group = tiny.tokens.of(batch.inputs["input_ids"])[batch.inputs["attention_mask"] != 0]
    # Questions and answers are one text here: no token is `decode`.
    assert profile.tokens == {GROUPS[g]: int((group == g).sum()) for g in (TEXT, VISION, SPECIAL)}


def test_the_angle_is_between_the_residual_stream_before_and_after_the_block(
    tiny_checkpoint: Path, tiny: Loaded, tmp_path: Path
) -> None:
    profile = profile_model(request(tiny_checkpoint, tmp_path, samples=2)).artifact
    batch = measuring_batch(tiny, small_samples(2))
    block = tiny.blocks[0]
    layer = tiny.model.get_submodule(block.name.removesuffix(".mlp.experts"))
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _m, args: seen.__setitem__("before", args[0])),
        layer.register_forward_hook(lambda _m, _a, out: seen.__setitem__("after", out)),
    ]
    with torch.no_grad():
        tiny.model(**batch.inputs)
    for hook in hooks:
        hook.remove()
    chosen = (tiny.tokens.of(batch.inputs["input_ids"]) == VISION) & (batch.inputs["attention_mask"] != 0)
    a, b = seen["before"][chosen].double(), seen["after"][chosen].double()
    angle = (torch.nn.functional.cosine_similarity(a, b, dim=-1).arccos().mean() * 180 / math.pi).item()
    assert profile.layers[0].update_angle["vision"] == pytest.approx(angle, abs=0.05)


def test_entropy_of_use_is_one_for_equal_use_and_zero_for_one_expert() -> None:
    from modes_cli.models.profiling import _entropy

    assert _entropy(torch.full((8,), 5)) == pytest.approx(1.0)
    assert _entropy(torch.tensor([9, 0, 0, 0])) == pytest.approx(0.0)


def test_reuse_stale_and_dense(tiny_checkpoint: Path, tiny_dense_checkpoint: Path, tmp_path: Path) -> None:
    assert not profile_model(request(tiny_checkpoint, tmp_path)).reused
    assert profile_model(request(tiny_checkpoint, tmp_path)).reused
    with pytest.raises(StaleArtifact, match=r"data\.samples|data\.digest"):
        profile_model(request(tiny_checkpoint, tmp_path, samples=3))
    with pytest.raises(BadModel, match="no MoE layers"):
        profile_model(request(tiny_dense_checkpoint, tmp_path / "dense"))
