"""DeepSeek-V3's text model with latent attention (MLA), as Kimi's models have it.

The cache holds what transformers' holds: one latent and one rotated key part per token, shared by all heads. transformers
expands the latents of all past tokens again at every step. Here the expansion is moved to the other side of the products,

    (q · (latent W_k)) = ((q W_k^T) · latent)    and    (p (latent W_v)) = ((p latent) W_v),

which gives the same numbers up to rounding, and makes a step's work for a past token that of its latent alone.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modes_cli.export import rotary
from modes_cli.export.attention import Cache, FlatCache


def run_text(text: nn.Module, embeds: Tensor, positions: Tensor, mask: Tensor, cache: Cache) -> Tensor:
    """Hidden states [B, S, H] after the last norm; arguments as in `Family.run_text`."""
    rotary.replace(text, multimodal=cache.multimodal)
    for layer in cast(Any, text).layers:
        layer.self_attn.forward = _attention(layer.self_attn)
    out = text(inputs_embeds=embeds, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=False)
    return cast(Tensor, out.last_hidden_state)


def _attention(attn: Any) -> Any:
    rank, rope, nope, heads = attn.kv_lora_rank, attn.qk_rope_head_dim, attn.qk_nope_head_dim, attn.num_heads
    interleaved = bool(attn.config.rope_interleave)

    def forward(
        hidden_states: Tensor,
        position_embeddings: rotary.Rotation,
        attention_mask: Tensor,
        past_key_values: FlatCache,
        **_: Any,
    ) -> tuple[Tensor, None]:
        batch, length = hidden_states.shape[:2]
        query = attn.q_proj(hidden_states) if attn.q_lora_rank is None else _low_rank_query(attn, hidden_states)
        query = query.view(batch, length, heads, nope + rope).transpose(1, 2)
        latent, rotated = attn.kv_a_proj_with_mqa(hidden_states).split([rank, rope], -1)
        latent = attn.kv_a_layernorm(latent)[:, None]
        query_rotated = position_embeddings.by_heads(query[..., nope:], interleaved)
        rotated = position_embeddings.by_heads(rotated[:, None], interleaved)
        latent, rotated = past_key_values.update(latent, rotated, attn.layer_idx)  # [B, 1, P + S, rank], [B, 1, P + S, rope]
        into_key, into_value = attn.kv_b_proj.weight.view(heads, nope + attn.v_head_dim, rank).split([nope, attn.v_head_dim], 1)
        query = torch.cat([query[..., :nope] @ into_key, query_rotated], -1)
        key = torch.cat([latent, rotated], -1)
        # One head of keys and values for all heads of queries: the Attention operator repeats it itself.
        out = F.scaled_dot_product_attention(query, key, latent, attn_mask=attention_mask, scale=attn.scaling, enable_gqa=True)
        out = out @ into_value.transpose(1, 2)
        return attn.o_proj(out.transpose(1, 2).reshape(batch, length, -1)), None

    return forward


def _low_rank_query(attn: Any, hidden: Tensor) -> Tensor:
    return cast(Tensor, attn.q_b_proj(attn.q_a_layernorm(attn.q_a_proj(hidden))))
