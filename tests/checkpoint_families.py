"""Tiny random checkpoints of further families as their files on the hub are: names, prefixes and orientation of tensors, one
matrix per expert where the hub has that, several files with an index, and parts of a model that are not used here.

Tokenizer and image processor settings are the built-in model's under the family's own names for the marks of an image.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from modes_cli.models.checkpoint import REFERENCE_FOLDER
from tests.checkpoints import reference_config
from tests.families import spread
from tests.hub_files import Tensors, as_it_is, first_and_second, one_by_one, shared_numbering, thinker_prefix, write_sharded

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 16, 4, 64, 32
START, END, IMAGE, VIDEO, FIRST_NEW = 3, 4, 5, 6, 416  # token ids; new tokens come after the built-in model's
VOCABULARY = FIRST_NEW + 8
_PIXELS = {"size": {"shortest_edge": 1024, "longest_edge": 1024}, "patch_size": 4, "merge_size": 2}  # 32 x 32: 16 tokens


@dataclass(frozen=True)
class Family:
    """How to write one.

    Attributes:
        config: config.json.
        model: its class in transformers.
        hub: a tensor in memory -> the tensors of the hub's files.
        marks: what tokens 3 to 6 (image start, image end, image, video) and those from FIRST_NEW on are called.
        processor: processor_config.json, preprocessor_config.json; None where transformers' own needs torchvision.
        names: what the tokenizer calls some of the marks.
        extra: tensors of the files that the model has no use for.
    """

    config: dict[str, Any]
    model: str
    hub: Callable[[str, Tensor], Tensors]
    marks: tuple[str, ...]
    processor: tuple[dict[str, Any], dict[str, Any]] | None
    names: dict[str, str]
    extra: tuple[str, ...] = ()

    def made(self) -> Any:
        kind = type(self.settings())
        config = kind(**{key: value for key, value in self.config.items() if key not in ("architectures", "model_type")})
        return getattr(transformers, self.model)(getattr(config, "thinker_config", config))

    def settings(self) -> Any:
        return transformers.CONFIG_MAPPING[self.config["model_type"]]()


def write_family(folder: Path, name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """A checkpoint folder of one of FAMILIES. Without processor settings where `processor` is None."""
    family = FAMILIES[name]()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(family.config, indent=2))
    torch.manual_seed(seed)  # for what `spread` leaves as it is made
    model = spread(family.made(), seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "e_score_correction_bias" in key:
                parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(seed + 1))
    tensors = {k: v for key, value in model.state_dict().items() for k, v in family.hub(key, value.to(_kept(key, dtype)))}
    tensors |= {key: torch.zeros(2, 2, dtype=dtype) for key in family.extra}
    write_sharded(folder, tensors)
    _write_tokenizer(folder, family)
    shutil.copy(REFERENCE_FOLDER / "generation_config.json", folder / "generation_config.json")
    return folder


def _kept(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if "correction_bias" in name else dtype


# -- text and vision configurations -------------------------------------------------------------------------------------


def _text(**own: Any) -> dict[str, Any]:
    reference = reference_config()["text_config"]
    common = {"eos_token_id": reference["eos_token_id"], "pad_token_id": reference["pad_token_id"], "bos_token_id": None}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    return {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, **common, **heads, "num_hidden_layers": 4, **own}


def _rope(**more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, **more}


_TOWER = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "patch_size": 4, "spatial_merge_size": 2}


def glm4v_moe() -> Family:
    experts = {
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "moe_intermediate_size": INTERMEDIATE,
        "num_experts_per_tok": TOP_K,
    }
    router = {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.5, "first_k_dense_replace": 1, "norm_topk_prob": True}
    rope = _rope(partial_rotary_factor=0.5, mrope_section=[2, 1, 1])
    config = {
        "architectures": ["Glm4vMoeForConditionalGeneration"],
        "model_type": "glm4v_moe",
        "text_config": _text(model_type="glm4v_moe_text", intermediate_size=96, rope_parameters=rope, **experts, **router),
        "vision_config": {**_TOWER, "temporal_patch_size": 2, "image_size": 32, "out_hidden_size": HIDDEN, "in_channels": 3},
        "tie_word_embeddings": False,
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "image_start_token_id": START,
        "image_end_token_id": END,
        "video_start_token_id": FIRST_NEW,
        "video_end_token_id": FIRST_NEW + 1,
    }
    marks = ("<|begin_of_image|>", "<|end_of_image|>", "<|image|>", "<|video|>", "<|begin_of_video|>", "<|end_of_video|>")
    processor = _processor("Glm4vProcessor", "Glm4vImageProcessor", temporal_patch_size=2)
    return Family(config, "Glm4vMoeForConditionalGeneration", one_by_one, marks, processor, {})


def qwen3_5_moe() -> Family:
    """Three layers of linear attention and one of full attention; experts are fused on the hub."""
    experts = {"num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "moe_intermediate_size": INTERMEDIATE}
    linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    layers = {"layer_types": ["linear_attention"] * 3 + ["full_attention"], "linear_conv_kernel_dim": 4, "head_dim": 32}
    rope = _rope(mrope_section=[2, 1, 1], mrope_interleaved=True, partial_rotary_factor=0.25)
    text = _text(
        model_type="qwen3_5_moe_text", shared_expert_intermediate_size=32, rope_parameters=rope, **experts, **linear, **layers
    )
    tower = {
        **_TOWER,
        "temporal_patch_size": 2,
        "out_hidden_size": HIDDEN,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [],
    }
    config = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "text_config": text,
        "vision_config": tower,
        "tie_word_embeddings": False,
        **_qwen_ids(),
    }
    processor = _processor("Qwen3VLProcessor", "Qwen2VLImageProcessorFast", temporal_patch_size=2)
    return Family(config, "Qwen3_5MoeForConditionalGeneration", as_it_is, _QWEN, processor, {}, ("mtp.fc.weight",))


def qwen3_omni_moe() -> Family:
    """Its thinker: what turns text, images and sound into text. The files hold the speaking part as well."""
    experts = {
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "moe_intermediate_size": INTERMEDIATE,
        "norm_topk_prob": True,
    }
    rope = _rope(mrope_section=[4, 2, 2], mrope_interleaved=True)
    text = _text(
        model_type="qwen3_omni_moe_text",
        head_dim=16,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        rope_parameters=rope,
        **experts,
    )
    tower = {
        **_TOWER,
        "temporal_patch_size": 2,
        "out_hidden_size": HIDDEN,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    audio = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "num_mel_bins": 32}
    audio |= {"downsample_hidden_size": 16, "output_dim": HIDDEN, "n_window": 50, "max_source_positions": 64}
    thinker = {
        "model_type": "qwen3_omni_moe_thinker",
        "text_config": text,
        "vision_config": tower,
        "audio_config": audio,
        "audio_token_id": FIRST_NEW,
        "audio_start_token_id": FIRST_NEW + 1,
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
    }
    config = {
        "architectures": ["Qwen3OmniMoeForConditionalGeneration"],
        "model_type": "qwen3_omni_moe",
        "enable_audio_output": True,
        "thinker_config": thinker,
    }
    marks = (*_QWEN, "<|audio_pad|>", "<|audio_start|>", "<|audio_end|>")
    names = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "audio_token": "<|audio_pad|>",
        "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
        "audio_bos_token": "<|audio_start|>",
        "audio_eos_token": "<|audio_end|>",
    }
    extra = ("talker.model.norm.weight", "code2wav.decoder.0.conv.weight")
    own, pixels = _processor("Qwen3OmniMoeProcessor", "Qwen2VLImageProcessorFast", temporal_patch_size=2)
    sound = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 32, "sampling_rate": 16000, "hop_length": 160}
    processor = (own, {**pixels, **sound, "chunk_length": 1, "n_fft": 400, "padding_value": 0.0})
    return Family(config, "Qwen3OmniMoeThinkerForConditionalGeneration", thinker_prefix, marks, processor, names, extra)


def ernie4_5_vl_moe() -> Family:
    """A dense layer, then three with 16 text experts and 16 narrower vision experts."""
    experts = {
        "moe_num_experts": EXPERTS,
        "moe_k": TOP_K,
        "moe_num_shared_experts": 1,
        "moe_intermediate_size": [INTERMEDIATE, 16],
    }
    rope = _rope(mrope_section=[3, 3, 2])
    config = {
        "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
        "model_type": "ernie4_5_vl_moe",
        "text_config": _text(
            model_type="ernie4_5_vl_moe_text", intermediate_size=96, rope_parameters=rope, tie_word_embeddings=False, **experts
        ),
        "vision_config": {**_TOWER, "in_channels": 3},
        "tie_word_embeddings": False,
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "image_start_token_id": START,
        "image_end_token_id": END,
        "video_start_token_id": FIRST_NEW,
        "video_end_token_id": FIRST_NEW + 1,
    }
    image, video = ("<|IMAGE_START|>", "<|IMAGE_END|>"), ("<|VIDEO_START|>", "<|VIDEO_END|>")
    names = {"image_token": "<|IMAGE_PLACEHOLDER|>", "image_start_token": image[0], "image_end_token": image[1]}
    names |= {"video_token": "<|VIDEO_PLACEHOLDER|>", "video_start_token": video[0], "video_end_token": video[1]}
    marks = (*image, "<|IMAGE_PLACEHOLDER|>", "<|VIDEO_PLACEHOLDER|>", *video)
    processor = _processor("Ernie4_5_VLMoeProcessor", "Ernie4_5_VLMoeImageProcessor")
    return Family(config, "Ernie4_5_VLMoeForConditionalGeneration", shared_numbering, marks, processor, names)


def llama4() -> Family:
    """Every second layer has experts, one of 16 for each token; no rotary embedding in the last."""
    experts = {"num_local_experts": EXPERTS, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2}
    sizes = {"intermediate_size": INTERMEDIATE, "intermediate_size_mlp": 96, "head_dim": 16, "attention_chunk_size": 16}
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128, "image_size": 32}
    tower |= {
        "vision_output_dim": 32,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
        "patch_size": 4,
        "rope_theta": 10000,
    }
    config = {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "text_config": _text(model_type="llama4_text", rope_parameters=_rope(), **experts, **sizes),
        "vision_config": {"model_type": "llama4_vision_model", "pixel_shuffle_ratio": 0.5, **tower},
        "tie_word_embeddings": False,
        "image_token_index": IMAGE,
        "boi_token_index": START,
        "eoi_token_index": END,
    }
    marks = ("<|image_start|>", "<|image_end|>", "<|patch|>", "<|image|>")
    return Family(config, "Llama4ForConditionalGeneration", as_it_is, marks, None, {})


def aria() -> Family:
    """Its processor makes images of 980 x 980; in patches as large as these they are 49, which become 4 tokens."""
    experts = {"moe_num_experts": EXPERTS, "moe_topk": TOP_K, "moe_num_shared_experts": 2, "intermediate_size": INTERMEDIATE}
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = {
        "architectures": ["AriaForConditionalGeneration"],
        "model_type": "aria",
        "text_config": _text(model_type="aria_text", head_dim=16, rope_parameters=_rope(), **experts),
        "vision_config": {"model_type": "idefics3_vision", "image_size": 980, "patch_size": 140, **tower},
        "projector_patch_to_query_dict": {"49": 4, "9": 2},
        "image_token_index": IMAGE,
        "tie_word_embeddings": False,
    }
    marks = ("<fim_prefix>", "<fim_suffix>", "<|img|>", "<unused>")
    own = {"size_conversion": {"490": 2, "980": 4}, "processor_class": "AriaProcessor"}
    pixels = {"image_processor_type": "AriaImageProcessor", "max_image_size": 980, "min_image_size": 336, "split_image": False}
    processor = (own, {**pixels, "processor_class": "AriaProcessor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    return Family(config, "AriaForConditionalGeneration", first_and_second, marks, processor, {"image_token": "<|img|>"})


FAMILIES: dict[str, Callable[[], Family]] = {
    "glm4v_moe": glm4v_moe,
    "qwen3_5_moe": qwen3_5_moe,
    "qwen3_omni_moe": qwen3_omni_moe,
    "ernie4_5_vl_moe": ernie4_5_vl_moe,
    "llama4": llama4,
    "aria": aria,
}

_QWEN = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def _qwen_ids() -> dict[str, int]:
    return {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}


def _processor(kind: str, images: str, **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    scale = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return {"processor_class": kind}, {"image_processor_type": images, "processor_class": kind, **_PIXELS, **scale, **more}


def _write_tokenizer(folder: Path, family: Family) -> None:
    tokenizer = json.loads((REFERENCE_FOLDER / "tokenizer.json").read_text("utf-8"))
    numbers = [*range(START, VIDEO + 1), *range(FIRST_NEW, VOCABULARY)]
    marks = dict(zip(numbers, family.marks, strict=False))
    vocabulary = tokenizer["model"]["vocab"]
    for token in tokenizer["added_tokens"]:
        if token["id"] in marks:
            vocabulary.pop(token["content"], None)
            token["content"] = marks[token["id"]]
    known = {token["id"] for token in tokenizer["added_tokens"]}
    settings = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"] += [{"id": i, "content": mark, **settings} for i, mark in marks.items() if i not in known]
    vocabulary |= {mark: number for number, mark in marks.items()}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    written: dict[str, dict[str, Any]] = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": 1024,
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>", *family.marks],
            "extra_special_tokens": family.names,
            **family.names,
        }
    }
    if family.processor is not None:
        written |= dict(zip(("processor_config.json", "preprocessor_config.json"), family.processor, strict=True))
    for name, content in written.items():
        (folder / name).write_text(json.dumps(content, indent=2))
    start, end, image = family.marks[:3]
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        "{{ '" + start + image + end + "' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


class SquareImages:
    """Stands in for Llama 4's processor, whose image part needs torchvision: one tile of 32 x 32 and 16 tokens for an image."""

    tokens = 16

    def __init__(self, folder: Path) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.image_processor = transformers.Qwen2VLImageProcessorPil()  # for its scale alone

    def apply_chat_template(self, chat: list[dict[str, Any]], **options: Any) -> dict[str, Tensor]:
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=options["add_generation_prompt"])
        mark = str(self.tokenizer.convert_ids_to_tokens(IMAGE))
        encoded = dict(self.tokenizer(text.replace(mark, mark * self.tokens), return_tensors="pt", add_special_tokens=False))
        images = [part["image"] for part in chat[0]["content"] if part["type"] == "image"]
        pixels = [torch.from_numpy(np.array(image.resize((32, 32)).convert("RGB"))) for image in images]
        if pixels:
            scaled = torch.stack(pixels).permute(0, 3, 1, 2).float() / 255
            mean, std = (
                torch.tensor(v)[:, None, None] for v in (self.image_processor.image_mean, self.image_processor.image_std)
            )
            encoded["pixel_values"] = (scaled - mean) / std
        return {name: encoded[name] for name in ("input_ids", "attention_mask", "pixel_values") if name in encoded}
