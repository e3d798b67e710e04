"""vLLM plugin (entry point `vllm.general_plugins`): a bundle's thresholds on vLLM's fused MoE. See docs/vllm.md.

    MODES_BUNDLE=/path/to/bundle vllm serve MODEL

vLLM calls `register` in each of its processes. Without MODES_BUNDLE nothing is changed. With it, a model in which the bundle
cannot be applied exactly is refused when it is loaded: there is no way in which it is served without skipping unnoticed.

Only the standard library is imported here: vLLM logs an import error of a plugin and goes on without it.
"""

import functools
import importlib
import importlib.metadata
import inspect
import os
import re
from collections.abc import Callable
from typing import Any, NoReturn

BUNDLE, TAU, SKIP = "MODES_BUNDLE", "MODES_TAU", "MODES_VLLM_SKIP"
FIRST, END = (0, 28), (0, 34)  # versions whose source has what is patched here; END is the first that was not looked at
# vLLM has two of them, and chooses by model and platform.
MODEL_RUNNERS = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner")
# Routers whose `_compute_routing` alone decides. Others route elsewhere, add experts, or make their choices up.
ROUTERS = {"FusedTopKRouter", "FusedTopKBiasRouter", "GroupedTopKRouter", "CustomRoutingRouter"}
_ARGUMENTS = (["hidden_states", "router_logits", "indices_type"], ["input_ids"])  # of _compute_routing, required and optional
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_MARK = "_modes_original"


def register() -> None:
    """Called by vLLM, in each process, possibly more than once.

    Raises:
        BadOption: a setting makes no sense.
        VllmMismatch: this is not a vLLM that this plugin knows.
    """
    if not os.environ.get(BUNDLE):
        return
    skip_of(os.environ.get(SKIP))
    require_version(importlib.metadata.version("vllm"))
    found = [runner for name in MODEL_RUNNERS if (runner := _model_runner(name)) is not None]
    if not found:
        _refuse("none of its model runners was found", "")
    for runner in found:
        _patch(runner)


