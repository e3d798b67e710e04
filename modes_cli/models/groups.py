"""Which group each token belongs to. Thresholds, importance and every reported ratio are per group.

`text` and `vision` are the paper's two modalities. `decode` are the tokens that predict the answer: the last token of the
prompt and every generated one, as far as they are text; a policy that makes no difference there gives them the scale and the
threshold of text. `audio` has a threshold only where one is given. `special` (chat markers, image delimiters, end of text) is
never skipped, but counted, unless a calibration asked to take them for text. Padding belongs to no group.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modes_cli.errors import BadOption

if TYPE_CHECKING:
    from modes_cli.artifacts.bundle import Bundle

GROUPS = ("text", "vision", "decode", "audio", "special")
TEXT, VISION, DECODE, AUDIO, SPECIAL = range(5)
SKIPPABLE = GROUPS[:SPECIAL]
KEEP, SKIP = "keep", "skip"  # what becomes of special tokens: a group that keeps all experts, or text like any other

# Where configurations keep the id of the placeholder that a token of an image, a video or sound stands on.
_VISION_ID_FIELDS = ("image_token_id", "video_token_id", "image_token_index", "video_token_index", "media_placeholder_token_id")
_AUDIO_ID_FIELDS = ("audio_token_id", "audio_token_index")


@dataclass(frozen=True)
class TokenGroups:
    """The token ids that decide a token's group; every other id is text."""

    vision_ids: tuple[int, ...]
    special_ids: tuple[int, ...]
    audio_ids: tuple[int, ...] = ()

    def of(self, input_ids: Tensor) -> Tensor:
        """The group of each token as far as its id tells: int32, same shape as `input_ids`."""
        lists = (self.vision_ids, self.special_ids, self.audio_ids)
        return groups_by_id(input_ids, *(torch.tensor(ids, dtype=torch.int64, device=input_ids.device) for ids in lists))


def groups_by_id(input_ids: Tensor, vision_ids: Tensor, special_ids: Tensor, audio_ids: Tensor) -> Tensor:
    """As `TokenGroups.of`, from ids that lie where `input_ids` lie. Waits for no device; can be traced."""
    group = torch.full_like(input_ids, TEXT, dtype=torch.int32)
    for number, ids in ((SPECIAL, special_ids), (AUDIO, audio_ids), (VISION, vision_ids)):
        if ids.numel():
            group = group.masked_fill((input_ids[..., None] == ids).any(-1), number)
    return group


def groups_at_once(input_ids: Tensor, ids: Tensor, numbers: Tensor) -> Tensor:
    """The same in few operations, for a graph: `ids` (n,) each of which is in one list only, and `numbers` (n,) int32, the
    group of each. What is not among them is text.
    """
    if not ids.numel():
        return torch.full_like(input_ids, TEXT, dtype=torch.int32)
    assert TEXT == 0, "the least number stands for what is not found"
    return torch.where(input_ids[..., None] == ids, numbers, torch.zeros_like(numbers)).amax(-1)


def last_real(real: Tensor) -> Tensor:
    """[B, S] bool: the last token of each row that is not padding; `real` [B, S] bool."""
    place = torch.arange(1, real.shape[1] + 1, device=real.device)
    reached = real * place
    return real & (reached == reached.amax(1, keepdim=True))


def with_decode(group: Tensor, decoding: Tensor) -> Tensor:
    """`group` with those text tokens in `decode` that `decoding` (same shape, bool) says; int32."""
    return group.masked_fill((group == TEXT) & decoding, DECODE)


def token_groups(config: Any, special_ids: Iterable[int], special: str = KEEP) -> TokenGroups:
    """From a model's configuration and its tokenizer's special ids.

    Args:
        special: `skip` leaves the group of special tokens empty; they are text.

    Raises:
        BadOption: `special` is neither `keep` nor `skip`.
    """
    if special not in (KEEP, SKIP):
        raise BadOption(f"special tokens are to `{special}`", hint=f"either `{KEEP}` or `{SKIP}`")
    vision, audio = _placeholders(config, _VISION_ID_FIELDS), _placeholders(config, _AUDIO_ID_FIELDS)
    kept = set(special_ids) - vision - audio if special == KEEP else ()
    return TokenGroups(tuple(sorted(vision)), tuple(sorted(kept)), tuple(sorted(audio - vision)))


def bundled_groups(bundle: "Bundle") -> TokenGroups:
    """Those that a bundle was exported with."""
    lists = (bundle.vision_token_ids, bundle.special_token_ids, bundle.audio_token_ids)
    return TokenGroups(*(tuple(ids) for ids in lists))


def _placeholders(config: Any, fields: tuple[str, ...]) -> set[int]:
    found = {getattr(config, field, None) for field in fields}
    return {i for i in found if isinstance(i, int) and i >= 0}
