"""Loading a checkpoint's processor, also where torchvision is not installed."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, Qwen3VLMoeConfig, Qwen3VLProcessor
from transformers.processing_utils import ProcessorMixin

from modes_cli.errors import BadModel, first_line, is_memory


class ImageTextQwen3VLProcessor(Qwen3VLProcessor):
    """Qwen3-VL's processor without its video part, which needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **_: Any) -> None:
        for name, token in (
            ("image", "<|image_pad|>"),
            ("video", "<|video_pad|>"),
            ("vision_start", "<|vision_start|>"),
            ("vision_end", "<|vision_end|>"),
        ):
            setattr(self, f"{name}_token", token)
            setattr(self, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def load_processor(folder: Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The processor of a local checkpoint or bundle folder: image processor, tokenizer, chat template.

    Raises:
        BadModel: the folder has no processor files, or only a tokenizer's.
    """
    if importlib.util.find_spec("torchvision") is None:
        # Without this, AutoProcessor quietly returns a bare tokenizer for Qwen3-VL checkpoints.
        AutoProcessor.register(Qwen3VLMoeConfig, ImageTextQwen3VLProcessor, exist_ok=True)
    try:
        if _is_qwen3_vl(folder) and importlib.util.find_spec("torchvision") is None:
            processor = _without_video(folder, trust_remote_code)
        else:
            processor = AutoProcessor.from_pretrained(folder, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises nearly anything about settings that make no sense
        if is_memory(error):
            raise
        raise BadModel(
            f"`{folder}` has no usable processor: {type(error).__name__}: {first_line(error)}",
            hint="image processor and tokenizer files belong to a checkpoint",
        ) from error
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise BadModel(
            f"`{folder}` has only a `{type(processor).__name__}`, no image processor",
            hint="is this a text-only model? then add `--text-only`",
        )
    return processor


def _is_qwen3_vl(folder: Path) -> bool:
    try:
        return json.loads((folder / "config.json").read_text()).get("model_type") in ("qwen3_vl_moe", "qwen3_vl")
    except (OSError, ValueError):
        return False


def _without_video(folder: Path, trust_remote_code: bool) -> Any:
    return ImageTextQwen3VLProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
