"""The second model: a small Kimi-VL. A dense layer, then layers of 32 routed experts and a shared one, routed as in
DeepSeek-V3: sigmoid scores, a bias that only decides the choice, normalised and scaled weights.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from reference.model import register_training_experts
from reference.packing import MERGE, PATCH, ChatLayout
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts, DeepseekV3TopkRouter

from modes_cli.data.digits_vqa import SIDE
from modes_cli.models.families import moonvit
from modes_cli.models.families.kimi_vl import KimiVLConfig, KimiVLForConditionalGeneration

HIDDEN, LAYERS, DENSE_LAYERS, EXPERTS, TOP_K, EXPERT_WIDTH = 128, 7, 1, 32, 6, 32
HEADS, LATENT, NOPE, ROPE, VALUE = 4, 64, 16, 16, 32
VISION, VISION_LAYERS, VISION_HEADS, VISION_WIDTH = 64, 3, 4, 128
SCALE = 2.446  # routed_scaling_factor of Kimi-VL-A3B

SPECIAL = (
    "[PAD]",
    "[BOS]",
    "[EOS]",
    "<|im_end|>",
    "<|im_user|>",
    "<|im_assistant|>",
    "<|im_system|>",
    "<|im_middle|>",
    "<|media_start|>",
    "<|media_content|>",
    "<|media_end|>",
    "<|media_pad|>",
)
# Kimi-VL's layout without its default system prompt, which would be longer than the questions.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{ '<|im_' + message['role'] + '|>' + message['role'] + '<|im_middle|>' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{ '<|media_start|>image<|media_content|><|media_pad|><|media_end|>' }}"
    "{%- else -%}{{ part['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}{{ '<|im_end|>' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_assistant|>assistant<|im_middle|>' }}{%- endif -%}"
)
LAYOUT = ChatLayout(
    before="<|im_user|>user<|im_middle|><|media_start|>image<|media_content|>",
    image="<|media_pad|>",
    after="<|media_end|>",
    middle="<|im_end|><|im_assistant|>assistant<|im_middle|>",
    end="<|im_end|>",
    axes=1,
)


def config_tree(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """config.json, with the keys that the hub's files have."""
    words, id_of = (len(tokenizer) + 31) // 32 * 32, tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": words, "max_position_embeddings": 1024, "hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN,
        "moe_intermediate_size": EXPERT_WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS, "n_shared_experts": 1, "n_routed_experts": EXPERTS, "ep_size": 1,
        "routed_scaling_factor": SCALE, "kv_lora_rank": LATENT, "q_lora_rank": None, "qk_rope_head_dim": ROPE,
        "v_head_dim": VALUE, "qk_nope_head_dim": NOPE, "topk_method": "noaux_tc", "n_group": 1, "topk_group": 1,
        "num_experts_per_tok": TOP_K, "moe_layer_freq": 1, "first_k_dense_replace": DENSE_LAYERS, "norm_topk_prob": True,
        "scoring_func": "sigmoid", "hidden_act": "silu", "initializer_range": 0.02, "rms_norm_eps": 1e-05, "use_cache": True,
        "rope_theta": 10000.0, "rope_scaling": None, "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": id_of("[BOS]"), "pad_token_id": id_of("[PAD]"), "eos_token_id": id_of("<|im_end|>"),
        "torch_dtype": "float32", "tie_word_embeddings": False,
    }  # fmt: skip
    side = SIDE // PATCH
    vision = {
        "model_type": "moonvit", "patch_size": PATCH, "num_attention_heads": VISION_HEADS, "num_hidden_layers": VISION_LAYERS,
        "hidden_size": VISION, "intermediate_size": VISION_WIDTH, "init_pos_emb_height": side, "init_pos_emb_width": side,
        "merge_kernel_size": [MERGE, MERGE], "torch_dtype": "float32",
    }  # fmt: skip
    return {
        "architectures": ["KimiVLForConditionalGeneration"],
        "model_type": "kimi_vl",
        "media_placeholder_token_id": id_of("<|media_pad|>"),
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vocab_size": words,
        "text_config": text,
        "vision_config": vision,
    }


