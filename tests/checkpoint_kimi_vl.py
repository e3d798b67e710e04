"""A tiny random Kimi-VL in the layout that the hub's files have: tensor names, shards, settings, tiktoken vocabulary.

Nothing of the class that will load it is used here.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from modes_cli.models.checkpoint import REFERENCE_FOLDER

HIDDEN, LAYERS, DENSE_LAYERS, EXPERTS, TOP_K = 64, 4, 1, 16, 4
INTERMEDIATE, EXPERT_INTERMEDIATE, SHARED = 96, 32, 2
HEADS, LATENT, NOPE, ROPE, VALUE = 4, 16, 16, 8, 12
VISION, VISION_HEADS, VISION_LAYERS, VISION_INTERMEDIATE, TABLE, PATCH = 32, 2, 2, 48, 8, 14
SHARDS = 3
RESERVED = 256
# Names of ids after the vocabulary, as in the hub's file; the ids between them are reserved.
NAMES = {
    0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>", 6: "<|start_header_id|>",
    7: "<|end_header_id|>", 9: "[EOT]", 10: "<|im_system|>", 17: "<|im_middle|>", 18: "<|media_start|>",
    19: "<|media_content|>", 20: "<|media_end|>", 21: "<|media_pad|>", 254: "[UNK]", 255: "[PAD]",
}  # fmt: skip
TEMPLATE = (
    "{%- for message in messages -%}{%- if loop.first and message['role'] != 'system' -%}"
    "{{ '<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>' }}{%- endif -%}"
    "{{ '<|im_' + message['role'] + '|>' + message['role'] + '<|im_middle|>' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{ '<|media_start|>image<|media_content|><|media_pad|><|media_end|>' }}"
    "{%- else -%}{{ part['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}{{ '<|im_end|>' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_assistant|>assistant<|im_middle|>' }}{%- endif -%}"
)


def vocabulary() -> list[bytes]:
    """The tokens of the built-in model's tokenizer without its special ones, by rank: all bytes, then what they merge to."""
    tree = json.loads((REFERENCE_FOLDER / "tokenizer.json").read_text("utf-8"))
    special = {token["content"] for token in tree["added_tokens"]}
    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
    by_id = sorted((id, token) for token, id in tree["model"]["vocab"].items() if token not in special)
    return [bytes(byte_of[char] for char in token) for _, token in by_id]


def token_ids() -> dict[str, int]:
    first = len(vocabulary())
    return {name: first + offset for offset, name in NAMES.items()}


