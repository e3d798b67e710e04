"""Attention as ai.onnx's operator, with a mask: for every type, provider and form of a call. `grouped` is the other one."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from modes_cli.export.sinks import with_sinks

ATTENTION = "modes_export"


class FlatCache:
    """Turns the graph's past inputs into its present outputs. Attention layers only call `update`.

    It remembers padding: its keys in the first layer are zero. onnxruntime-genai's mask is all ones after the prompt, so a
    batch of prompts of different lengths would look at its padding from the first generated token on.
    """

    def __init__(self, past: list[Tensor], real: Tensor) -> None:
        """`real` [B, S] bool: which of the new places are not padding."""
        self.past, self.real = past, real
        self.present: list[Tensor] = list(past)

    def past_real(self) -> Tensor:
        """[B, P] bool. One head tells: no real key is all zeros."""
        keys = self.past[0][:, 0].abs()
        # Not a sum, and not a vector: over no rows, ONNX Runtime's have a wrong shape.
        return (keys @ torch.ones(keys.shape[-1], 1, dtype=keys.dtype))[..., 0] != 0

    def mask(self, before: Tensor) -> Tensor:
        """[B, 1, S, P + S] bool, where a token may look. `before` [B, P] bool: which past places are not padding."""
        (length, past), total = (self.real.shape[1], before.shape[1]), before.shape[1] + self.real.shape[1]
        valid, device = torch.cat([before & self.past_real(), self.real], 1), before.device
        query, key = torch.arange(length, device=device)[:, None] + past, torch.arange(total, device=device)[None]
        # A padding row looks at itself, or its softmax would be 0 / 0 and the NaN would spread through the cache.
        return (((key <= query)[None] & valid[:, None, :]) | (key == query)[None])[:, None]

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if layer_idx == 0:
            keys = torch.where(self.real[:, None, :, None], keys, torch.zeros_like(keys))
        keys, values = torch.cat([self.past[2 * layer_idx], keys], 2), torch.cat([self.past[2 * layer_idx + 1], values], 2)
        self.present[2 * layer_idx : 2 * layer_idx + 2] = keys, values
        return keys, values

    def get_seq_length(self, *_: Any) -> int:
        return self.past[0].shape[2]


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Grouped heads stay grouped: the Attention operator repeats them itself, without copies."""
    if s_aux is not None:
        assert attention_mask is not None
        assert scaling is not None
        query, key, value, attention_mask = with_sinks(query, key, value, attention_mask, s_aux, scaling)
    grouped = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2), None


AttentionInterface.register(ATTENTION, _attention)
