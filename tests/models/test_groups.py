"""Which group a token belongs to."""

from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from modes_cli.models.groups import (
    AUDIO,
    DECODE,
    GROUPS,
    SKIPPABLE,
    SPECIAL,
    TEXT,
    VISION,
    TokenGroups,
    groups_at_once,
    groups_by_id,
    last_real,
    token_groups,
    with_decode,
)
from modes_cli.models.loading import Loaded
from tests.skipping import reference

ids_of = st.sets(st.integers(0, 9))
# Rows of one length, of ids and of which of them are real: padding may stand anywhere, also in all places.
batches = st.integers(1, 6).flatmap(
    lambda length: st.lists(
        st.lists(st.tuples(st.integers(-1, 12), st.booleans()), min_size=length, max_size=length), min_size=1, max_size=4
    )
)


def parts(rows: list[list[tuple[int, bool]]]) -> tuple[Tensor, Tensor]:
    """Ids and which are real, [B, S] each."""
    return (
        torch.tensor([[i for i, _ in row] for row in rows]),
        torch.tensor([[real for _, real in row] for row in rows]),
    )


@given(
    ids=st.lists(st.lists(st.integers(-1, 12), min_size=3, max_size=3), max_size=4),
    vision=ids_of,
    special=ids_of,
    audio=ids_of,
)
def test_vision_before_audio_before_special_before_text(
    ids: list[list[int]], vision: set[int], special: set[int], audio: set[int]
) -> None:
    tokens = TokenGroups(tuple(vision), tuple(special), tuple(audio))
    tensor = torch.tensor(ids, dtype=torch.int64).reshape(-1, 3)

    group = tokens.of(tensor)

    assert group.dtype == torch.int32
    assert group.shape == tensor.shape
    order = ((vision, VISION), (audio, AUDIO), (special, SPECIAL))
    for row, ids_of_row in zip(group.tolist(), tensor.tolist(), strict=True):
        assert row == [next((number for ids, number in order if i in ids), TEXT) for i in ids_of_row]


@given(rows=batches)
def test_the_last_real_token_of_each_row(rows: list[list[tuple[int, bool]]]) -> None:
    _, real = parts(rows)
    found = last_real(real)
    assert (found.dtype, found.shape) == (torch.bool, real.shape)
    for row, marks in zip(found.tolist(), real.tolist(), strict=True):
        places = [place for place, mark in enumerate(marks) if mark]
        assert [place for place, mark in enumerate(row) if mark] == places[-1:]  # none in a row of padding only


def test_padding_on_either_side_and_everywhere() -> None:
    real = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]]).bool()
    assert last_real(real).int().tolist() == [[0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]]


@given(rows=batches, vision=ids_of, special=ids_of)
def test_decode_is_the_last_real_token_if_it_is_text(
    rows: list[list[tuple[int, bool]]], vision: set[int], special: set[int]
) -> None:
    tokens = TokenGroups(tuple(vision), tuple(special))
    ids, real = parts(rows)
    by_id = tokens.of(ids)
    group = with_decode(by_id, last_real(real))
    assert group.dtype == torch.int32
    assert torch.equal(group.reshape(-1), reference.groups(tokens, ids, real))
    changed = group != by_id
    assert (by_id[changed] == TEXT).all()  # an image's or a special token stays what it is
    assert (group[changed] == DECODE).all()
    assert (changed.sum(1) <= 1).all()


def test_a_special_last_token_stays_special() -> None:
    tokens = TokenGroups((7,), (1,))
    ids = torch.tensor([[5, 7, 1], [5, 1, 5], [5, 5, 7]])
    group = with_decode(tokens.of(ids), last_real(torch.ones_like(ids).bool()))
    assert group.tolist() == [[TEXT, VISION, SPECIAL], [TEXT, SPECIAL, DECODE], [TEXT, TEXT, VISION]]


@pytest.mark.parametrize(
    "field", ["image_token_id", "video_token_id", "image_token_index", "video_token_index", "media_placeholder_token_id"]
)
def test_placeholders_are_found_under_any_name(field: str) -> None:
    assert token_groups(SimpleNamespace(**{field: 7}), []).vision_ids == (7,)


@pytest.mark.parametrize("field", ["audio_token_id", "audio_token_index"])
def test_sound_has_a_group_of_its_own(field: str) -> None:
    tokens = token_groups(SimpleNamespace(**{field: 8, "image_token_id": 7}), [8, 7, 1])
    assert tokens == TokenGroups((7,), (1,), (8,))
    assert tokens.of(torch.tensor([[8, 7, 1, 2]])).tolist() == [[AUDIO, VISION, SPECIAL, TEXT]]


def test_placeholders_are_never_special_and_unset_ones_are_ignored() -> None:
    config = SimpleNamespace(image_token_id=7, video_token_id=None, image_token_index=-1)
    tokens = token_groups(config, [9, 7, 1, 9])
    assert (tokens.vision_ids, tokens.special_ids, tokens.audio_ids) == ((7,), (1, 9), ())


def test_a_text_model_has_no_vision_tokens() -> None:
    tokens = token_groups(SimpleNamespace(), [1])
    assert tokens.of(torch.tensor([[0, 1, 2]])).tolist() == [[TEXT, SPECIAL, TEXT]]


def test_the_order_of_groups_is_what_artifacts_say() -> None:
    assert [GROUPS[i] for i in (TEXT, VISION, DECODE, AUDIO, SPECIAL)] == ["text", "vision", "decode", "audio", "special"]
    assert (*SKIPPABLE, "special") == GROUPS


def test_the_built_in_model_tells_images_and_chat_markers_apart(digits: Loaded) -> None:
    tokenizer, config = digits.tokenizer, digits.model.config
    ids = [config.image_token_id, config.video_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id]
    marks = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|vision_start|>", "<|vision_end|>"])
    words = tokenizer("What is at the center?", add_special_tokens=False)["input_ids"]
    assert digits.tokens.of(torch.tensor(ids)).tolist() == [VISION, VISION, SPECIAL, SPECIAL]
    assert digits.tokens.of(torch.tensor(marks)).tolist() == [SPECIAL] * 3
    assert digits.tokens.of(torch.tensor(words)).tolist() == [TEXT] * len(words)


def test_at_once_and_list_by_list() -> None:
    ids, lists = torch.arange(20).reshape(2, 10), ((3, 4), (0, 17, 30), (9,))  # vision, special, audio
    expected = groups_by_id(ids, *(torch.tensor(own) for own in lists))
    known = torch.tensor([token for own in lists for token in own])
    numbers = torch.tensor([number for number, own in zip((VISION, SPECIAL, AUDIO), lists, strict=True) for _ in own])
    found = groups_at_once(ids, known, numbers.int())
    assert torch.equal(found, expected)
    assert found.dtype == expected.dtype
    nothing = torch.zeros(0, dtype=torch.int64)
    assert torch.equal(groups_at_once(ids, nothing, nothing.int()), groups_by_id(ids, nothing, nothing, nothing))
