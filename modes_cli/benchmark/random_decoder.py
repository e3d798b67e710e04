"""A decoder of real sizes with random weights, made where it runs: sixty gigabytes never pass through the CPU or float32."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, DynamicCache, Qwen3VLMoeTextConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextModel

from modes_cli.benchmark.shapes import DecoderShape
from modes_cli.errors import BadOption

DTYPE = torch.bfloat16
SPARE = 1.15  # memory needed over that of the weights: activations, keys and values, graphs
WHOLE = "modes_bench"


def _whole_attention(
    _module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: Tensor | None, *, scaling: float, **_: object
) -> tuple[Tensor, None]:
    """Attention without padding: causal over a prompt, over all keys for one token.

    transformers' own makes a mask for keys that lie in memory of a fixed size, and then copies them once for each query
    head. Without a mask torch has kernels that do neither. In a graph both sides of the comparison have this one.
    """
    causal = query.shape[2] > 1
    out = scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(WHOLE, _whole_attention)  # no mask function of this name: transformers then makes no mask


class FilledCache:
    """Keys and values of a whole context; a decode step writes the last place, each time the same one.

    Their addresses and sizes never change, so that a step can be captured in a graph.
    """

    def __init__(self, config: Any, batch: int, context: int, device: torch.device) -> None:
        g = torch.Generator(device).manual_seed(context)
        sizes = batch, config.num_key_value_heads, context, config.head_dim
        self.layers = [
            tuple(torch.empty(sizes, device=device, dtype=DTYPE).normal_(generator=g) for _ in range(2))
            for _ in range(config.num_hidden_layers)
        ]

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer)

    def update(self, key: Tensor, value: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        keys, values = self.layers[layer]
        keys[:, :, -1:].copy_(key)
        values[:, :, -1:].copy_(value)
        return keys, values

    def get_seq_length(self, _layer: int = 0) -> int:
        return self.layers[0][0].shape[2] - 1

    def growing(self) -> Any:
        """The same without its last place, in transformers' default cache."""
        cache = DynamicCache()
        for i, (keys, values) in enumerate(self.layers):
            cache.update(keys[:, :, :-1].clone(), values[:, :, :-1].clone(), i)
        return cache


class RandomDecoder:
    """transformers' text model and output embeddings.

    Raises:
        BadOption: there is not enough memory.
    """

    def __init__(self, shape: DecoderShape, layers: int | None, device: torch.device, seed: int) -> None:
        self.shape, self.device = shape, device
        self.config: Any = Qwen3VLMoeTextConfig(**shape.config(layers))
        made: Any = Qwen3VLMoeTextModel  # untyped
        self._require_memory(made)
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.device(device), torch.no_grad():
            torch.manual_seed(seed)
            self.model = made._from_config(self.config, dtype=DTYPE).eval().requires_grad_(False)
            self.head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False, dtype=DTYPE).requires_grad_(
                False
            )
        self.config = self.model.config
        self.device = next(self.model.parameters()).device  # with its number
        self._generator = torch.Generator().manual_seed(seed)

    def ids(self, batch: int, tokens: int) -> Tensor:
        """[B, S] random ids: as different as the embeddings of text and images are."""
        return torch.randint(self.config.vocab_size, (batch, tokens), generator=self._generator).to(self.device)

    def prefill(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The logits of the last token; keys and values are kept, as generation does."""
        out = self.model(input_ids=ids, position_ids=positions, use_cache=True)
        logits: Tensor = self.head(out.last_hidden_state[:, -1:])
        return logits

    def decode(self, ids: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """The logits of one more token for each sequence."""
        out = self.model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
        logits: Tensor = self.head(out.last_hidden_state)
        return logits

    @contextmanager
    def whole_attention(self) -> Iterator[None]:
        """Attention that can be captured in a graph, for the length of a block."""
        before = self.config._attn_implementation
        self.config._attn_implementation = WHOLE
        try:
            yield
        finally:
            self.config._attn_implementation = before

    def _require_memory(self, made: Any) -> None:
        with torch.device("meta"):
            parameters = sum(p.numel() for p in made._from_config(self.config, dtype=DTYPE).parameters())
        needed = SPARE * DTYPE.itemsize * (parameters + self.config.vocab_size * self.config.hidden_size)
        free = _free_memory(self.device)
        if needed > free:
            raise BadOption(
                f"`--shape {self.shape.name}` with `{self.config.num_hidden_layers}` layers needs `{needed / 1e9:.0f}` GB, "
                f"`{free / 1e9:.0f}` GB are free on `{self.device}`",
                hint="`--layers` builds fewer of its layers",
            )


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps for later is free, too
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def mrope_positions(batch: int, tokens: int, device: torch.device) -> Tensor:
    """[3, B, S] time, row and column: text, then a square image, then text, counted as Qwen3-VL counts them."""
    before = tokens // 8
    side = math.isqrt(tokens - 2 * before)
    text = torch.arange(before).expand(3, -1)
    grid = torch.stack(
        [torch.zeros(side * side).long(), torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)]
    )
    after = torch.arange(tokens - before - side * side).expand(3, -1)
    # An image takes as many positions as its longer side; the text after it goes on from there.
    places = torch.cat([text, before + grid, before + side + after], 1)
    return places[:, None].expand(3, batch, tokens).contiguous().to(device)
