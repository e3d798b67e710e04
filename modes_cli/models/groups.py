"""Which group each token belongs to: text, vision, or special (never skipped, but counted)."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

GROUPS = ("text", "vision", "special")
TEXT, VISION, SPECIAL = range(3)
SKIPPABLE = ("text", "vision")

# Where configurations keep the id of the placeholder that an image or video token stands on.
_VISION_ID_FIELDS = ("image_token_id", "video_token_id", "image_token_index", "video_token_index", "media_placeholder_token_id")
# No data set here has sound, so sound has no threshold: it is never skipped.
_AUDIO_ID_FIELDS = ("audio_token_id", "audio_token_index")


@dataclass(frozen=True)
class TokenGroups:
    """The token ids that decide a token's group; every other id is text."""

    vision_ids: tuple[int, ...]
    special_ids: tuple[int, ...]

    def of(self, input_ids: Tensor) -> Tensor:
        """The group of each token: int32, same shape as `input_ids`."""
        group = torch.full_like(input_ids, TEXT, dtype=torch.int32)
        group[torch.isin(input_ids, _ids(self.special_ids, input_ids))] = SPECIAL
        group[torch.isin(input_ids, _ids(self.vision_ids, input_ids))] = VISION
        return group


def _ids(ids: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.tensor(ids, dtype=like.dtype, device=like.device)


def token_groups(config: Any, special_ids: Iterable[int]) -> TokenGroups:
    """From a model's configuration and its tokenizer's special ids (chat markers, image delimiters, end of text)."""
    vision, audio = _placeholders(config, _VISION_ID_FIELDS), _placeholders(config, _AUDIO_ID_FIELDS)
    return TokenGroups(tuple(sorted(vision)), tuple(sorted((set(special_ids) | audio) - vision)))


def _placeholders(config: Any, fields: tuple[str, ...]) -> set[int]:
    found = {getattr(config, field, None) for field in fields}
    return {i for i in found if isinstance(i, int) and i >= 0}
