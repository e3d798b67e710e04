"""transformers' experts as something that can be timed."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextExperts

from kernels.bench.cases import Layer, Routed, Shape
from kernels.bench.ours import FEW_TOKENS, Ours, Runtime
from modes_cli.skipping.pairs import survivors
from modes_cli.skipping.policy import routing_probability

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


class Transformers:
    """transformers' own module with one of its implementations.

    `dropped`: only the kept pairs reach it, each as a token with one expert. That is how this package skips inside a
    PyTorch model without the operator; the threshold is part of the call, as it is of ours.
    """

    def __init__(self, shape: Shape, layers: list[Layer], implementation: str, *, dropped: bool) -> None:
        self.name = f"transformers {implementation}" + (", dropped" if dropped else "")
        self.dtype = str(layers[0].down.dtype).removeprefix("torch.")
        self.weight_bytes = layers[0].down.itemsize
        self._implementation, self._dropped = implementation, dropped
        self._modules = [_experts(shape, layer, implementation) for layer in layers]

    def takes(self, tokens: int, ratio: float) -> bool:
        return (ratio > 0) == self._dropped and (self._implementation != "batched_mm" or tokens <= FEW_TOKENS)

    def work(self, routed: Routed, ratio: float, _threads: int) -> Callable[[], Tensor]:
        module = self._modules[routed.layer]
        if self._dropped:
            return partial(_drop, module, routed.x, routed.ids, routed.weights, routed.tau[ratio])
        return partial(module, routed.x, routed.ids, routed.weights)


def _drop(module: nn.Module, x: Tensor, ids: Tensor, weights: Tensor, tau: Tensor) -> Tensor:
    return survivors(module, x, ids, weights, routing_probability(weights) >= tau)


def _experts(shape: Shape, layer: Layer, implementation: str) -> Any:
    """The module on the layer's own tensors."""
    config: Any = Qwen3VLMoeTextConfig(
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.intermediate,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        hidden_act="silu",
    )
    if implementation != "eager" and implementation not in ALL_EXPERTS_FUNCTIONS:
        raise RuntimeError(f"this transformers has no experts implementation `{implementation}`")
    config._experts_implementation = implementation
    experts: Any = Qwen3VLMoeTextExperts  # untyped
    with torch.device("meta"):
        module = experts(config)
    module.gate_up_proj = nn.Parameter(layer.gate_up, requires_grad=False)
    module.down_proj = nn.Parameter(layer.down, requires_grad=False)
    return module.eval()


def torch_runtimes(shape: Shape, layers: list[Layer]) -> list[Runtime]:
    """Ours first, then transformers' implementations with nothing skipped and with the skipped pairs dropped."""
    peers = [
        Transformers(shape, layers, implementation, dropped=dropped)
        for implementation in IMPLEMENTATIONS
        for dropped in (False, True)
    ]
    return [Ours(layers), *peers]
