"""A tiny random Kimi-K2.5 checkpoint as its files on the hub are: names of the published code, one matrix per expert,
query, key and value of the vision tower in one, several files with an index.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from modes_cli.models.checkpoint import REFERENCE_FOLDER
from tests.families import spread

LAYERS, DENSE_LAYERS, EXPERTS, TOP_K, HIDDEN = 3, 1, 16, 4, 64
LATENT, ROPE = 24, 8
TOKENS = {
    "<|image_pad|>": "<|media_pad|>",
    "<|video_pad|>": "<|kimi_k25_video_placeholder|>",
    "<|vision_start|>": "<|media_begin|>",
    "<|vision_end|>": "<|media_end|>",
}
IMAGE, VIDEO = 5, 6


def text_config(layers: int) -> dict[str, Any]:
    """DeepSeek-V3: a dense layer, then some with 16 experts in four groups, two of which a token may choose 4 from."""
    reference = json.loads((REFERENCE_FOLDER / "config.json").read_text("utf-8"))["text_config"]
    return {
        "model_type": "deepseek_v3",
        "vocab_size": reference["vocab_size"],
        "eos_token_id": reference["eos_token_id"],
        "pad_token_id": reference["pad_token_id"],
        "bos_token_id": None,
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "first_k_dense_replace": DENSE_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": LATENT,
        "q_lora_rank": 32,
        "qk_rope_head_dim": ROPE,
        "qk_nope_head_dim": 16,
        "v_head_dim": 12,
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "n_shared_experts": 2,
        "moe_intermediate_size": 32,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.446,
        "max_position_embeddings": 1024,
        "num_nextn_predict_layers": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
    }


def kimi_config(layers: int = LAYERS) -> Any:
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "patch_size": 4}
    return transformers.Kimi_K25Config(
        text_config=text_config(layers),
        vision_config={**vision, "pos_emb_height": 8, "pos_emb_width": 8, "pos_emb_time": 4},
        projection_hidden_size=32,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=3,
        vision_end_token_id=4,
        tie_word_embeddings=False,
    )


def write_kimi_k25(folder: Path, *, dtype: torch.dtype = torch.float32, layers: int = LAYERS, seed: int = 0) -> Path:
    config = kimi_config(layers)
    model = spread(transformers.Kimi_K25ForConditionalGeneration(config), seed)
    with torch.no_grad():
        table = model.model.vision_tower.patch_embed.pos_emb.position_embeddings
        table.normal_(0, 0.5, generator=torch.Generator().manual_seed(seed))
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms and biases, or a mistake in one would not be seen
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
    folder.mkdir(parents=True, exist_ok=True)
    config.dtype = str(dtype).removeprefix("torch.")
    config.architectures = ["Kimi_K25ForConditionalGeneration"]
    config.save_pretrained(folder)
    tensors = hub_tensors(model.state_dict(), heads=config.vision_config.num_attention_heads)
    write_sharded(folder, {name: cast(name, tensor, dtype) for name, tensor in tensors.items()}, 3)
    write_processor(folder)
    return folder


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The router's correction is float32 in every file."""
    return tensor if name.endswith("e_score_correction_bias") else tensor.to(dtype)


def hub_tensors(state: dict[str, Tensor], heads: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"(.+\.experts)\.(gate_up_proj|down_proj)", name)
        if match is None:
            found[_hub_name(name)] = tensor
            continue
        for number, matrix in enumerate(tensor):
            parts = {"down_proj": matrix}
            if match[2] == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True))
            for part, value in parts.items():
                found[f"{_hub_name(match[1])}.{number}.{part}.weight"] = value
    for name in [name for name in found if ".attn.q_proj." in name]:
        query, key, value = (found.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv")
        fused = torch.cat([_pairs(query, heads), _pairs(key, heads), value])
        found[name.replace("attn.q_proj", "wqkv")] = fused
    return found


def _hub_name(name: str) -> str:
    for pattern, hub in (
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.mm_projector\.in_proj\.", "mm_projector.proj.0."),
        (r"^model\.mm_projector\.out_proj\.", "mm_projector.proj.2."),
        (r"^model\.mm_projector\.", "mm_projector."),
        (r"^model\.vision_tower\.layers\.", "vision_tower.encoder.blocks."),
        (r"^model\.vision_tower\.final_layernorm\.", "vision_tower.encoder.final_layernorm."),
        (r"^model\.vision_tower\.patch_embed\.pos_emb\.position_embeddings$", "vision_tower.patch_embed.pos_emb.weight"),
        (r"^model\.vision_tower\.", "vision_tower."),
        (r"(blocks\.\d+)\.norm1\.", r"\1.norm0."),
        (r"(blocks\.\d+)\.norm2\.", r"\1.norm1."),
        (r"(blocks\.\d+)\.mlp\.fc1\.", r"\1.mlp.fc0."),
        (r"(blocks\.\d+)\.mlp\.fc2\.", r"\1.mlp.fc1."),
        (r"(blocks\.\d+)\.attn\.proj\.", r"\1.wo."),
    ):
        name = re.sub(pattern, hub, name)
    return name


def _pairs(tensor: Tensor, heads: int) -> Tensor:
    """Rows of a head from halves (all real parts, all imaginary ones) to pairs, as rotations of complex numbers want them."""
    half = tensor.shape[0] // heads // 2
    return tensor.reshape(heads, 2, half, -1).transpose(1, 2).reshape(tensor.shape)


def write_sharded(folder: Path, tensors: dict[str, Tensor], shards: int) -> None:
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        save_file({name: tensors[name].contiguous().clone() for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_processor(folder: Path) -> None:
    """The built-in model's tokenizer with Kimi's special tokens, and image settings as the hub's files have them."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        text = (REFERENCE_FOLDER / name).read_text("utf-8")
        for ours, kimi in TOKENS.items():
            text = text.replace(ours, kimi)
        (folder / name).write_text(text.replace("ImageTextQwen3VLProcessor", "Kimi_K25Processor"), "utf-8")
    shutil.copy(REFERENCE_FOLDER / "generation_config.json", folder / "generation_config.json")
    media = {
        "in_patch_limit": 144,
        "patch_size": 4,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "merge_kernel_size": 2,
        "fixed_output_tokens": None,
        "patch_limit_on_one_side": 16,
    }
    settings = {"image_processor_type": "Kimi_K25ImageProcessor", "media_proc_cfg": media}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
