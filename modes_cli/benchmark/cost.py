"""The least time a forward can take: its arithmetic at peak rate, or its weights at full bandwidth, whichever is longer."""

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from modes_cli.artifacts.bench import Machine
from modes_cli.models.loading import Loaded


@dataclass(frozen=True)
class Cost:
    """Of a loaded decoder. Attention's own products and the vision tower are left out, so limits are a little low.

    Attributes:
        dense: parameters every token meets (attention, routers, shared experts, the head).
        expert: parameters of one expert.
        experts: experts per layer; `layers` MoE layers; `top_k` per token.
    """

    dense: int
    expert: int
    experts: int
    layers: int
    top_k: int
    bytes_per_parameter: int

    @staticmethod
    def of(loaded: Loaded) -> "Cost":
        model: Any = loaded.model
        decoder: nn.Module = model.get_decoder()
        block = loaded.blocks[0]
        routed = sum(p.numel() for b in loaded.blocks for p in b.experts.parameters())
        head: nn.Module | None = model.get_output_embeddings()
        dense = sum(p.numel() for name, p in decoder.named_parameters() if "embed_tokens" not in name) - routed
        dense += sum(p.numel() for p in head.parameters()) if head is not None else 0
        size = next(loaded.model.parameters()).element_size()
        expert = sum(p.numel() for p in block.experts.parameters()) // block.num_experts
        return Cost(dense, expert, block.num_experts, len(loaded.blocks), block.top_k, size)

    def limit(self, tokens: int, skip_ratio: float, machine: Machine) -> float:
        """Seconds. Experts hit are estimated as if kept pairs fell on experts at random."""
        pairs = tokens * self.top_k * (1 - skip_ratio)
        hit = self.experts * (1.0 - math.pow(1 - 1 / self.experts, pairs))
        flops = 2.0 * (tokens * self.dense + self.layers * pairs * self.expert)
        read = self.bytes_per_parameter * (self.dense + self.layers * hit * self.expert)
        return max(flops / machine.peak_flops, read / machine.read_bandwidth)
