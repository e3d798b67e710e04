"""Kimi-K2.5's processor for images. transformers' own needs torchvision; this one needs Pillow, and has no video part."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.models.kimi_k25.processing_kimi_k25 import Kimi_K25Processor
from transformers.processing_utils import ImagesKwargs, ProcessorMixin

# How the hub's files call what transformers' processor calls otherwise.
_HUB_FIELDS = {
    "patch_size": "patch_size",
    "merge_kernel_size": "merge_size",
    "in_patch_limit": "max_patches",
    "image_mean": "image_mean",
    "image_std": "image_std",
}


class KimiImageKwargs(ImagesKwargs, total=False):
    """max_patches: of an image; patch_size: pixels of a side; merge_size: patches of a side that become one token."""

    max_patches: int
    patch_size: int
    merge_size: int


class KimiImageProcessorPil(PilBackend):
    """Images at their own size: made smaller where they have too many patches, then padded to whole tokens.

    `size.max_height` is the most patches of one side. Gives `pixel_values` [N, 3, patch, patch] in rows and columns, and
    `image_grid_thw` [images, 3].
    """

    do_resize = True
    resample = PILImageResampling.BICUBIC
    size = {"max_height": 512, "max_width": 512}  # noqa: RUF012  (as every image processor has it)
    max_patches = 16384
    do_rescale = True
    do_normalize = True
    image_mean = [0.5, 0.5, 0.5]  # noqa: RUF012
    image_std = [0.5, 0.5, 0.5]  # noqa: RUF012
    do_convert_rgb = True
    patch_size = 14
    merge_size = 2
    valid_kwargs = KimiImageKwargs
    model_input_names = ["pixel_values", "image_grid_thw"]  # noqa: RUF012

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """From a preprocessor_config.json, also one whose settings lie in `media_proc_cfg`, as in the hub's."""
        hub = image_processor_dict.get("media_proc_cfg")
        if isinstance(hub, dict):
            if hub.get("fixed_output_tokens") is not None:
                raise ValueError(f"fixed_output_tokens `{hub['fixed_output_tokens']}` is not supported")
            side = hub.get("patch_limit_on_one_side", 512)
            image_processor_dict = {own: hub[name] for name, own in _HUB_FIELDS.items() if name in hub}
            image_processor_dict["size"] = {"max_height": side, "max_width": side}
        return super().from_dict(image_processor_dict, **kwargs)

    def _preprocess(  # type: ignore[override]
        self,
        images: list[np.ndarray],
        do_resize: bool,
        size: SizeDict,
        resample: Any,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
        patch_size: int,
        merge_size: int,
        max_patches: int,
        return_tensors: Any = None,
        **_: Any,
    ) -> BatchFeature:
        if do_resize and size.max_height is None:
            raise ValueError(f"size `{size}` has no max_height, the most patches of a side")
        pixels, grids = [], []
        for image in images:
            if do_resize:
                fitted, whole = fit(image.shape[-2], image.shape[-1], patch_size, merge_size, max_patches, size.max_height or 0)
                image = self.resize(image, SizeDict(height=fitted[0], width=fitted[1]), resample)
                beyond = [(0, 0), *((0, all - some) for some, all in zip(fitted, whole, strict=True))]
                image = np.pad(image, beyond)  # black, on the right and at the bottom
            if do_rescale:
                image = self.rescale(image, rescale_factor)
            if do_normalize:
                image = self.normalize(image, image_mean, image_std)
            channels, height, width = image.shape
            rows, columns = height // patch_size, width // patch_size
            patches = image.reshape(channels, rows, patch_size, columns, patch_size).transpose(1, 3, 0, 2, 4)
            pixels.append(patches.reshape(rows * columns, channels, patch_size, patch_size).astype(np.float32))
            grids.append([1, rows, columns])
        data = {"pixel_values": torch.from_numpy(np.concatenate(pixels)), "image_grid_thw": torch.tensor(grids)}
        return BatchFeature(data=data, tensor_type=return_tensors)


def fit(
    height: int, width: int, patch_size: int, merge_size: int, max_patches: int, max_side: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width in pixels that an image is made smaller to, and what it is padded to then."""
    patches = max(1.0, height // patch_size) * max(1.0, width // patch_size)
    side = max_side * patch_size
    scale = min(1.0, math.sqrt(max_patches / patches), side / height, side / width)
    fitted = tuple(min(max(1, int(length * scale)), side) for length in (height, width))
    step = merge_size * patch_size
    whole = tuple(-(-length // step) * step for length in fitted)
    return (fitted[0], fitted[1]), (whole[0], whole[1])


class ImageTextKimiProcessor(Kimi_K25Processor):
    """Kimi-K2.5's processor without its video part, which needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **_: Any) -> None:
        for name, token in (("image", "<|media_pad|>"), ("video", "<|kimi_k25_video_placeholder|>")):
            token = getattr(tokenizer, f"{name}_token", None) or token
            setattr(self, f"{name}_token", token)
            setattr(self, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: Any = None, **kwargs: Any
    ) -> list[Any]:
        # transformers would look the image processor up by the name in the file, and find the one that needs torchvision.
        folder = pretrained_model_name_or_path
        return [KimiImageProcessorPil.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)]


def load_kimi_processor(folder: Path) -> ImageTextKimiProcessor:
    """The processor of a Kimi-K2.5 checkpoint or bundle folder."""
    processor: ImageTextKimiProcessor = ImageTextKimiProcessor.from_pretrained(folder)
    return processor
