"""Loading a checkpoint's processor, also where torchvision is not installed."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoProcessor, Qwen3VLMoeConfig, Qwen3VLProcessor
from transformers.processing_utils import ProcessorMixin

from modes_cli.errors import BadModel, first_line, is_memory
from modes_cli.models.families import register
from modes_cli.models.kimi_processor import load_kimi_processor


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
    register()
    if importlib.util.find_spec("torchvision") is None:
        # Without this, AutoProcessor quietly returns a bare tokenizer for Qwen3-VL checkpoints.
        AutoProcessor.register(Qwen3VLMoeConfig, ImageTextQwen3VLProcessor, exist_ok=True)
    try:
        if _is_qwen3_vl(folder) and importlib.util.find_spec("torchvision") is None:
            processor = _without_video(folder, trust_remote_code)
        elif _model_type(folder) == "kimi_k25" and importlib.util.find_spec("torchvision") is None:
            processor = load_kimi_processor(folder)
        elif (known := _class_with_video(folder)) is not None and importlib.util.find_spec("torchvision") is None:
            processor = image_text(known).from_pretrained(folder, trust_remote_code=trust_remote_code)
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
    return _model_type(folder) in ("qwen3_vl_moe", "qwen3_vl")


def _model_type(folder: Path) -> Any:
    try:
        return json.loads((folder / "config.json").read_text()).get("model_type")
    except (OSError, ValueError):
        return None


def _without_video(folder: Path, trust_remote_code: bool) -> Any:
    return ImageTextQwen3VLProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)


class _NoVideo(ProcessorMixin):
    """Stands between a processor's class and `ProcessorMixin`, and takes the video processor out of what passes."""

    _parts: tuple[str, ...] = ()  # all of the class's, in the order of its arguments

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = {**dict(zip(self._parts, args, strict=False)), **kwargs}
        given.pop("video_processor", None)
        super().__init__(**given)

    @classmethod
    def get_attributes(cls) -> list[str]:
        return [part for part in cls._parts if part != "video_processor"]

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        settings = {name: value for name, value in processor_dict.items() if name != "video_processor"}
        given = iter(args)
        every = [None if part == "video_processor" else next(given) for part in cls._parts]
        return super().from_args_and_dict(every, settings, **kwargs)


def image_text(known: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """A processor's class without its video part, which needs torchvision. Images and text give what they gave before."""
    return type(f"ImageText{known.__name__}", (known, _NoVideo), {"_parts": tuple(known.get_attributes())})


def _class_with_video(folder: Path) -> type[ProcessorMixin] | None:
    """The class that a checkpoint's settings name, if transformers has it and it takes a video processor."""
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        try:
            named = json.loads((folder / name).read_text("utf-8")).get("processor_class")
        except (OSError, ValueError, AttributeError):  # absent or damaged: loading says so
            continue
        found = getattr(transformers, named, None) if isinstance(named, str) else None
        if isinstance(found, type) and issubclass(found, ProcessorMixin):
            return found if "video_processor" in found.get_attributes() else None
    return None
