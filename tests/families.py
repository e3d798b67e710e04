"""Tiny random models of several families in memory, each with inputs of two samples: an image between text.

Weights are spread so that neither routing nor logits are degenerate; seeds are fixed.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from modes_cli.models.groups import TokenGroups

VOCABULARY = 512
IMAGE, VIDEO, START, END = 500, 501, 502, 503
TOKENS = TokenGroups(vision_ids=(IMAGE, VIDEO), special_ids=(START, END))
EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 16, 4, 64, 32

Inputs = dict[str, Tensor]
Made = tuple[Any, Inputs]

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_QWEN3_MOE: dict[str, Any] = {
    "moe_intermediate_size": INTERMEDIATE,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def spread(model: Any, seed: int = 0) -> Any:
    """Draw every matrix anew, wide enough that experts and tokens differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
        for name, buffer in model.named_buffers():
            if "correction_bias" in name:
                buffer.normal_(0, 0.05, generator=generator)
    return model.eval().requires_grad_(False)


def qwen3_vl_moe(layers: int = 4) -> Made:
    """The first layer is dense. The second sample is shorter and padded on the left."""
    text = {**_TEXT, **_QWEN3_MOE, "num_hidden_layers": layers, "mlp_only_layers": [0], "max_position_embeddings": 4096}
    text["rope_parameters"] = {**_ROPE, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=QWEN3_VISION, tie_word_embeddings=False, **_marks())
    grid = torch.tensor([[1, 4, 6], [1, 4, 4]])
    long = torch.cat([_words(4, 1), _image(6), _words(6, 2)])
    short = torch.cat([_words(3, 3), _image(4), _words(5, 4)])
    padding = len(long) - len(short)
    ids = torch.stack([long, torch.cat([torch.zeros(padding, dtype=torch.long), short])])
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    pixels = _noise(int(grid.prod(-1).sum()), 3 * 2 * 4 * 4)
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "image_grid_thw": grid}
    return spread(transformers.Qwen3VLMoeForConditionalGeneration(config)), {
        **inputs,
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


QWEN3_VISION: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": HIDDEN,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1],
}


def _internvl(text: dict[str, Any]) -> Made:
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.InternVLConfig(
        text_config={**_TEXT, "num_hidden_layers": 3, **text},
        vision_config={**vision, "image_size": [16, 16], "patch_size": [4, 4]},
        image_token_id=IMAGE,
        image_seq_length=4,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    return spread(transformers.InternVLForConditionalGeneration(config)), _square_images(4, 16)


def internvl_qwen3_moe() -> Made:
    return _internvl({**_QWEN3_MOE, "model_type": "qwen3_moe", "mlp_only_layers": []})


def internvl_gpt_oss() -> Made:
    own = {"model_type": "gpt_oss", "intermediate_size": INTERMEDIATE, "num_local_experts": EXPERTS, "sliding_window": 8}
    return _internvl({**own, "num_experts_per_tok": TOP_K, "rope_parameters": _ROPE})


def kimi_k25() -> Made:
    """DeepSeek-V3's text model: a dense first layer, shared experts, weights multiplied with 2.446."""
    latent = {"kv_lora_rank": 16, "q_lora_rank": None, "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 16}
    text = {key: value for key, value in _TEXT.items() if key != "head_dim"} | {"num_key_value_heads": 4, **latent}
    router = {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.446, "norm_topk_prob": True}
    experts = {
        "n_shared_experts": 2,
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "moe_intermediate_size": INTERMEDIATE,
    }
    layers = {"model_type": "deepseek_v3", "num_hidden_layers": 4, "first_k_dense_replace": 1}
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 4}
    config = transformers.Kimi_K25Config(
        text_config={**text, **router, **experts, **layers},
        vision_config={**vision, "pos_emb_height": 8, "pos_emb_width": 8, "pos_emb_time": 4},
        projection_hidden_size=32,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        tie_word_embeddings=False,
    )
    ids = torch.stack([torch.cat([_words(4, i), torch.full((6,), IMAGE), _words(6, 10 + i)]) for i in range(2)])
    inputs = {"pixel_values": _noise(48, 3, 4, 4), "image_grid_thw": torch.tensor([[1, 4, 6], [1, 4, 6]])}
    return spread(transformers.Kimi_K25ForConditionalGeneration(config)), {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        **inputs,
    }


def glm4v_moe() -> Made:
    text = {key: value for key, value in _TEXT.items() if key != "head_dim"}
    router = {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.5, "num_experts_per_tok": TOP_K}
    experts = {
        "n_shared_experts": 1,
        "n_routed_experts": EXPERTS,
        "moe_intermediate_size": INTERMEDIATE,
        "first_k_dense_replace": 1,
    }
    rope = {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
    config = transformers.Glm4vMoeConfig(
        text_config={**text, **router, **experts, "num_hidden_layers": 3, "rope_parameters": rope},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 64,
            "image_size": 16,
            "patch_size": 4,
            "out_hidden_size": 64,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=START,
        image_end_token_id=END,
        video_start_token_id=504,
        video_end_token_id=505,
        tie_word_embeddings=False,
    )
    ids = torch.stack([torch.cat([_words(4, i), _image(6), _words(6, 10 + i)]) for i in range(2)])
    inputs = {"pixel_values": _noise(48, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 4, 6], [1, 4, 6]])}
    common = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == IMAGE).int()}
    return spread(transformers.Glm4vMoeForConditionalGeneration(config)), {**common, **inputs}


