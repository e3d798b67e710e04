"""Tiny random checkpoints on disk that use the built-in model's tokenizer and image processor."""

import json
import shutil
from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import load_file, save_file

from modes_cli.data import open_source
from modes_cli.data.sample import DataSpec, Sample
from modes_cli.models.checkpoint import REFERENCE_FOLDER
from tests.families import spread

LAYERS, DENSE_LAYERS, EXPERTS, TOP_K, HIDDEN = 4, 1, 16, 4, 64
PROCESSOR_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template.jinja",
)


def reference_config() -> dict[str, Any]:
    return dict(json.loads((REFERENCE_FOLDER / "config.json").read_text("utf-8")))


def _text() -> dict[str, Any]:
    reference = reference_config()["text_config"]
    return {
        "vocab_size": reference["vocab_size"],
        "eos_token_id": reference["eos_token_id"],
        "pad_token_id": reference["pad_token_id"],
        "bos_token_id": None,
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
    }


def _moe() -> dict[str, Any]:
    experts = {"num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "moe_intermediate_size": 32, "norm_topk_prob": True}
    return {**experts, "decoder_sparse_step": 1, "mlp_only_layers": list(range(DENSE_LAYERS))}


def _multimodal(text: dict[str, Any]) -> dict[str, Any]:
    reference = reference_config()
    vision = {name: reference["vision_config"][name] for name in ("patch_size", "spatial_merge_size", "temporal_patch_size")}
    own = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": HIDDEN}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {
        "text_config": {**text, "rope_parameters": rope},
        "vision_config": {**vision, **own, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        "tie_word_embeddings": False,
        **{name: reference[name] for name in ids},
    }


def write_moe(folder: Path, seed: int = 0) -> Path:
    """Qwen3-VL-MoE: a dense layer, then three with 16 experts, 4 for each token."""
    config = transformers.Qwen3VLMoeConfig(**_multimodal({**_text(), **_moe()}))
    return save(transformers.Qwen3VLMoeForConditionalGeneration(config), folder, seed)


def write_dense(folder: Path) -> Path:
    """Qwen3-VL without experts."""
    config = transformers.Qwen3VLConfig(**_multimodal(_text()))
    return save(transformers.Qwen3VLForConditionalGeneration(config), folder, 0)


def write_text_moe(folder: Path) -> Path:
    """Qwen3-MoE: experts, but no image."""
    config = transformers.Qwen3MoeConfig(**_text(), **_moe(), tie_word_embeddings=False)
    return save(transformers.Qwen3MoeForCausalLM(config), folder, 0)


def save(model: Any, folder: Path, seed: int) -> Path:
    """A random model under the built-in model's tokenizer and image processor."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in PROCESSOR_FILES:
        if (REFERENCE_FOLDER / name).exists():
            shutil.copy(REFERENCE_FOLDER / name, folder / name)
    spread(model, seed).save_pretrained(folder)
    shutil.copy(REFERENCE_FOLDER / "generation_config.json", folder / "generation_config.json")
    return folder


def in_shards(folder: Path) -> Path:
    """Write the weights of a checkpoint again, as two files and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {name: f"model-{1 + number % 2:05d}-of-00002.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in sorted(set(where.values())):
        save_file({name: tensor for name, tensor in tensors.items() if where[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def small_samples(count: int, *, seed: int = 0, text_only: bool = False) -> list[Sample]:
    """The first DigitsVQA samples of the validation split."""
    return list(open_source(DataSpec("digits", "validation", count, seed), text_only=text_only))