def require_version(version: str) -> None:
    """Raises VllmMismatch unless the version is one whose source is known."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None or not FIRST <= (int(match[1]), int(match[2])) < END:
        first, end = (".".join(map(str, part)) for part in (FIRST, END))
        _refuse(f"version `{version}` is not known", f"the plugin knows {first} to before {end}")


def skip_of(text: str | None) -> Any:
    """`weight` (the default) or `drop`. Raises BadOption."""
    if text in (None, "", "weight"):
        return "weight"
    if text == "drop":
        return "drop"
    from modes_cli.errors import BadOption

    raise BadOption(f"`{SKIP}={text}`", hint="either `weight`, which is exact everywhere, or `drop`")


def _model_runner(module: str) -> Any:
    try:
        return getattr(importlib.import_module(module), "GPUModelRunner", None)
    except ModuleNotFoundError as error:
        if error.name is not None and module.startswith(error.name):  # this vLLM has only the other one
            return None
        raise


def _patch(runner: Any) -> None:
    """After the model is loaded, before it is compiled or captured, the rule is put in; without it no step is made."""
    if hasattr(runner.load_model, _MARK):
        return
    for name in ("load_model", "execute_model", "get_model"):
        if not callable(getattr(runner, name, None)):
            _refuse(f"`{runner.__module__}.{runner.__name__}` has no `{name}`", "")
    load, execute = runner.load_model, runner.execute_model

    @functools.wraps(load)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = load(self, *args, **kwargs)
        self._modes_layers = install(self)
        return result

    @functools.wraps(execute)
    def execute_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self, "_modes_layers"):  # a subclass with its own load_model
            _refuse(f"`{type(self).__name__}` loads its model in its own way", f"serve without `{BUNDLE}`, or on a GPU")
        return execute(self, *args, **kwargs)

    setattr(load_model, _MARK, load)
    runner.load_model, runner.execute_model = load_model, execute_model


# -- one model --------------------------------------------------------------------------------------------------------------


def install(runner: Any) -> list[int]:
    """Put the bundle's rule behind the router of every MoE layer of a runner's model; the decoder layers.

    Raises:
        BadArtifact: the bundle is damaged, or its policy cannot be applied here.
        VllmMismatch: the model is not the bundle's, or something in it would route past the rule.
    """
    import torch

    from modes_cli.plugins.vllm_rule import LayerRule, TokenReader, placed

    bundle, rule, tokens = _read_bundle()
    _require_config(runner.vllm_config, bundle)
    skip = skip_of(os.environ.get(SKIP))
    ids, starts = _buffer(runner, "input_ids"), _buffer(runner, "query_start_loc")
    rule, reader = placed(rule, ids.device), TokenReader(ids, starts, tokens)
    blocks = _blocks(runner.get_model(), bundle, runner.vllm_config)  # not `model`, which may be wrapped for graphs
    for name, moe in blocks.values():  # all of them before anything is changed
        _require_block(name, moe, bundle, skip)
    for layer, (name, moe) in blocks.items():
        behind = LayerRule(rule, bundle.moe_layers.index(layer), reader, bundle.decoder.hidden_size, skip)
        _warm(behind, bundle, ids.device)
        moe.router._compute_routing = _with_rule(moe.router._compute_routing, behind)
        if skip == "drop" and moe.routed_experts.expert_map is None:
            # Without a map the kernels add up rows that no expert has written.
            moe.routed_experts._expert_map = torch.arange(bundle.experts, dtype=torch.int32, device=ids.device)
            if moe.routed_experts.expert_map is None:
                _refuse(f"`{name}` takes no expert map", f"`{SKIP}=weight` needs none")
    return list(blocks)


def _with_rule(original: Callable[..., Any], behind: Any) -> Callable[..., Any]:
    @functools.wraps(original)
    def compute_routing(hidden_states: Any, router_logits: Any, indices_type: Any, **more: Any) -> Any:
        weights, ids = original(hidden_states, router_logits, indices_type, **more)
        return behind(hidden_states, weights, ids)

    return compute_routing


def _warm(behind: Any, bundle: Any, device: Any) -> None:
    """One row through the rule: what a policy copies to the device on first use is there before a graph is captured."""
    import torch

    hidden = torch.zeros(1, bundle.decoder.hidden_size, device=device)
    ids = torch.arange(bundle.top_k, device=device)[None]
    behind(hidden, torch.full((1, bundle.top_k), 1.0 / bundle.top_k, device=device), ids)


def _read_bundle() -> tuple[Any, Any, Any]:
    from pathlib import Path

    from modes_cli.export.integrity import loading
    from modes_cli.export.thresholds import read_rule
    from modes_cli.models.groups import bundled_groups
    from modes_cli.options import parse_tau

    folder = Path(os.environ[BUNDLE])
    with loading(folder) as bundle:
        rule = read_rule(folder, bundle)
    tau = parse_tau([entry for entry in os.environ.get(TAU, "").split(",") if entry])
    return bundle, rule if tau is None else rule.with_tau(tau), bundled_groups(bundle)


def _buffer(runner: Any, name: str) -> Any:
    """A tensor that a runner fills before every step and never moves: [N]."""
    from torch import Tensor

    for owner in (runner, getattr(runner, "input_buffers", None)):
        buffer = getattr(owner, name, None)
        tensor = getattr(buffer, "gpu", buffer)
        if isinstance(tensor, Tensor) and tensor.dim() == 1 and not tensor.is_floating_point():
            return tensor
    _refuse(f"`{type(runner).__name__}` has no buffer `{name}`", "")


def _require_config(config: Any, bundle: Any) -> None:
    """Raises VllmMismatch where rows of a MoE layer are not the step's tokens in their order, or the model is another one."""
    model = getattr(config.model_config.hf_config, "model_type", None)
    if model != bundle.family:
        _refuse(f"the model is `{model}`, the bundle is of `{bundle.family}`", f"unset `{BUNDLE}`, or name the model's bundle")
    parallel = config.parallel_config
    for name in ("data_parallel_size", "prefill_context_parallel_size"):
        if (size := getattr(parallel, name, 1)) != 1:
            _refuse(f"`{name}` is `{size}`: MoE layers see other tokens than the step's", "run it with 1")
    for name in ("enable_dbo", "enable_eplb"):
        if getattr(parallel, name, False):
            _refuse(f"`{name}` is on: rows or experts are numbered otherwise", "switch it off")
    if getattr(config, "speculative_config", None) is not None:
        _refuse("speculative decoding is on: which tokens answer is not known", "switch it off")


