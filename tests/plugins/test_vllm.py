"""The vLLM plugin on a stand-in for what it patches: the same logits as transformers with the bundle's rule."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from modes_cli.errors import BadArtifact
from modes_cli.models.groups import DECODE, SPECIAL, TEXT, VISION, TokenGroups
from modes_cli.plugins import vllm as plugin
from modes_cli.plugins.vllm_rule import DROPPED, LayerRule, TokenReader, placed
from modes_cli.runtime.torch_model import TorchRuntime
from modes_cli.skipping.policy import Rule
from tests.checkpoints import small_samples
from tests.plugins.serving import logits_through, moe_layers, prompts, started
from tests.plugins.standin import V1, V2


@pytest.mark.parametrize("which", [V1, V2])
@pytest.mark.parametrize("skip", ["weight", "drop"])
def test_logits_are_those_of_transformers_with_the_bundles_rule(
    vllm: dict[str, type], runtime: TorchRuntime, which: str, skip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(plugin.SKIP, skip)
    inputs = prompts(runtime, small_samples(1))
    model: Any = runtime.loaded.model
    with torch.no_grad(), runtime.engine.using(rule=runtime.rule) as counts:
        expected = model(**inputs, use_cache=False).logits
        ratio = counts.skip_ratio()
    assert ratio > 0.3
    layers = moe_layers(runtime)
    runner = started(vllm, which, layers)
    tokens = inputs["input_ids"][0].tolist()
    found = runner.execute_model([tokens], lambda: logits_through(runtime, layers, inputs))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
    pairs = len(tokens) * runtime.loaded.blocks[0].top_k * len(layers)
    computed = sum(moe.routed_experts.products for moe in layers.values())
    assert computed == (pairs if skip == "weight" else round(pairs * (1 - ratio)))


def test_dropped_pairs_without_an_expert_map_would_be_garbage(
    vllm: dict[str, type], runtime: TorchRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why `drop` brings a map: the kernels add up what no expert has written."""
    monkeypatch.setenv(plugin.SKIP, "drop")
    layers = moe_layers(runtime)
    runner = started(vllm, V1, layers)
    experts = [moe.routed_experts for moe in layers.values()]
    assert all(torch.equal(one.expert_map, torch.arange(16, dtype=torch.int32)) for one in experts)
    for one in experts:
        one._expert_map = None
    inputs = prompts(runtime, small_samples(1))
    found = runner.execute_model([inputs["input_ids"][0].tolist()], lambda: logits_through(runtime, layers, inputs))
    assert found.isnan().any()


def test_at_tau_0_nothing_changes(vllm: dict[str, type], runtime: TorchRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugin.TAU, "text=0,vision=0")
    layers, plain = moe_layers(runtime), moe_layers(runtime)
    runner = started(vllm, V1, layers)
    inputs = prompts(runtime, small_samples(1))
    found = runner.execute_model([inputs["input_ids"][0].tolist()], lambda: logits_through(runtime, layers, inputs))
    assert torch.equal(found, logits_through(runtime, plain, inputs))


def test_groups_of_several_requests_in_one_step() -> None:
    """A prompt with an image, a prompt's part, two tokens being decoded, padding; read anew from the same place every time."""
    tokens = TokenGroups((9,), (1, 2), ())
    ids, starts = torch.zeros(16, dtype=torch.int32), torch.zeros(6, dtype=torch.int32)
    reader = TokenReader(ids, starts, tokens)
    ids[:10] = torch.tensor([1, 5, 9, 9, 6, 7, 7, 7, 8, 2])
    starts.copy_(torch.tensor([0, 5, 8, 9, 10, 10]))
    S, T, V, D = SPECIAL, TEXT, VISION, DECODE
    expected = [S, T, V, V, D, T, T, D, D, S]
    assert reader.groups(10).tolist() == expected
    assert reader.groups(12).tolist()[:10] == expected
    ids[:2] = torch.tensor([9, 5])
    starts.copy_(torch.tensor([0, 1, 2, 2, 2, 2]))
    assert reader.groups(2).tolist() == [V, D]
    assert reader.groups(0).tolist() == []
    starts.zero_()  # before the first step
    assert reader.groups(2).shape == (2,)
    with pytest.raises(ValueError, match="17 tokens"):
        reader.groups(17)


def test_one_layers_rule_by_hand() -> None:
    scale = torch.ones(2, 5)
    scale[1] = torch.tensor([0.5, 1.0, 2.0, 1.0, 1.0])
    rule = Rule(scale, torch.tensor([0.2, 0.3, 0.2, 0.0, 0.0]))
    reader = TokenReader(torch.tensor([5, 9, 1, 5]), torch.tensor([0, 4]), TokenGroups((9,), (1,)))
    weights = torch.tensor([[6.0, 4.0], [7.1, 2.9], [9.9, 0.1], [9.0, 1.0]])  # any scale: a routed scaling factor cancels out
    ids = torch.tensor([[3, 1], [0, 2], [1, 3], [2, 0]], dtype=torch.int32)
    kept = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 1]]).bool()  # 0.5 * 0.4 = 0.2 reaches it
    for skip in ("weight", "drop"):
        behind = LayerRule(placed(rule, torch.device("cpu")), 1, reader, 3, skip)  # type: ignore[arg-type]
        found, chosen = behind(torch.zeros(4, 8), weights, ids)
        assert torch.equal(found, weights * kept)
        assert chosen.dtype == torch.int32
        assert torch.equal(chosen, ids if skip == "weight" else torch.where(kept, ids, DROPPED))


def test_attention_weights_are_not_there() -> None:
    contribution = SimpleNamespace(needs_attention=True)
    with pytest.raises(BadArtifact, match="attention weights"):
        placed(Rule(torch.ones(1, 5), torch.zeros(5), contribution), torch.device("cpu"))  # type: ignore[arg-type]
