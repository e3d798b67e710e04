"""The decoder graph: one for prefill and decode, with a key-value cache, and one SkipExperts node per MoE layer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from modes_cli.export import graph, packing, routing, scores
from modes_cli.export.attention import FlatCache
from modes_cli.export.families.base import Family
from modes_cli.export.graph import AUTO, Shape
from modes_cli.export.grouped import GroupedCache, RealFirst
from modes_cli.export.skeleton import keep_only
from modes_cli.export.thresholds import PREFIX
from modes_cli.models.blocks import MoEBlock
from modes_cli.models.groups import AUDIO, GROUPS, SPECIAL, VISION, TokenGroups, groups_at_once, last_real, with_decode
from modes_cli.skipping import pairs
from modes_cli.skipping.contribution import Pairs
from modes_cli.skipping.formula import Formula
from modes_cli.skipping.policy import Rule, scale_of

CONTRIBUTION = PREFIX.rstrip(".")  # the module that stands for the formula's tensors
PADDING = len(GROUPS)  # a group that only the graph knows: tau is infinite, so padding costs no expert work


class CacheShape(NamedTuple):
    """Of one layer: key [B, heads, P, key], value [B, heads, P, value]."""

    heads: int
    key: int
    value: int


def cache_shape(text: Any) -> CacheShape:
    """From a text model's configuration. With latent attention (MLA) the latent stands for a key and the rotated part, which
    all heads share, for a value.
    """
    if rank := getattr(text, "kv_lora_rank", None):
        return CacheShape(1, int(rank), int(text.qk_rope_head_dim))
    heads = int(text.num_attention_heads)
    width = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    return CacheShape(int(getattr(text, "num_key_value_heads", None) or heads), width, width)


@dataclass(frozen=True)
class DecoderSpec:
    """What a decoder graph is made from. A contribution of `rule` must be a `Formula`.

    dtype: of activations and cache; the graph's other inputs and outputs are float32 and int64 whatever it is.
    grouped: attention as GroupQueryAttention, where `grouped.fits`; else as ai.onnx's Attention.
    route: with `modes::Route` nodes, for graphs that compute in float32 on the CPU; elsewhere plain nodes do the same.
    """

    config: Any  # of the text model
    deepstack: int
    blocks: list[MoEBlock]
    tokens: TokenGroups
    rule: Rule
    dtype: torch.dtype = torch.float32
    grouped: bool = False
    route: bool = False

    @property
    def layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def cache(self) -> "CacheShape":
        return cache_shape(self.config)


class Decoder(nn.Module):
    """The text model between embeddings and logits, with the experts of every MoE layer replaced by the operator."""

    def __init__(self, model: nn.Module, mode: FakeTensorMode, family: Family, spec: DecoderSpec) -> None:
        super().__init__()
        tree = keep_only(model, [family.text, family.head])
        for name, child in tree.named_children():  # not as one submodule: names must stay the checkpoint's
            self.add_module(name, child)
        self.family, self.spec = family, spec
        self.group: Tensor | None = None
        self.thresholds: Tensor | None = None
        self.kept: list[Tensor] = []
        tokens = spec.tokens
        by_group = {VISION: tokens.vision_ids, SPECIAL: tokens.special_ids, AUDIO: tokens.audio_ids}  # no id is in two
        known = {token: number for number, ids in by_group.items() for token in ids}
        self.register_buffer("known_ids", torch.tensor([*known], dtype=torch.int64), persistent=False)
        self.register_buffer("known_groups", torch.tensor([*known.values()], dtype=torch.int32), persistent=False)
        self.register_buffer("never", torch.tensor([float("inf")]), persistent=False)
        self.formula = spec.rule.contribution
        if self.formula is not None:
            assert isinstance(self.formula, Formula)
            self.add_module(CONTRIBUTION, _parts(self.formula, mode))
        scale = spec.rule.score_scale
        padded = torch.cat([scale, torch.zeros_like(scale[:, :1])], 1)
        for block in spec.blocks:
            self.register_buffer(f"score_scale_{block.layer}", padded[block.index].clone(), persistent=False)
            block.experts.forward = self._experts(block)

    def _experts(self, block: MoEBlock) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        experts: Any = block.experts
        swiglu = block.activation == "swiglu_oai"
        alpha, limit = (float(experts.alpha), float(experts.limit)) if swiglu else (0.0, 0.0)

        def forward(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            scale = self.get_buffer(f"score_scale_{block.layer}")
            # Looked up here: while tracing, a module's parameters are other objects than before.
            biases = (experts.gate_up_proj_bias, experts.down_proj_bias) if block.has_bias else (None, None)
            out, kept = torch.ops.modes_trace.skip_experts(
                hidden, ids, weights.to(hidden.dtype), self.group, self.thresholds, scale,
                experts.gate_up_proj, experts.down_proj, *biases,
                block.activation, alpha, limit, block.transposed, block.interleaved,
                self._score(block, scale, hidden, ids, weights), *packing.scales_of(experts),
            )  # fmt: skip
            self.kept.append(kept)
            return out

        return forward

    def _score(self, block: MoEBlock, scale: Tensor, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor | None:
        """[T, k] float32, what the rule compares with its thresholds; None where the operator computes it from pi."""
        if self.formula is None:
            return None
        assert isinstance(self.formula, Formula)
        assert self.group is not None
        seen = Pairs(block.index, pairs.score(block, weights), self.group, ids, hidden)
        own = {name: self.get_buffer(f"{CONTRIBUTION}.{name}_{block.index}") for name in self.formula.tensors}
        if self.spec.route and (found := scores.one_node(self.formula, own, block, scale, seen, weights)) is not None:
            return found
        return scale_of(scale, seen) * self.formula.of(own, seen)

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        input_ids: Tensor,
        tau: Tensor,
        logits_to_keep: Tensor,
        past: list[Tensor],
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        batch, length, total = *input_ids.shape, attention_mask.shape[1]
        before = past[0].shape[2]
        torch._check(total == before + length)
        for sizes in (inputs_embeds.shape, position_ids.shape[-2:]):
            torch._check(sizes[0] == batch)
            torch._check(sizes[1] == length)
        real = attention_mask[:, -length:] != 0  # not from `before`: a buffer may be longer than what is in it
        self.kept, self.thresholds = [], torch.cat([tau, self.get_buffer("never")])
        groups, embeds = self._groups(input_ids, real), inputs_embeds
        cache: FlatCache | GroupedCache
        if self.spec.grouped:
            order = RealFirst(real)
            groups, embeds = order.sort(groups), order.sort(embeds)
            position_ids = (
                order.sort(position_ids)
                if position_ids.ndim == 2
                else torch.stack([order.sort(row) for row in position_ids.unbind(0)])
            )
            cache = GroupedCache(past, attention_mask, input_ids, real)
            mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)  # nobody looks at it
        else:
            cache = FlatCache(past, real)
            mask = cache.mask(attention_mask[:, :before] != 0)
        self.group = groups.reshape(-1)
        embeds, *deepstack = embeds.to(self.spec.dtype).chunk(1 + self.spec.deepstack, -1)
        text = self.get_submodule(self.family.text)
        hidden = self.family.run_text(text, embeds, position_ids, mask, cache, deepstack)
        if self.spec.grouped:
            hidden = order.restore(hidden)
        logits = self.get_submodule(self.family.head)(torch.ops.modes_trace.last_rows(hidden, logits_to_keep)).float()
        kept = torch.cat(self.kept).reshape(len(self.kept), -1)[:, :PADDING]  # not `stack`: it would be a node per layer
        self.group = self.thresholds = None
        return logits, kept, cache.present

    def _groups(self, input_ids: Tensor, valid: Tensor) -> Tensor:
        """[B, S] int32."""
        group = groups_at_once(input_ids, self.get_buffer("known_ids"), self.get_buffer("known_groups"))
        return torch.where(valid, with_decode(group, last_real(valid)), torch.tensor(PADDING, dtype=torch.int32))


def _parts(formula: Formula, mode: FakeTensorMode) -> nn.Module:
    """A formula's tensors layer by layer, as shapes: like weights they stay in their file. Named as `layer_entries` does."""
    parts = nn.Module()
    with mode:
        for name, tensor in formula.tensors.items():
            for layer in range(len(tensor)):
                parts.register_buffer(f"{name}_{layer}", torch.zeros(tensor.shape[1:]))
    return parts