def build_model(tokenizer: PreTrainedTokenizerFast) -> KimiVLForConditionalGeneration:
    """Randomly initialised; the widths of the distributions are those of the reference model."""
    model = KimiVLForConditionalGeneration(KimiVLConfig(**config_tree(tokenizer)))
    for module in model.modules():
        if isinstance(module, DeepseekV3Experts):
            module.gate_up_proj.data.normal_(0, 0.06)
            module.down_proj.data.normal_(0, 0.06)
        elif isinstance(module, DeepseekV3TopkRouter):
            module.weight.data.normal_(0, 0.05)
            module.e_score_correction_bias.zero_()
        elif isinstance(module, nn.Linear | nn.Conv2d):
            module.weight.data.normal_(0, 0.05)
            if module.bias is not None:
                module.bias.data.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.data.normal_(0, 0.15)
    for layer in model.language_model.model.layers:  # queries and keys are not normalised: as wide as if they were, or
        layer.self_attn.q_proj.weight.data.normal_(0, 0.125)  # attention stays flat, and looking up a cell is not learned
        layer.self_attn.kv_b_proj.weight.data.normal_(0, 0.125)
    model.vision_tower.patch_embed.pos_emb.weight.data.normal_(0, 0.25)
    register_training_experts(model)
    moonvit.MoonViTBlock.attention = _batched_attention
    return model


def _batched_attention(self: nn.Module, hidden: Tensor, cos: Tensor, sin: Tensor, lengths: list[int]) -> Tensor:
    """All images have one size here, so attention is one call for the batch instead of a loop over images."""
    query, key, value = self.wqkv(hidden).unflatten(-1, (3, self.heads, -1)).unbind(1)
    query, key = moonvit.rotate(query, cos, sin), moonvit.rotate(key, cos, sin)
    query, key, value = (t.unflatten(0, (len(lengths), -1)).transpose(1, 2) for t in (query, key, value))
    return self.wo(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2).flatten(0, 1))


def image_inputs(canvases: NDArray[np.uint8]) -> dict[str, Tensor]:
    """[B, 48, 48, 3] -> what the image processor makes of them (mean = std = 0.5): patches in reading order."""
    x = (canvases.astype(np.float32) / np.float32(255) - 0.5) / 0.5
    count, side = x.shape[0], SIDE // PATCH
    x = x.reshape(count, side, PATCH, side, PATCH, 3).transpose(0, 1, 3, 5, 2, 4)
    pixels = np.ascontiguousarray(x.reshape(count * side * side, 3, PATCH, PATCH))
    return {"pixel_values": torch.from_numpy(pixels), "image_grid_hws": torch.tensor([[side, side]] * count)}


def hub_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The weights under the names of the hub's files: one matrix for each expert, gate and up apart."""
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        match = re.fullmatch(r"(.+\.experts)\.(gate_up_proj|down_proj)", name)
        if match is None:
            found[name] = tensor.contiguous()
            continue
        for number, matrix in enumerate(tensor):
            parts = {"down_proj": matrix}
            if match[2] == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True))
            for part, value in parts.items():
                found[f"{match[1]}.{number}.{part}.weight"] = value.contiguous()
    return found


def state_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `hub_tensors`: what the class's `load_state_dict` takes."""
    found: dict[str, Tensor] = {}
    groups: dict[str, dict[str, list[Tensor]]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.+\.experts)\.(\d+)\.(\w+)\.weight", name)
        if match is None:
            found[name] = tensor
            continue
        parts = groups.setdefault(match[1], {part: [tensor] * EXPERTS for part in ("gate_proj", "up_proj", "down_proj")})
        parts[match[3]][int(match[2])] = tensor
    for prefix, parts in groups.items():
        halves = zip(parts["gate_proj"], parts["up_proj"], strict=True)
        found[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in halves])
        found[f"{prefix}.down_proj"] = torch.stack(parts["down_proj"])
    return found


def save(out: Path, model: nn.Module, tokenizer: PreTrainedTokenizerFast) -> None:
    """A complete folder in the layout of the hub's Kimi-VL, but for its tiktoken file: the tokenizer is a tokenizer.json."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = hub_tensors(model)
    save_file({name: tensors[name].clone() for name in sorted(tensors)}, out / "model.safetensors", {"format": "pt"})
    tokenizer.save_pretrained(out)
    image = {
        "image_processor_type": "KimiVLImageProcessor", "patch_size": PATCH, "in_token_limit": 4 * (SIDE // PATCH) ** 2,
        "merge_kernel_size": [MERGE, MERGE], "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "pad_input": True,
    }  # fmt: skip
    ends = {"bos_token_id": "[BOS]", "pad_token_id": "[PAD]", "eos_token_id": "<|im_end|>"}
    trees = {
        "config": config_tree(tokenizer),
        "preprocessor_config": image,
        "generation_config": {name: tokenizer.convert_tokens_to_ids(token) for name, token in ends.items()},
    }
    for name, tree in trees.items():
        (out / f"{name}.json").write_text(json.dumps(tree, indent=2) + "\n", "utf-8")
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, "utf-8")
