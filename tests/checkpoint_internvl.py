"""Tiny random InternVL3.5 checkpoints as the hub has them (OpenGVLab/InternVL3_5-*-HF): sharded, with an index, prefixes of
the time they were written, and experts one by one below a Qwen3-MoE text model, fused below a GPT-OSS one."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from modes_cli.models.checkpoint import REFERENCE_FOLDER
from tests.checkpoints import reference_config

LAYERS, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, WINDOW = 2, 16, 4, 64, 32, 8
TEXTS = ("qwen3_moe", "gpt_oss")
TILE, PATCH = 24, 4  # pixels; a 48 x 48 picture becomes 4 tiles and a thumbnail
IMAGE = 5  # token id of <IMG_CONTEXT>
_MARKS = {3: "<img>", 4: "</img>", IMAGE: "<IMG_CONTEXT>", 6: "<video>"}
_ROLES = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
_CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\\n' }}{% elif part['type'] == 'video' %}{{ '<video>\\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# In memory -> in the hub's files; the first that fits.
_PREFIXES = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}


def write_internvl(folder: Path, text: str, dtype: torch.dtype = torch.float32, layers: int = LAYERS, seed: int = 0) -> Path:
    """A checkpoint folder. `text` is one of TEXTS; all layers have 16 experts, 4 for each token. The first of GPT-OSS has the
    sliding window.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = _config(text, dtype, layers)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    _write_processor(folder)
    model = transformers.InternVLForConditionalGeneration(transformers.AutoConfig.from_pretrained(folder))
    _draw(model, seed)
    _write_weights(folder, {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}, text)
    return folder


def _config(text: str, dtype: torch.dtype, layers: int) -> dict[str, Any]:
    reference = reference_config()["text_config"]
    name = str(dtype).removeprefix("torch.")
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "image_token_id": IMAGE,
        "image_seq_length": (TILE // PATCH // 2) ** 2,
        "downsample_ratio": 0.5,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "torch_dtype": name,
        "transformers_version": "4.55.0",
        "text_config": {
            "vocab_size": reference["vocab_size"],
            "eos_token_id": reference["eos_token_id"],
            "pad_token_id": reference["pad_token_id"],
            "hidden_size": HIDDEN,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 4096,
            "num_experts_per_tok": TOP_K,
            "tie_word_embeddings": False,
            "torch_dtype": name,
            **(_qwen3_moe() if text == "qwen3_moe" else _gpt_oss(layers)),
        },
        "vision_config": {
            "model_type": "internvl_vision",
            "hidden_size": 32,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "attention_bias": True,
            "hidden_act": "gelu",
            "image_size": [TILE, TILE],
            "patch_size": [PATCH, PATCH],
            "num_channels": 3,
            "norm_type": "layer_norm",
            "use_qk_norm": False,
            "use_mean_pooling": True,
            "use_absolute_position_embeddings": True,
            "layer_scale_init_value": 0.1,
            "torch_dtype": name,
        },
    }


def _qwen3_moe() -> dict[str, Any]:
    experts = {"num_experts": EXPERTS, "moe_intermediate_size": INTERMEDIATE, "norm_topk_prob": True}
    layers = {"decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False, "sliding_window": None}
    rope = {"rope_theta": 1000000, "rope_scaling": None}
    return {"model_type": "qwen3_moe", "intermediate_size": 96, "attention_bias": False, **experts, **layers, **rope}


def _gpt_oss(layers: int) -> dict[str, Any]:
    yarn = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
    return {
        "model_type": "gpt_oss",
        "intermediate_size": INTERMEDIATE,
        "num_local_experts": EXPERTS,
        "experts_per_token": TOP_K,
        "sliding_window": WINDOW,
        "layer_types": [("sliding_attention", "full_attention")[layer % 2] for layer in range(layers)],
        "attention_bias": True,
        "swiglu_limit": 7.0,
        "rms_norm_eps": 1e-05,
        "rope_theta": 150000,
        "rope_scaling": {**yarn, "original_max_position_embeddings": 128},
    }


def _draw(model: Any, seed: int) -> None:
    """Every weight anew, wide enough that experts, tokens and attention sinks make a difference."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "gate_up_proj_bias" in name:
                parameter.copy_(noise)  # some values reach the clamp of the activation
            elif name.endswith(("bias", "sinks")) or "_bias" in name:
                parameter.copy_(0.3 * noise if "sinks" not in name else 1.5 * noise)
            elif parameter.dim() >= 2:
                parameter.copy_(noise * (3.0 if "experts" in name else 1.0) * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * noise)
    model.eval()


def _hub_tensors(state: dict[str, Tensor], text: str) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in state.items():
        prefix = next(prefix for prefix in _PREFIXES if name.startswith(prefix))
        name = _PREFIXES[prefix] + name.removeprefix(prefix)
        if text == "gpt_oss" or ".experts." not in name:
            yield name, tensor.clone()
            continue
        experts, part = name.rsplit(".", 1)
        pieces = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
        for number, matrix in enumerate(tensor):
            for piece, rows in zip(pieces, matrix.chunk(len(pieces)), strict=True):
                yield f"{experts}.{number}.{piece}.weight", rows.clone()


def _write_weights(folder: Path, state: dict[str, Tensor], text: str) -> None:
    tensors = dict(_hub_tensors(state, text))
    names = list(tensors)
    cut = len(names) * 2 // 3  # in the middle of a layer
    weight_map = {}
    for number, part in enumerate((names[:cut], names[cut:]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _write_processor(folder: Path) -> None:
    tokenizer = json.loads((REFERENCE_FOLDER / "tokenizer.json").read_text("utf-8"))
    for token in tokenizer["added_tokens"]:
        token["content"] = _MARKS.get(token["id"], token["content"])
    vocabulary = tokenizer["model"]["vocab"]
    for name in [name for name, number in vocabulary.items() if number in _MARKS]:
        vocabulary[_MARKS[vocabulary.pop(name)]] = next(i for i, mark in _MARKS.items() if mark not in vocabulary)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    size = {"height": TILE, "width": TILE}
    pixels = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": 3}
    scale = {"rescale_factor": 1 / 255, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    tiles = {"crop_to_patches": False, "min_patches": 1, "max_patches": 12}
    common = {"processor_class": "InternVLProcessor", "size": size, **pixels, **scale}
    written: dict[str, dict[str, Any]] = {
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer",
            "processor_class": "InternVLProcessor",
            "model_max_length": 8192,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>", *_ROLES.values()],
            "extra_special_tokens": _ROLES,
            **_ROLES,
        },
        "preprocessor_config.json": {"image_processor_type": "GotOcr2ImageProcessorFast", **common, **tiles},
        "video_preprocessor_config.json": {"video_processor_type": "InternVLVideoProcessor", **common},
        "processor_config.json": {
            "processor_class": "InternVLProcessor",
            "image_seq_length": (TILE // PATCH // 2) ** 2,
        },
    }
    for name, content in written.items():
        (folder / name).write_text(json.dumps(content, indent=2))
    (folder / "chat_template.jinja").write_text(_CHAT)
    shutil.copy(REFERENCE_FOLDER / "generation_config.json", folder / "generation_config.json")
