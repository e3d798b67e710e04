"""Kimi-VL's images and text, from settings and vocabulary files alone."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
import torch
from PIL import Image

from modes_cli.errors import BadModel
from modes_cli.models.families.kimi_vl_processing import KimiVLImageProcessor, KimiVLProcessor
from modes_cli.models.families.kimi_vl_tokenizer import PATTERN, load_tokenizer
from modes_cli.models.processor import load_processor
from tests import checkpoint_kimi_vl as kimi

TEXTS = (
    "What is at the top center?",
    "  two  spaces,\n\nlines\r\n and\ttabs   ",
    "camelCaseWords HTTPServer's they'LL I'd 1234567 3.14",
    "汉字和English混排。全角 こんにちは Ünïcödé naïve Ǆ",
    "emoji 🦊🦊 and \u0000 bytes \u200b",
    "",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kimi-vl-processor")
    (folder / "config.json").write_text(json.dumps(kimi.config()))
    kimi.write_processor(folder)
    return folder


@pytest.fixture(scope="module")
def processor(folder: Path) -> Any:
    return load_processor(folder)


def tiktoken_ids(text: str, ranks: dict[bytes, int]) -> list[int]:
    """The definition: pieces of the pattern; in each, the neighbours whose join ranks first are joined until none does."""
    ids = []
    for piece in regex.findall(PATTERN, text, regex.VERSION1):
        parts = [bytes([byte]) for byte in piece.encode()]
        while joins := [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]:
            _, i = min(joins)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_the_tiktoken_file(processor: Any, text: str) -> None:
    ranks = {token: rank for rank, token in enumerate(kimi.vocabulary())}
    ids = processor.tokenizer(text)["input_ids"]
    assert ids == tiktoken_ids(text, ranks)
    assert processor.tokenizer.decode(ids) == text


def test_merges_happen(processor: Any) -> None:
    """The vocabulary is small, but not only bytes: otherwise the test above would show little."""
    assert len(processor.tokenizer(TEXTS[0])["input_ids"]) < len(TEXTS[0]) / 2


def test_special_tokens(processor: Any) -> None:
    tokenizer, ids = processor.tokenizer, kimi.token_ids()
    for name, id in ids.items():
        assert tokenizer.convert_tokens_to_ids(name) == id
        assert tokenizer(f"a{name}b")["input_ids"][1:-1] == [id]
    assert set(tokenizer.all_special_ids) == set(ids.values())
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("[BOS]", "[EOS]", "[PAD]")
    assert len(tokenizer) == len(kimi.vocabulary()) + kimi.RESERVED
    assert tokenizer.convert_ids_to_tokens(ids["[EOT]"] - 1).startswith("<|reserved_token_")
    assert tokenizer.decode([ids["<|im_user|>"], *tokenizer("hi")["input_ids"]], skip_special_tokens=True) == "hi"


def test_a_tokenizer_json_is_taken_where_there_is_one(processor: Any, folder: Path, tmp_path: Path) -> None:
    kimi.write_processor(tmp_path)
    (tmp_path / "tiktoken.model").unlink()
    with pytest.raises(ValueError, match=r"neither tokenizer\.json nor tiktoken\.model"):
        load_tokenizer(tmp_path)
    processor.tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert [tokenizer(text)["input_ids"] for text in TEXTS] == [processor.tokenizer(text)["input_ids"] for text in TEXTS]
    assert tokenizer.all_special_ids == processor.tokenizer.all_special_ids


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("IQ== 0\nIg==\n", "line `2`"),
        ("IQ== 0\nI!== 1\n", "line `2`"),
        ("IQ== 0\nIg== one\n", "line `2`"),
        ("IQ== 0\nIg== 2\n", "ranks of its `2` tokens"),
        ("", "ranks of its `0` tokens"),
    ],
)
def test_a_damaged_vocabulary_is_refused(folder: Path, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(kimi.config()))
    kimi.write_processor(tmp_path)
    (tmp_path / "tiktoken.model").write_text(text)
    with pytest.raises(BadModel, match=said):
        load_processor(tmp_path)


def test_a_special_token_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    kimi.write_processor(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "<pad>"}))
    with pytest.raises(ValueError, match="special token `<pad>`"):
        load_tokenizer(tmp_path)


def test_a_prompt(processor: Any) -> None:
    """Placeholders are repeated for each image's own tokens; images of a batch are packed."""
    assert isinstance(processor, KimiVLProcessor)
    wide, tall = Image.new("RGB", (60, 20), (255, 0, 0)), Image.new("L", (28, 57), 128)
    content = [{"type": "image", "image": wide}, {"type": "image", "image": tall}, {"type": "text", "text": "Which?"}]
    chat: Any = [{"role": "user", "content": content}]
    encoded = processor.apply_chat_template(
        chat, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    picture = "<|media_start|>image<|media_content|>{}<|media_end|>"
    expected = (
        "<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|><|im_user|>user<|im_middle|>"
        + picture.format("<|media_pad|>" * 3)  # 84 x 28 pixels
        + picture.format("<|media_pad|>" * 3)  # 28 x 84
        + "Which?<|im_end|><|im_assistant|>assistant<|im_middle|>"
    )
    assert processor.tokenizer.decode(encoded["input_ids"][0]) == expected
    assert encoded["image_grid_hws"].tolist() == [[2, 6], [6, 2]]
    assert encoded["image_grid_hws"].dtype == torch.int64
    assert (encoded["pixel_values"].shape, encoded["pixel_values"].dtype) == ((24, 3, 14, 14), torch.float32)


def test_patches_are_cut_in_reading_order_and_normalised() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (28, 56, 3), dtype=np.uint8)
    out = KimiVLImageProcessor()([Image.fromarray(pixels)], return_tensors="np")
    assert out["image_grid_hws"].tolist() == [[2, 4]]
    for number, (row, column) in enumerate((r, c) for r in range(2) for c in range(4)):
        part = pixels[14 * row : 14 * row + 14, 14 * column : 14 * column + 14].transpose(2, 0, 1)
        np.testing.assert_allclose(out["pixel_values"][number], part / 127.5 - 1, atol=1e-6)