def export_decoder(model: nn.Module, mode: FakeTensorMode, family: Family, spec: DecoderSpec) -> ir.Model:
    """The decoder graph, its weights still to be linked.

    `model` has parameters of the spec's dtype.

    Inputs: inputs_embeds [B, S, (1 + n) * H], attention_mask [B, P + S], position_ids [3, B, S] or [B, S], input_ids [B, S],
    tau [G] and logits_to_keep [1] (both with a default), past_key_values.N.key / value as `cache_shape` says.
    Outputs: logits [B, S, V], or only the last `logits_to_keep` rows; kept_pairs [L, G] int64; present.N.key / value.
    """
    decoder = Decoder(model, mode, family, spec).eval()
    batch, length, past = 2, 5, 3
    hidden, layers, rows = int(spec.config.hidden_size), spec.layers, family.position_rows
    with mode:
        cache = [torch.zeros(batch, spec.cache.heads, past, width, dtype=spec.dtype) for width in spec.cache[1:] * layers]
        example = {
            "inputs_embeds": torch.zeros(batch, length, (1 + spec.deepstack) * hidden),
            "attention_mask": torch.ones(batch, past + length, dtype=torch.int64),
            "position_ids": torch.zeros((3, batch, length) if rows == 3 else (batch, length), dtype=torch.int64),
            "input_ids": torch.zeros(batch, length, dtype=torch.int64),
            "tau": torch.zeros(len(GROUPS)),
            "logits_to_keep": torch.zeros(1, dtype=torch.int64),
            "past": cache,
        }
    tokens = {0: AUTO, 1: AUTO}
    dynamic = {
        "inputs_embeds": tokens, "attention_mask": tokens, "position_ids": {1: AUTO, 2: AUTO} if rows == 3 else tokens,
        "input_ids": tokens, "tau": {}, "logits_to_keep": {}, "past": [{0: AUTO, 2: AUTO}] * (2 * layers),
    }  # fmt: skip
    parts = {"key": spec.cache.key, "value": spec.cache.value}
    names = {f"{layer}.{part}": width for layer in range(layers) for part, width in parts.items()}
    inputs: dict[str, Shape] = {
        "inputs_embeds": ["batch", "length", (1 + spec.deepstack) * hidden],
        "attention_mask": ["batch", "total"],
        "position_ids": [3, "batch", "length"] if rows == 3 else ["batch", "length"],
        "input_ids": ["batch", "length"],
        "tau": [len(GROUPS)],
        "logits_to_keep": [1],
    }
    # The two are one buffer, which may be longer than what is in it.
    before, after = ("buffer", "present_buffer") if spec.grouped else ("past", "total")
    inputs |= {f"past_key_values.{name}": ["batch", spec.cache.heads, before, width] for name, width in names.items()}
    outputs: dict[str, Shape] = {
        "logits": ["batch", "logits_length", int(spec.config.vocab_size)],
        "kept_pairs": [len(spec.blocks), len(GROUPS)],
    }
    outputs |= {f"present.{name}": ["batch", spec.cache.heads, after, width] for name, width in names.items()}
    traced = graph.trace(decoder, example, dynamic, inputs, outputs)
    if spec.route:
        routing.fuse(traced, spec.blocks[0].top_k)
    graph.give_default(traced, "tau", spec.rule.tau.to(torch.float32))
    graph.give_default(traced, "logits_to_keep", torch.zeros(1, dtype=torch.int64))
    return traced
