"""The reference model's shape, and the two training-only changes that make it trainable on one CPU core."""

import torch
import torch.nn.functional as F
import transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe as qwen
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

HIDDEN, LAYERS, EXPERTS, TOP_K, EXPERT_WIDTH = 128, 8, 32, 8, 32


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLMoeForConditionalGeneration:
    """Randomly initialised. The vision tower is kept small, so that recognising digits is left to the decoder's experts."""
    token = tokenizer.convert_tokens_to_ids
    config = Qwen3VLMoeConfig(
        text_config={
            "vocab_size": (len(tokenizer) + 31) // 32 * 32,
            "hidden_size": HIDDEN,
            "intermediate_size": 2 * HIDDEN,
            "num_hidden_layers": LAYERS,
            "mlp_only_layers": [],
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 1024,
            "moe_intermediate_size": EXPERT_WIDTH,
            "num_experts": EXPERTS,
            "num_experts_per_tok": TOP_K,
            "decoder_sparse_step": 1,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
        },
        vision_config={
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_heads": 4,
            "in_channels": 3,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": HIDDEN,
            "num_position_embeddings": 144,
            "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    model = Qwen3VLMoeForConditionalGeneration(config)
    for module in model.modules():  # 0.02, the default, is too small for so narrow a net
        if isinstance(module, qwen.Qwen3VLMoeTextExperts):
            module.gate_up_proj.data.normal_(0, 0.06)
            module.down_proj.data.normal_(0, 0.06)
        elif isinstance(module, nn.Linear):
            module.weight.data.normal_(0, 0.05)
    model.model.visual.pos_embed.weight.data.normal_(0, 0.25)  # the default drowns positions under patch content
    model.model.visual.patch_embed.proj.weight.data.normal_(0, 0.05)
    model.model.language_model.embed_tokens.weight.data.normal_(0, 0.15)
    register_training_experts(model)
    qwen.Qwen3VLMoeVisionAttention.forward = _batched_vision_attention
    return model


def _experts(self: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Sorted dispatch. `self.limit` slots are computed; `self.drop` is the share of calls that lose all of them."""
    limit = getattr(self, "limit", TOP_K)
    if self.training and getattr(self, "drop", 0.0) > 0:  # whole rows of the batch lose this layer's routed experts
        rows = torch.rand(self.rows) < self.drop
        index = torch.where(rows.repeat_interleave(x.shape[0] // self.rows)[:, None], EXPERTS, index)
    if limit < index.shape[1]:  # the weakest go to the sentinel: sorted last and cut off; kept weights are not renormalised
        strongest = weights.sort(dim=-1, descending=True, stable=True).indices
        index = index.scatter(1, strongest[:, limit:], EXPERTS)
    order, slots = index.reshape(-1).sort()
    counts = torch.bincount(order, minlength=EXPERTS + 1).tolist()[:EXPERTS]
    slots = slots[: sum(counts)]
    if slots.numel() == 0:
        return torch.zeros_like(x)
    tokens = slots // index.shape[1]
    into, out_of = self.gate_up_proj.unbind(), self.down_proj.unbind()  # cheaper backward than indexing each time
    parts = [F.linear(rows, into[e]) for e, rows in enumerate(x[tokens].split(counts)) if len(rows)]
    gate, up = torch.cat(parts).chunk(2, -1)
    hidden = F.silu(gate) * up * weights.reshape(-1)[slots, None]
    parts = [F.linear(rows, out_of[e]) for e, rows in enumerate(hidden.split(counts)) if len(rows)]
    return torch.zeros_like(x).index_add_(0, tokens, torch.cat(parts))


ALL_EXPERTS_FUNCTIONS.register("reference_training", _experts)


def register_training_experts(model: PreTrainedModel) -> None:
    """Let the routed experts of `model` be computed by `_experts`."""
    model.set_experts_implementation("reference_training")


def _batched_vision_attention(
    self: nn.Module, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: object
) -> Tensor:
    """All images have one size here, so attention is one call for the batch instead of a loop over images."""
    length, images = hidden_states.shape[0], cu_seqlens.shape[0] - 1
    q, k, v = self.qkv(hidden_states).reshape(length, 3, self.num_heads, -1).permute(1, 0, 2, 3).unbind(0)
    q, k = qwen.apply_rotary_pos_emb_vision(q, k, *position_embeddings)
    q, k, v = (t.reshape(images, length // images, self.num_heads, -1).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, scale=self.scaling)
    return self.proj(out.transpose(1, 2).reshape(length, -1))


def experts_of(model: nn.Module) -> list[nn.Module]:
    """The routed experts of each layer that has them, of either model."""
    return [m for m in model.modules() if isinstance(m, qwen.Qwen3VLMoeTextExperts | DeepseekV3Experts)]