def test_what_is_added_is_black_and_at_the_right_and_the_bottom() -> None:
    out = KimiVLImageProcessor()([Image.new("RGB", (29, 20), (255, 255, 255))], return_tensors="np")
    assert out["image_grid_hws"].tolist() == [[2, 4]]
    whole = out["pixel_values"].reshape(2, 4, 3, 14, 14).transpose(2, 0, 3, 1, 4).reshape(3, 28, 56)
    assert (whole[:, :20, :29] == 1).all()
    assert (whole[:, 20:] == -1).all()
    assert (whole[:, :, 29:] == -1).all()


def test_an_image_can_be_cropped_instead() -> None:
    pixels = np.arange(30 * 61 * 3, dtype=np.uint32).reshape(30, 61, 3).astype(np.uint8)
    fitted = KimiVLImageProcessor(pad_input=False).fit(Image.fromarray(pixels))
    assert np.array_equal(np.asarray(fitted), pixels[1:29, 2:58])
    with pytest.raises(ValueError, match="`20` x `40` pixels is smaller than a token"):
        KimiVLImageProcessor(pad_input=False).fit(Image.new("RGB", (20, 40)))


def test_a_large_image_is_shrunk_to_the_limit() -> None:
    """As published: the scale comes from whole patches, and what is then filled up may exceed the limit a little."""
    processor = KimiVLImageProcessor(in_token_limit=16)
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (150, 300, 3), dtype=np.uint8))
    scale = (16 / (21 * 10)) ** 0.5
    size = (int(300 * scale), int(150 * scale))
    fitted = np.asarray(processor.fit(image))
    assert fitted.shape == (56, 84, 3)  # of 41 x 82
    assert np.array_equal(fitted[: size[1], : size[0]], np.asarray(image.resize(size, Image.Resampling.BICUBIC)))
    assert processor.fit(Image.new("RGB", (56, 56))).size == (56, 56)  # exactly the limit


def test_an_image_longer_than_the_positions_is_refused() -> None:
    with pytest.raises(ValueError, match="`512` patches or more"):
        KimiVLImageProcessor().fit(Image.new("RGB", (14 * 512, 20)))
    assert KimiVLImageProcessor().fit(Image.new("RGB", (14 * 510, 20))).size == (14 * 510, 28)


def test_a_chat_template_may_lie_elsewhere(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(kimi.config()))
    kimi.write_processor(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    assert load_processor(tmp_path).chat_template is None
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "{{ 'one' }}"}))
    assert load_processor(tmp_path).chat_template == "{{ 'one' }}"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ 'two' }}"}))
    assert load_processor(tmp_path).chat_template == "{{ 'two' }}"
