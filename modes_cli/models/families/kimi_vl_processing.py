"""Kimi-VL's images and prompts, from the files that a checkpoint has, without its code."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_transforms import to_pil_image
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import ProcessorMixin

from modes_cli import files
from modes_cli.models.families.kimi_vl_tokenizer import SETTINGS_LIMIT, load_tokenizer, tokenizer_settings

IMAGE_TOKEN = "<|media_pad|>"
POSITIONS = 512  # the rotary embedding's rows and columns


class KimiVLImageProcessor(BaseImageProcessor):
    """Images as packed patches.

    An image of more patches than `in_token_limit` is shrunk (bicubic), filled up with black on the right and at the bottom
    (or, without `pad_input`, cropped around its centre) so that patches merge without a rest, and normalised.

    Args:
        patch_size: side of a patch in pixels.
        in_token_limit: patches of an image.
        merge_kernel_size: rows and columns of patches that become one token.
    """

    model_input_names = ["pixel_values", "image_grid_hws"]  # noqa: RUF012

    def __init__(
        self,
        patch_size: int = 14,
        pad_input: bool = True,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        in_token_limit: int = 4096,
        merge_kernel_size: Sequence[int] = (2, 2),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.patch_size, self.pad_input, self.in_token_limit = patch_size, pad_input, in_token_limit
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.merge_kernel_size = list(merge_kernel_size)

    def preprocess(self, images: Any, return_tensors: str | None = None, **_: Any) -> BatchFeature:
        """`pixel_values` [patches of all images, 3, patch, patch] float32 and `image_grid_hws` [images, 2] int64.

        Raises:
            ValueError: an image is smaller than a token, or too long.
        """
        flat: Any = make_flat_list_of_images(images)
        prepared = [self.patches(_rgb(image)) for image in flat]
        data = {
            "pixel_values": np.concatenate([patches for patches, _ in prepared]),
            "image_grid_hws": np.array([grid for _, grid in prepared], dtype=np.int64),
        }
        return BatchFeature(data, tensor_type=return_tensors)

    def patches(self, image: Image.Image) -> tuple[np.ndarray[Any, Any], tuple[int, int]]:
        """Patches [rows * columns, 3, patch, patch] in reading order, and (rows, columns)."""
        side = self.patch_size
        pixels: np.ndarray[Any, Any] = np.asarray(self.fit(image), dtype=np.float32) / np.float32(255)
        pixels = (pixels - np.array(self.image_mean, np.float32)) / np.array(self.image_std, np.float32)
        rows, columns = pixels.shape[0] // side, pixels.shape[1] // side
        cut = pixels.reshape(rows, side, columns, side, 3).transpose(0, 2, 4, 1, 3)
        return np.ascontiguousarray(cut.reshape(rows * columns, 3, side, side)), (rows, columns)

    def fit(self, image: Image.Image) -> Image.Image:
        """The image in a size that patches and tokens divide."""
        width, height = image.size
        count = (width // self.patch_size) * (height // self.patch_size)
        if count > self.in_token_limit:
            scale = math.sqrt(self.in_token_limit / count)
            width, height = int(width * scale), int(height * scale)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        across, down = (self.patch_size * count for count in reversed(self.merge_kernel_size))
        if self.pad_input:
            width, height = width + -width % across, height + -height % down
            left = top = 0
        else:
            left, top = (width % across) // 2, (height % down) // 2
            width, height = width - width % across, height - height % down
        if not width or not height:
            raise ValueError(f"an image of `{image.width}` x `{image.height}` pixels is smaller than a token")
        if max(width, height) // self.patch_size >= POSITIONS:
            raise ValueError(f"an image of `{width}` x `{height}` pixels has `{POSITIONS}` patches or more on a side")
        return image.crop((left, top, left + width, top + height))  # beyond the image: black


def _rgb(image: Any) -> Image.Image:
    picture: Image.Image = image if isinstance(image, Image.Image) else to_pil_image(image)
    return picture.convert("RGB")


class KimiVLProcessor(ProcessorMixin):
    """Prompts with images: every placeholder is repeated for each token of its image."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **_: Any) -> None:
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *_: Any, **__: Any) -> "KimiVLProcessor":
        """From a local folder with preprocessor_config.json, tokenizer_config.json, and tiktoken.model or tokenizer.json.

        Raises:
            ValueError, OSError: one of them is absent or damaged.
        """
        folder = Path(pretrained_model_name_or_path)
        return cls(KimiVLImageProcessor.from_pretrained(folder), load_tokenizer(folder), chat_template(folder))

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **_: Any) -> str:
        rows, columns = self.image_processor.merge_kernel_size
        patches = int(torch.as_tensor(image_inputs["image_grid_hws"][image_idx]).prod())
        return IMAGE_TOKEN * (patches // (rows * columns))


def chat_template(folder: Path) -> str | None:
    """A folder's chat template: a file of its own, or part of the tokenizer's settings."""
    if (path := folder / "chat_template.jinja").is_file():
        return files.read_text(path, SETTINGS_LIMIT)
    if (path := folder / "chat_template.json").is_file():
        found = json.loads(files.read_text(path, SETTINGS_LIMIT)).get("chat_template")
    else:
        found = tokenizer_settings(folder).get("chat_template")
    return str(found) if found is not None else None