def step3p7() -> Made:
    """Its experts are outside transformers' experts interface."""
    experts = {
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "moe_intermediate_size": INTERMEDIATE,
        "share_expert_dim": 32,
    }
    layers = {"num_hidden_layers": 3, "mlp_layer_types": ["dense", "sparse", "sparse"], "layer_types": ["full_attention"] * 3}
    config = transformers.Step3p7Config(
        text_config={**_TEXT, **experts, **layers, "moe_router_scaling_factor": 3.0, "pad_token_id": 0, "sliding_window": 16},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 4,
        },
        image_token_id=IMAGE,
    )
    return spread(transformers.Step3p7ForConditionalGeneration(config)), _square_images(4, 32)


def llama4() -> Made:
    """Its experts take one batch of all tokens for each of them instead of an index."""
    text = {**_TEXT, "intermediate_size": 32, "intermediate_size_mlp": 96, "num_hidden_layers": 2, "rope_parameters": _ROPE}
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "vision_output_dim": 32,
    }
    config = transformers.Llama4Config(
        text_config={**text, "num_experts_per_tok": 2, "num_local_experts": 8, "interleave_moe_layer_step": 2},
        vision_config={**vision, "image_size": 16, "patch_size": 4, "projector_input_dim": 32, "projector_output_dim": 32},
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )
    return transformers.Llama4ForConditionalGeneration(config), {}


FAMILIES: dict[str, Callable[[], Made]] = {
    "qwen3_vl_moe": qwen3_vl_moe,
    "internvl_qwen3_moe": internvl_qwen3_moe,
    "internvl_gpt_oss": internvl_gpt_oss,
    "kimi_k25": kimi_k25,
    "glm4v_moe": glm4v_moe,
    "step3p7": step3p7,
}


def _marks() -> dict[str, int]:
    return {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}


def _words(count: int, seed: int) -> Tensor:
    return torch.randint(10, 490, (count,), generator=torch.Generator().manual_seed(seed))


def _image(tokens: int) -> Tensor:
    return torch.tensor([START, *[IMAGE] * tokens, END])


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def _square_images(tokens: int, side: int) -> Inputs:
    ids = torch.stack([torch.cat([_words(4, i), torch.full((tokens,), IMAGE), _words(6, 10 + i)]) for i in range(2)])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": _noise(2, 3, side, side)}
