"""Self-attention of the decoder layers as one operator each, with past and new keys and values: ai.onnx's Attention, with a
mask, for every type, provider and form of a call. `grouped` has the other one.
"""

from collections.abc import Callable
from typing import Any, Protocol, cast

import onnxscript
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modes_cli.export import rotary
from modes_cli.export.sinks import with_sinks

torch.library.define(
    "modes_trace::attention",
    "(Tensor query, Tensor key, Tensor value, Tensor mask, Tensor past_key, Tensor past_value, int heads, float scale) "
    "-> (Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("modes_trace::attention")
def _attention_shapes(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, past_key: Tensor, past_value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, S, heads * D]; keys and values [B, kv heads, P + S, D]."""
    batch, heads, past, size = past_key.shape
    present = past_key.new_empty((batch, heads, past + key.shape[1], size))
    return torch.empty_like(query), present, torch.empty_like(present)


class Cache(Protocol):
    """The key-value cache of the layers, which attends as well."""

    multimodal: bool  # whether three rows of positions may be an operator of com.microsoft's

    def get_seq_length(self, *args: Any) -> Any: ...

    def attend(self, layer: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """[B, S, heads * D] from the new queries [B, S, heads * D], keys and values [B, S, kv heads * D] of a layer."""
        ...


def is_latent(config: Any) -> bool:
    """Whether a text model has latent attention (MLA)."""
    return getattr(config, "kv_lora_rank", None) is not None


def replace(text: nn.Module, *, multimodal: bool) -> None:
    """Make the layers of a text model project, turn and hand over to the cache what they attend with.

    Its attention is transformers' usual one: `q_proj`, `k_proj`, `v_proj`, `o_proj`, norms of single heads where there are any.
    `multimodal` as in `rotary.replace`.
    """
    rotary.replace(text, multimodal=multimodal)
    for layer in cast(Any, text).layers:
        layer.self_attn.forward = _forward(layer.self_attn)


def _forward(attn: Any) -> Callable[..., tuple[Tensor, None]]:
    def heads(part: str, hidden: Tensor) -> tuple[Tensor, int]:
        """[B, S, heads * D] or, behind a norm, [B, S, heads, D]; and how many heads."""
        found, norm = getattr(attn, f"{part}_proj")(hidden), getattr(attn, f"{part}_norm", None)
        count = found.shape[-1] // attn.head_dim
        return (found if norm is None else norm(found.unflatten(-1, (count, attn.head_dim)))), count

    def forward(
        hidden_states: Tensor,
        position_embeddings: rotary.Rotation | rotary.MultimodalRotation,
        attention_mask: Tensor | None,
        past_key_values: Cache,
        **_: Any,
    ) -> tuple[Tensor, None]:
        query, key = (position_embeddings(*heads(part, hidden_states)) for part in "qk")
        out = past_key_values.attend(attn, query, key, attn.v_proj(hidden_states), attention_mask)
        return attn.o_proj(out), None

    return forward


class FlatCache:
    """Turns the graph's past inputs into its present outputs.

    It remembers padding: its keys in the first layer are zero. onnxruntime-genai's mask is all ones after the prompt, so a
    batch of prompts of different lengths would look at its padding from the first generated token on.
    """

    multimodal = False

    def __init__(self, past: list[Tensor], real: Tensor) -> None:
        """`real` [B, S] bool: which of the new places are not padding."""
        self.past, self.real = past, real
        self.present: list[Tensor] = list(past)

    def past_real(self) -> Tensor:
        """[B, P] bool. One head tells: no real key is all zeros."""
        keys = self.past[0][:, 0].float().abs()
        # Not a sum, and not a vector: over no rows, ONNX Runtime's have a wrong shape.
        return (keys @ torch.ones(keys.shape[-1], 1))[..., 0] != 0

    def mask(self, before: Tensor) -> Tensor:
        """[B, 1, S, P + S] bool, where a token may look. `before` [B, P] bool: which past places are not padding."""
        (length, past), total = (self.real.shape[1], before.shape[1]), before.shape[1] + self.real.shape[1]
        valid, device = torch.cat([before & self.past_real(), self.real], 1), before.device
        query, key = torch.arange(length, device=device)[:, None] + past, torch.arange(total, device=device)[None]
        # A padding row looks at itself, or its softmax would be 0 / 0 and the NaN would spread through the cache.
        return (((key <= query)[None] & valid[:, None, :]) | (key == query)[None])[:, None]

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Past and new [B, kv heads, P + S, D]."""
        if layer_idx == 0:
            keys = self._marked(keys, self.real[:, None, :, None])
        keys, values = torch.cat([self.past[2 * layer_idx], keys], 2), torch.cat([self.past[2 * layer_idx + 1], values], 2)
        self.present[2 * layer_idx : 2 * layer_idx + 2] = keys, values
        return keys, values

    def get_seq_length(self, *_: Any) -> int:
        return self.past[0].shape[2]

    def attend(self, layer: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """As `Cache`."""
        assert mask is not None
        if getattr(layer, "sinks", None) is not None:
            return self._with_sinks(layer, query, key, value, mask)
        first = 2 * layer.layer_idx
        if first == 0:
            key = self._marked(key, self.real[..., None])
        heads = query.shape[-1] // layer.head_dim
        out, *self.present[first : first + 2] = torch.ops.modes_trace.attention(
            query, key, value, mask, *self.past[first : first + 2], heads, layer.scaling
        )
        return cast(Tensor, out)

    def _with_sinks(self, layer: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """By one more key, which must not get into the cache."""
        query, key, value = (part.unflatten(-1, (-1, layer.head_dim)).transpose(1, 2) for part in (query, key, value))
        grouped = query.shape[1] != key.shape[1]
        key, value = self.update(key, value, layer.layer_idx)
        query, key, value, mask = with_sinks(query, key, value, mask, layer.sinks, layer.scaling)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=layer.scaling, enable_gqa=grouped)
        return out.transpose(1, 2).flatten(2)

    def _marked(self, keys: Tensor, real: Tensor) -> Tensor:
        """Zeros where there is padding. In float32, because ONNX Runtime's Where has no bfloat16."""
        return torch.where(real, keys.float(), torch.zeros(1)).to(keys.dtype)


_ONNX = onnxscript.values.Opset("", 23)


def _attention(
    query: Any, key: Any, value: Any, mask: Any, past_key: Any, past_value: Any, heads: int, scale: float
) -> Any:  # fmt: skip
    """Grouped heads stay grouped: the operator repeats them itself, without copies."""
    inputs = (query, key, value, mask, past_key, past_value)
    return _ONNX.Attention(*inputs, q_num_heads=heads, kv_num_heads=int(past_key.shape[1]), scale=scale, _outputs=3)


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For torch.onnx.export(custom_translation_table=...)."""
    return {torch.ops.modes_trace.attention.default: _attention}
