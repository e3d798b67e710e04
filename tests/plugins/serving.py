"""A transformers model whose MoE layers are the stand-in's, started with the plugin."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modes_cli.data.sample import Sample
from modes_cli.models.inputs import prompt_batch
from modes_cli.plugins import vllm as plugin
from modes_cli.runtime.torch_model import TorchRuntime
from tests.plugins.standin import Config, FusedTopKRouter, MoERunner, RoutedExperts


def moe_layers(runtime: TorchRuntime) -> dict[int, MoERunner]:
    """Stand-ins that hold the weights of the model's own MoE layers."""
    made = {}
    for block in runtime.loaded.blocks:
        experts: Any = block.experts
        router = FusedTopKRouter(block.top_k, block.num_experts)
        made[block.layer] = MoERunner(router, RoutedExperts(experts.gate_up_proj.detach(), experts.down_proj.detach()))
    return made


class Served(nn.Module):
    """The model as vLLM has it: the names of its layers, and its MoE layers."""

    def __init__(self, layers: dict[int, MoERunner]) -> None:
        super().__init__()
        count = max(layers) + 1
        blocks = [nn.ModuleDict({"mlp": nn.ModuleDict({"experts": layers[i]} if i in layers else {})}) for i in range(count)]
        self.language_model = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList(blocks)})})


def logits_through(runtime: TorchRuntime, layers: dict[int, MoERunner], inputs: dict[str, Tensor]) -> Tensor:
    """The model's logits with its MoE layers replaced by the stand-ins; [B, S, V]."""
    model: Any = runtime.loaded.model
    original = {}
    for block in runtime.loaded.blocks:
        moe: Any = model.get_submodule(block.moe)
        original[block.moe] = moe.forward

        def forward(hidden: Tensor, moe: Any = moe, served: MoERunner = layers[block.layer]) -> Tensor:
            flat = hidden.reshape(-1, hidden.shape[-1])
            return served(flat, F.linear(flat, moe.gate.weight)).view_as(hidden)

        moe.forward = forward
    try:
        with torch.no_grad():
            return model(**inputs, use_cache=False).logits
    finally:
        for name, own in original.items():
            model.get_submodule(name).forward = own


def prompts(runtime: TorchRuntime, samples: list[Sample]) -> dict[str, Tensor]:
    return dict(prompt_batch(runtime.loaded, samples).inputs)


def started(vllm: dict[str, type], which: str, layers: dict[int, MoERunner], **config: Any) -> Any:
    plugin.register()
    runner = vllm[which](Served(layers), Config(**{"model_type": "qwen3_vl_moe", **config}))
    runner.load_model()
    return runner
