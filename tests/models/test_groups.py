"""Which group a token belongs to."""

from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from modes_cli.models.groups import GROUPS, SPECIAL, TEXT, VISION, TokenGroups, token_groups
from modes_cli.models.loading import Loaded


@given(
    ids=st.lists(st.lists(st.integers(-1, 12), min_size=3, max_size=3), max_size=4),
    vision=st.sets(st.integers(0, 9)),
    special=st.sets(st.integers(0, 9)),
)
def test_vision_before_special_before_text(ids: list[list[int]], vision: set[int], special: set[int]) -> None:
    tokens = TokenGroups(tuple(vision), tuple(special))
    tensor = torch.tensor(ids, dtype=torch.int64).reshape(-1, 3)

    group = tokens.of(tensor)

    assert group.dtype == torch.int32
    assert group.shape == tensor.shape
    for row, ids_of_row in zip(group.tolist(), tensor.tolist(), strict=True):
        assert row == [VISION if i in vision else SPECIAL if i in special else TEXT for i in ids_of_row]


@pytest.mark.parametrize(
    "field", ["image_token_id", "video_token_id", "image_token_index", "video_token_index", "media_placeholder_token_id"]
)
def test_placeholders_are_found_under_any_name(field: str) -> None:
    assert token_groups(SimpleNamespace(**{field: 7}), []).vision_ids == (7,)


def test_placeholders_are_never_special_and_unset_ones_are_ignored() -> None:
    config = SimpleNamespace(image_token_id=7, video_token_id=None, image_token_index=-1)
    tokens = token_groups(config, [9, 7, 1, 9])
    assert (tokens.vision_ids, tokens.special_ids) == ((7,), (1, 9))


def test_a_text_model_has_no_vision_tokens() -> None:
    tokens = token_groups(SimpleNamespace(), [1])
    assert tokens.of(torch.tensor([[0, 1, 2]])).tolist() == [[TEXT, SPECIAL, TEXT]]


def test_the_order_of_groups_is_what_artifacts_say() -> None:
    assert [GROUPS[i] for i in (TEXT, VISION, SPECIAL)] == ["text", "vision", "special"]


def test_the_built_in_model_tells_images_and_chat_markers_apart(digits: Loaded) -> None:
    tokenizer, config = digits.tokenizer, digits.model.config
    ids = [config.image_token_id, config.video_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id]
    marks = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|vision_start|>", "<|vision_end|>"])
    words = tokenizer("What is at the center?", add_special_tokens=False)["input_ids"]
    assert digits.tokens.of(torch.tensor(ids)).tolist() == [VISION, VISION, SPECIAL, SPECIAL]
    assert digits.tokens.of(torch.tensor(marks)).tolist() == [SPECIAL] * 3
    assert digits.tokens.of(torch.tensor(words)).tolist() == [TEXT] * len(words)