def config(dtype: str = "float32") -> dict[str, Any]:
    ids = token_ids()
    text = {
        "vocab_size": len(vocabulary()) + RESERVED, "max_position_embeddings": 1024, "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "moe_intermediate_size": EXPERT_INTERMEDIATE, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "n_shared_experts": SHARED, "n_routed_experts": EXPERTS,
        "ep_size": 1, "routed_scaling_factor": 2.446, "kv_lora_rank": LATENT, "q_lora_rank": None, "qk_rope_head_dim": ROPE,
        "v_head_dim": VALUE, "qk_nope_head_dim": NOPE, "topk_method": "noaux_tc", "n_group": 1, "topk_group": 1,
        "num_experts_per_tok": TOP_K, "moe_layer_freq": 1, "first_k_dense_replace": DENSE_LAYERS, "norm_topk_prob": True,
        "scoring_func": "sigmoid", "aux_loss_alpha": 0.001, "seq_aux": True, "hidden_act": "silu", "initializer_range": 0.02,
        "rms_norm_eps": 1e-05, "pretraining_tp": 1, "use_cache": True, "rope_theta": 800000.0, "rope_scaling": None,
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": ids["[BOS]"], "pad_token_id": ids["[PAD]"],
        "eos_token_id": ids["[EOS]"], "torch_dtype": dtype, "tie_word_embeddings": False,
    }  # fmt: skip
    vision = {
        "model_type": "moonvit", "patch_size": PATCH, "num_attention_heads": VISION_HEADS, "num_hidden_layers": VISION_LAYERS,
        "hidden_size": VISION, "intermediate_size": VISION_INTERMEDIATE, "init_pos_emb_height": TABLE,
        "init_pos_emb_width": TABLE, "merge_kernel_size": [2, 2], "torch_dtype": dtype,
    }  # fmt: skip
    code = {"AutoConfig": "configuration_kimi_vl.KimiVLConfig", "AutoModel": "modeling_kimi_vl.KimiVLForConditionalGeneration"}
    return {
        "architectures": ["KimiVLForConditionalGeneration"],
        "auto_map": {**code, "AutoModelForCausalLM": code["AutoModel"]},
        "vision_config": vision,
        "text_config": text,
        "ignore_index": -100,
        "media_placeholder_token_id": ids["<|media_pad|>"],
        "torch_dtype": dtype,
        "transformers_version": "4.50.3",
        "tie_word_embeddings": False,
        "vocab_size": text["vocab_size"],
        "model_type": "kimi_vl",
    }


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of the files."""
    patch = "vision_tower.patch_embed"
    yield from _linear(f"{patch}.proj", (VISION, 3, PATCH, PATCH))
    yield f"{patch}.pos_emb.weight", (TABLE, TABLE, VISION)
    for n in range(VISION_LAYERS):
        block = f"vision_tower.encoder.blocks.{n}"
        yield from _linear(f"{block}.norm0", (VISION,))
        yield from _linear(f"{block}.norm1", (VISION,))
        yield from _linear(f"{block}.wqkv", (3 * VISION, VISION))
        yield from _linear(f"{block}.wo", (VISION, VISION))
        yield from _linear(f"{block}.mlp.fc0", (VISION_INTERMEDIATE, VISION))
        yield from _linear(f"{block}.mlp.fc1", (VISION, VISION_INTERMEDIATE))
    yield from _linear("vision_tower.encoder.final_layernorm", (VISION,))
    yield from _linear("multi_modal_projector.pre_norm", (VISION,))
    yield from _linear("multi_modal_projector.linear_1", (4 * VISION, 4 * VISION))
    yield from _linear("multi_modal_projector.linear_2", (HIDDEN, 4 * VISION))
    words = len(vocabulary()) + RESERVED
    yield "language_model.model.embed_tokens.weight", (words, HIDDEN)
    for n in range(LAYERS):
        layer = f"language_model.model.layers.{n}"
        yield f"{layer}.input_layernorm.weight", (HIDDEN,)
        yield f"{layer}.self_attn.q_proj.weight", (HEADS * (NOPE + ROPE), HIDDEN)
        yield f"{layer}.self_attn.kv_a_proj_with_mqa.weight", (LATENT + ROPE, HIDDEN)
        yield f"{layer}.self_attn.kv_a_layernorm.weight", (LATENT,)
        yield f"{layer}.self_attn.kv_b_proj.weight", (HEADS * (NOPE + VALUE), LATENT)
        yield f"{layer}.self_attn.o_proj.weight", (HIDDEN, HEADS * VALUE)
        yield f"{layer}.self_attn.rotary_emb.inv_freq", (ROPE // 2,)
        yield f"{layer}.post_attention_layernorm.weight", (HIDDEN,)
        if n < DENSE_LAYERS:
            yield from _gated(f"{layer}.mlp", INTERMEDIATE)
            continue
        yield f"{layer}.mlp.gate.weight", (EXPERTS, HIDDEN)
        yield f"{layer}.mlp.gate.e_score_correction_bias", (EXPERTS,)
        for expert in range(EXPERTS):
            yield from _gated(f"{layer}.mlp.experts.{expert}", EXPERT_INTERMEDIATE)
        yield from _gated(f"{layer}.mlp.shared_experts", SHARED * EXPERT_INTERMEDIATE)
    yield "language_model.model.norm.weight", (HIDDEN,)
    yield "language_model.lm_head.weight", (words, HIDDEN)


def _linear(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _gated(name: str, size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.gate_proj.weight", (size, HIDDEN)
    yield f"{name}.up_proj.weight", (size, HIDDEN)
    yield f"{name}.down_proj.weight", (HIDDEN, size)


def _value(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    drawn = torch.randn(shape, generator=generator)
    if name.endswith("pos_emb.weight"):
        return drawn
    if len(shape) > 1:
        return drawn / drawn[0].numel() ** 0.5
    return 0.05 * drawn if name.endswith("bias") else 1 + 0.1 * drawn  # the rest are norms


def write_kimi_vl(folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """A dense layer, then three with 16 experts, 4 for each token, and 2 shared ones; a tower of two blocks."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes():
        value = _value(name, shape, generator)
        tensors[name] = value if name.endswith("e_score_correction_bias") else value.to(dtype)
    names, weight_map = list(tensors), {}
    for number in range(SHARDS):  # cut where it falls, also inside a layer's experts
        file = f"model-{number + 1}-of-{SHARDS}.safetensors"
        part = names[len(names) * number // SHARDS : len(names) * (number + 1) // SHARDS]
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    _write(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})
    _write(folder / "config.json", config(str(dtype).removeprefix("torch.")))
    write_processor(folder)
    return folder


def write_processor(folder: Path) -> None:
    """The settings and vocabulary files of the hub's processor."""
    ids = token_ids()
    code = "processing_kimi_vl.KimiVLProcessor"
    image = {"auto_map": {"AutoProcessor": code, "AutoImageProcessor": "image_processing_kimi_vl.KimiVLImageProcessor"}}
    sizes = {"in_token_limit": 4096, "patch_size": PATCH, "num_pooled_tokens": 1024, "merge_kernel_size": [2, 2]}
    values = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "pad_input": True}
    kind = {"image_processor_type": "KimiVLImageProcessor"}
    _write(folder / "preprocessor_config.json", {**image, **sizes, **values, **kind})
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings = {
        "added_tokens_decoder": {str(id): {"content": name, **flags} for name, id in ids.items()},
        "additional_special_tokens": [NAMES[n] for n in (2, 3, 4, 6, 7, 9, 10, 17)],
        "auto_map": {"AutoTokenizer": ["tokenization_moonshot.TikTokenTokenizer", None]},
        "bos_token": "[BOS]",
        "clean_up_tokenization_spaces": False,
        "eos_token": "[EOS]",
        "extra_special_tokens": {},
        "model_max_length": 1048576,
        "pad_token": "[PAD]",
        "tokenizer_class": "TikTokenTokenizer",
        "unk_token": "[UNK]",
    }
    _write(folder / "tokenizer_config.json", settings)
    ends = {"bos_token_id": ids["[BOS]"], "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["[PAD]"]}
    _write(folder / "generation_config.json", ends)
    (folder / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(vocabulary())]
    (folder / "tiktoken.model").write_text("\n".join(lines) + "\n", "utf-8")


def _write(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2), "utf-8")
