"""The least time a forward can take: its arithmetic at peak rate, or its weights at full bandwidth, whichever is longer."""

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from modes_cli.artifacts.bench import Machine
from modes_cli.models.blocks import MoEBlock


@dataclass(frozen=True)
class Cost:
    """Of a decoder. The vision tower is left out, and attention's own products are, so limits are a little low.

    Attributes:
        dense: parameters every token meets (attention, routers, shared experts). `head`: of the output embeddings.
        expert: parameters of one expert.
        experts: experts per layer; `layers` MoE layers; `top_k` per token.
    """

    dense: int
    head: int
    expert: int
    experts: int
    layers: int
    top_k: int
    bytes_per_parameter: int

    @staticmethod
    def of(model: Any, blocks: list[MoEBlock], head: nn.Module | None = None) -> "Cost":
        """`head`: the output embeddings where they are no part of the model."""
        decoder: nn.Module = model.get_decoder()
        block = blocks[0]
        routed = sum(p.numel() for b in blocks for p in b.experts.parameters())
        head = model.get_output_embeddings() if head is None else head
        logits = sum(p.numel() for p in head.parameters()) if head is not None else 0
        dense = sum(p.numel() for name, p in decoder.named_parameters() if "embed_tokens" not in name) - routed
        size = next(block.experts.parameters()).element_size()
        expert = sum(p.numel() for p in block.experts.parameters()) // block.num_experts
        return Cost(dense, logits, expert, block.num_experts, len(blocks), block.top_k, size)

    def limit(self, tokens: int, skip_ratio: float, machine: Machine, *, logits: int, cached: int = 0) -> float:
        """Seconds. Experts hit are estimated as if kept pairs fell on experts at random.

        Args:
            logits: tokens that meet the head. In a prefill that is the last one of each sequence.
            cached: bytes of keys and values that are read.
        """
        pairs = tokens * self.top_k * (1 - skip_ratio)
        hit = self.experts * (1.0 - math.pow(1 - 1 / self.experts, pairs))
        flops = 2.0 * (tokens * self.dense + logits * self.head + self.layers * pairs * self.expert)
        read = self.bytes_per_parameter * (self.dense + self.head + self.layers * hit * self.expert) + cached
        return max(flops / machine.peak_flops, read / machine.read_bandwidth)
