"""A small stand-in for the parts of vLLM that the plugin patches, with their names, signatures and order of calls.

Written from what vLLM's source does in versions 0.28 to 0.33, not copied: a runner that loads a model and makes steps from
buffers that stay in place, MoE layers that ask a router and hand its choice to a kernel, and the kernel's behaviour with
expert ids of -1: such pairs are left out of the products, and what they would have written is added up all the same unless
there is an expert map, for which the rows are zeroed first.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

V1, V2 = "vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner"


class FusedTopKRouter:
    """Softmax, then top-k; `select_experts` is the public entry, as in BaseRouter."""

    def __init__(self, top_k: int, global_num_experts: int, renormalize: bool = True) -> None:
        self.top_k, self.global_num_experts, self.renormalize = top_k, global_num_experts, renormalize

    def _compute_routing(
        self, hidden_states: Tensor, router_logits: Tensor, indices_type: Any, *, input_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        weights, ids = torch.softmax(router_logits.float(), -1).topk(self.top_k, -1)
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, ids.to(torch.int32)

    def select_experts(
        self, hidden_states: Tensor, router_logits: Tensor, topk_indices_dtype: Any = None, *, input_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        weights, ids = self._compute_routing(hidden_states, router_logits, topk_indices_dtype, input_ids=input_ids)
        return weights, ids if topk_indices_dtype is None else ids.to(topk_indices_dtype)


class RoutedExperts(nn.Module):
    """w13 [E, 2I, H], w2 [E, H, I]. `products` counts the pairs that the last call computed."""

    def __init__(self, w13: Tensor, w2: Tensor) -> None:
        super().__init__()
        self.w13, self.w2 = w13, w2
        self.quant_method = SimpleNamespace(is_monolithic=False)
        self.register_buffer("_expert_map", None)
        self.products = 0

    @property
    def expert_map(self) -> Tensor | None:
        return self._expert_map

    def forward_modular(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        tokens, k = topk_ids.shape
        rows = torch.full((tokens, k, x.shape[1]), float("nan"))  # not initialised
        if self.expert_map is not None:
            rows.zero_()
        self.products = 0
        for token, slot in (topk_ids >= 0).nonzero().tolist():
            expert = int(topk_ids[token, slot])
            expert = expert if self.expert_map is None else int(self.expert_map[expert])
            gate, up = F.linear(x[token], self.w13[expert]).chunk(2)
            rows[token, slot] = F.linear(F.silu(gate) * up, self.w2[expert]) * topk_weights[token, slot]
            self.products += 1
        return rows.sum(1)


class MoERunner(nn.Module):
    """What a model holds as `experts`."""

    def __init__(self, router: Any, routed_experts: RoutedExperts) -> None:
        super().__init__()
        self.router, self.routed_experts = router, routed_experts
        self.moe_config = SimpleNamespace(is_sequence_parallel=False)

    def forward(self, hidden_states: Tensor, router_logits: Tensor) -> Tensor:
        weights, ids = self.router.select_experts(hidden_states=hidden_states, router_logits=router_logits)
        return self.routed_experts.forward_modular(x=hidden_states, topk_weights=weights, topk_ids=ids)


@dataclass
class Parallel:
    data_parallel_size: int = 1
    prefill_context_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    enable_dbo: bool = False
    enable_eplb: bool = False


@dataclass
class Config:
    model_type: str
    parallel_config: Parallel = field(default_factory=Parallel)
    speculative_config: Any = None

    @property
    def model_config(self) -> Any:
        return SimpleNamespace(hf_config=SimpleNamespace(model_type=self.model_type))


class Wrapped:
    """What a runner keeps as `model` where it captures graphs: no module."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model


def runner_class(second: bool) -> type:
    """A fresh GPUModelRunner: the first keeps its buffers in pairs of host and device, the second in `input_buffers`."""

    class GPUModelRunner:
        def __init__(self, model: nn.Module, config: Config, tokens: int = 256, requests: int = 4) -> None:
            self._to_load, self.vllm_config = model, config
            buffers = {
                "input_ids": torch.zeros(tokens, dtype=torch.int32),
                "query_start_loc": torch.zeros(requests + 1, dtype=torch.int32),
            }
            if second:
                self.input_buffers = SimpleNamespace(**buffers)
            else:
                for name, buffer in buffers.items():
                    setattr(self, name, SimpleNamespace(gpu=buffer, cpu=buffer.clone()))
            self._buffers = buffers

        def load_model(self, load_dummy_weights: bool = False) -> None:
            self.model = Wrapped(self._to_load)

        def get_model(self) -> nn.Module:
            return self.model.model

        def execute_model(self, requests: list[list[int]], forward: Any) -> Any:
            """One step over the tokens of several requests; `forward` runs the model."""
            flat = [token for request in requests for token in request]
            self._buffers["input_ids"][: len(flat)] = torch.tensor(flat, dtype=torch.int32)
            starts = [0]
            for request in requests:
                starts.append(starts[-1] + len(request))
            starts += [starts[-1]] * (len(self._buffers["query_start_loc"]) - len(starts))
            self._buffers["query_start_loc"].copy_(torch.tensor(starts, dtype=torch.int32))
            return forward()

    GPUModelRunner.__module__ = V2 if second else V1
    return GPUModelRunner


def fake_vllm(monkeypatch: pytest.MonkeyPatch, *, first: bool = True, second: bool = True) -> dict[str, type]:
    """Packages `vllm...` with fresh runner classes, by module name."""
    for name in ("vllm", "vllm.v1", "vllm.v1.worker", "vllm.v1.worker.gpu"):
        package = ModuleType(name)
        package.__path__ = []  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, package)
    made = {}
    for name, wanted in ((V1, first), (V2, second)):
        monkeypatch.delitem(sys.modules, name, raising=False)
        if wanted:
            module: Any = ModuleType(name)
            module.GPUModelRunner = made[name] = runner_class(name == V2)
            monkeypatch.setitem(sys.modules, name, module)
    return made