def _blocks(model: Any, bundle: Any, config: Any) -> dict[int, tuple[str, Any]]:
    """By decoder layer: name and module of what has a router and routed experts."""
    found: dict[int, tuple[str, Any]] = {}
    for name, module in model.named_modules():
        if not (hasattr(module, "router") and hasattr(module, "routed_experts")):
            continue
        match = _LAYER.search(f"{name}.")
        if match is None or int(match[1]) in found:
            _refuse(f"`{name}` is a MoE layer at an unexpected place", "")
        if any(module.router is other.router for _, other in found.values()):
            _refuse(f"`{name}` shares its router with another layer", "")
        found[int(match[1])] = (name, module)
    expected = set(bundle.moe_layers)
    parts = getattr(config.parallel_config, "pipeline_parallel_size", 1)
    if not found or set(found) - expected or (parts == 1 and set(found) != expected):
        _refuse(f"MoE layers are {sorted(found)}, the bundle has thresholds for {sorted(expected)}", "")
    return found


def _require_block(name: str, moe: Any, bundle: Any, skip: str) -> None:
    """Raises VllmMismatch where a layer would route past the rule, or in another way than it was calibrated with."""
    router, experts = moe.router, moe.routed_experts
    if experts.quant_method.is_monolithic:
        hint = "choose a kernel that does not, such as `--moe-backend triton`"
        _refuse(f"the kernel of `{name}` routes by itself and never asks a router", hint)
    if type(router).__name__ not in ROUTERS:
        _refuse(f"`{name}` has a router of class `{type(router).__name__}`", f"known are {', '.join(sorted(ROUTERS))}")
    if getattr(router, "_fused_gate", None) is not None:
        _refuse(f"the router of `{name}` is fused with the gate and not asked", "")
    parameters = inspect.signature(router._compute_routing).parameters
    required, optional = _ARGUMENTS
    if list(parameters)[: len(required)] != required or set(parameters) - {*required, *optional}:
        _refuse(f"the router of `{name}` takes ({', '.join(parameters)})", "")
    if (router.top_k, router.global_num_experts) != (bundle.top_k, bundle.experts):
        found = f"top-{router.top_k} of {router.global_num_experts} experts"
        _refuse(
            f"`{name}` has {found}, the bundle top-{bundle.top_k} of {bundle.experts}", "redundant and fused ones are unknown"
        )
    if getattr(experts, "apply_router_weight_on_input", False):
        _refuse(f"`{name}` multiplies what goes into an expert", "")
    if getattr(moe.moe_config, "is_sequence_parallel", False):
        _refuse(
            f"`{name}` is sequence parallel: it sees a part of the step's tokens", "switch expert or sequence parallelism off"
        )
    if skip == "drop" and not hasattr(experts, "_expert_map"):
        _refuse(f"`{name}` has no expert map, without which dropped pairs add garbage", f"`{SKIP}=weight` needs none")


def _refuse(what: str, hint: str) -> NoReturn:
    from modes_cli.errors import VllmMismatch

    raise VllmMismatch(f"vLLM: {what}", hint=hint or None)
