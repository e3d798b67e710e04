"""How the vLLM plugin is registered, and what it refuses: no vLLM, model or setting is served without skipping unnoticed."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from modes_cli.errors import BadArtifact, BadOption, ModesError, VllmMismatch
from modes_cli.plugins import vllm as plugin
from modes_cli.runtime.torch_model import TorchRuntime
from tests.plugins.serving import Served, moe_layers, started
from tests.plugins.standin import V1, V2, Config, FusedTopKRouter, MoERunner, RoutedExperts, fake_vllm

ROOT = Path(__file__).parents[2]


def test_the_entry_point_names_the_plugin() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    value = project["entry-points"]["vllm.general_plugins"]["modes"]
    assert importlib.metadata.EntryPoint("modes", value, "vllm.general_plugins").load() is plugin.register
    (requirement,) = project["optional-dependencies"]["vllm"]
    first, end = (".".join(map(str, part)) for part in (plugin.FIRST, plugin.END))
    assert requirement == f"vllm>={first},<{end}"


def test_importing_it_needs_the_standard_library_only() -> None:
    """vLLM would log an import error and serve without skipping."""
    code = "import sys, modes_cli.plugins.vllm; print(sorted({'torch', 'numpy', 'pydantic', 'vllm'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ran.stdout.strip() == "[]"


def test_without_a_bundle_vllm_is_left_alone(vllm: dict[str, type], monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: dict(vars(runner)) for name, runner in vllm.items()}
    monkeypatch.delenv(plugin.BUNDLE)
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: "9.9")  # not even looked at
    plugin.register()
    assert {name: dict(vars(runner)) for name, runner in vllm.items()} == before


def test_registered_again_it_wraps_once(vllm: dict[str, type], runtime: TorchRuntime) -> None:
    plugin.register()
    once = vllm[V1].load_model
    layers = moe_layers(runtime)
    runner = started(vllm, V1, layers)
    assert vllm[V1].load_model is once
    assert runner._modes_layers == sorted(layers)


@pytest.mark.parametrize("have", [V1, V2])
def test_one_of_vllms_two_runners_is_enough(
    vllm: dict[str, type], monkeypatch: pytest.MonkeyPatch, runtime: TorchRuntime, have: str
) -> None:
    made = fake_vllm(monkeypatch, first=have == V1, second=have == V2)
    assert started(made, have, moe_layers(runtime))._modes_layers


def test_no_runner_at_all(vllm: dict[str, type], monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vllm(monkeypatch, first=False, second=False)
    with pytest.raises(VllmMismatch, match="none of its model runners"):
        plugin.register()


@pytest.mark.parametrize("version", ["0.27.3", "0.34.0", "1.0", "dev"])
def test_unknown_versions_are_refused(vllm: dict[str, type], monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: version)
    with pytest.raises(VllmMismatch, match=f"version `{version}` is not known") as refused:
        plugin.register()
    assert "0.28 to before 0.34" in str(refused.value.hint)


def test_a_runner_that_loads_in_its_own_way_makes_no_step(vllm: dict[str, type], runtime: TorchRuntime) -> None:
    plugin.register()

    class CPUModelRunner(vllm[V1]):  # type: ignore[misc]
        def load_model(self, load_dummy_weights: bool = False) -> None:
            pass

    runner = CPUModelRunner(Served(moe_layers(runtime)), Config("qwen3_vl_moe"))
    runner.load_model()
    with pytest.raises(VllmMismatch, match="`CPUModelRunner` loads its model in its own way"):
        runner.execute_model([[1]], lambda: None)


def test_settings_that_make_no_sense(vllm: dict[str, type], monkeypatch: pytest.MonkeyPatch, runtime: TorchRuntime) -> None:
    monkeypatch.setenv(plugin.SKIP, "fast")
    with pytest.raises(BadOption, match="MODES_VLLM_SKIP=fast"):
        plugin.register()
    monkeypatch.setenv(plugin.SKIP, "")
    monkeypatch.setenv(plugin.TAU, "text:1")
    with pytest.raises(BadOption, match="text:1"):
        started(vllm, V1, moe_layers(runtime))
    monkeypatch.delenv(plugin.TAU)
    monkeypatch.setenv(plugin.BUNDLE, "/nowhere")
    with pytest.raises(BadArtifact, match=r"/nowhere/bundle\.json"):
        started(vllm, V1, moe_layers(runtime))


# -- layouts that would skip nothing, or the wrong thing ----------------------------------------------------------------------


class ZeroExpertRouter(FusedTopKRouter):
    pass


class OtherArguments(FusedTopKRouter):
    def _compute_routing(self, hidden_states: Any, scores: Any) -> Any:  # type: ignore[override]
        return scores


def altered(moe: MoERunner, what: str) -> None:
    router = moe.router
    if what == "monolithic":
        moe.routed_experts.quant_method.is_monolithic = True
    elif what == "class":
        moe.router = ZeroExpertRouter(router.top_k, router.global_num_experts)
    elif what == "arguments":
        moe.router = OtherArguments(router.top_k, router.global_num_experts)
        moe.router.__class__ = type("FusedTopKRouter", (OtherArguments,), {})
    elif what == "gate":
        router._fused_gate = nn.Linear(2, 2)
    elif what == "experts":
        router.global_num_experts += 2
    elif what == "input":
        moe.routed_experts.apply_router_weight_on_input = True  # type: ignore[assignment]
    elif what == "sequence":
        moe.moe_config.is_sequence_parallel = True


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("monolithic", "routes by itself"),
        ("class", "class `ZeroExpertRouter`"),
        ("arguments", r"takes \(hidden_states, scores\)"),
        ("gate", "fused with the gate"),
        ("experts", "top-4 of 18 experts"),
        ("input", "goes into an expert"),
        ("sequence", "sequence parallel"),
    ],
)
def test_layers_that_route_past_the_rule(vllm: dict[str, type], runtime: TorchRuntime, what: str, message: str) -> None:
    layers = moe_layers(runtime)
    *_, last = layers.values()
    altered(last, what)
    first = next(iter(layers.values()))
    with pytest.raises(VllmMismatch, match=message):
        started(vllm, V1, layers)
    assert "_compute_routing" not in vars(first.router)  # the model is as it was


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "kimi_vl"}, "the model is `kimi_vl`, the bundle is of `qwen3_vl_moe`"),
        ({"speculative_config": object()}, "speculative"),
        ({"data_parallel_size": 2}, "`data_parallel_size` is `2`"),
        ({"prefill_context_parallel_size": 2}, "`prefill_context_parallel_size`"),
        ({"enable_dbo": True}, "`enable_dbo`"),
        ({"enable_eplb": True}, "`enable_eplb`"),
    ],
)
def test_configurations_in_which_rows_are_not_the_steps_tokens(
    vllm: dict[str, type], runtime: TorchRuntime, config: dict[str, Any], message: str
) -> None:
    parallel = {name: config.pop(name) for name in list(config) if name not in ("model_type", "speculative_config")}
    whole = dict(config)
    if parallel:
        whole["parallel_config"] = dataclasses.replace(Config("").parallel_config, **parallel)
    with pytest.raises(VllmMismatch, match=message):
        started(vllm, V1, moe_layers(runtime), **whole)


def test_other_layers_than_the_bundles(vllm: dict[str, type], runtime: TorchRuntime) -> None:
    layers = moe_layers(runtime)
    fewer = dict(list(layers.items())[1:])
    with pytest.raises(VllmMismatch, match="the bundle has thresholds for"):
        started(vllm, V1, fewer)
    parallel = dataclasses.replace(Config("").parallel_config, pipeline_parallel_size=2)
    assert started(vllm, V1, fewer, parallel_config=parallel)._modes_layers == sorted(fewer)
    shared = moe_layers(runtime)
    first, second, *_ = shared.values()
    second.router = first.router
    with pytest.raises(VllmMismatch, match="shares its router"):
        started(vllm, V1, shared)


def test_a_map_that_cannot_be_set(vllm: dict[str, type], runtime: TorchRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugin.SKIP, "drop")
    monkeypatch.setattr(RoutedExperts, "expert_map", property(lambda _self: None))
    with pytest.raises(ModesError, match="takes no expert map"):
        started(vllm, V1, moe_layers(runtime))


def test_buffers_that_are_not_there(vllm: dict[str, type], runtime: TorchRuntime) -> None:
    plugin.register()
    runner = vllm[V1](Served(moe_layers(runtime)), Config("qwen3_vl_moe"))
    del runner.query_start_loc
    with pytest.raises(VllmMismatch, match="no buffer `query_start_loc`"):
        runner.load_model()
