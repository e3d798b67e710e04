"""The presets on small copies of their data sets: joins, splits, prompts."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]
import pyarrow.parquet as pq  # type: ignore[import-untyped,unused-ignore]
import pytest

from modes_cli.data import DataSpec
from modes_cli.data.hub import half_of
from modes_cli.data.presets import PRESETS, open_preset
from modes_cli.data.sample import SampleSource
from modes_cli.errors import BadData, BadOption

Png = Callable[..., bytes]
Gqa = Callable[..., SampleSource]


def put(folder: Path, config: str, split: str, rows: list[dict[str, Any]]) -> None:
    (folder / config).mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / config / f"{split}-00000-of-00001.parquet")


def card(configs: dict[str, str]) -> str:
    entries = [f"- config_name: {c}\n  data_files:\n  - {{split: {s}, path: {c}/{s}-*}}" for c, s in configs.items()]
    return "---\nconfigs:\n" + "\n".join(entries) + "\n---\n"


def question(image: int, number: int) -> dict[str, Any]:
    kind = ("query", "verify")[number % 2]
    own = {
        "id": f"{image:02}{number}",
        "imageId": f"n{image}",
        "question": f"Is {number} in {image}?",
        "answer": f"{image}-{number}",
    }
    return own | {"fullAnswer": "not read", "types": {"structural": kind, "semantic": "rel", "detailed": "x"}}


@pytest.fixture
def gqa(tmp_path: Path, png: Png) -> Gqa:
    """`gqa(samples=..., split=...)`: six images with 4, 4, 4, 1, 1, 1 questions in `train`, one with two in `testdev`."""
    train = [question(image, number) for number in range(4) for image in range(6) if image < 3 or number == 0]
    for split, images, questions in (("train", range(6), train), ("testdev", range(9, 10), [question(9, 0), question(9, 1)])):
        pictures = [{"id": f"n{i}", "image": {"bytes": png((10 * i, 0, 0)), "path": f"n{i}.jpg"}} for i in images]
        put(tmp_path, f"{split}_balanced_images", split, pictures)
        put(tmp_path, f"{split}_balanced_instructions", split, questions)
    names = {f"{split}_balanced_{kind}": split for split in ("train", "testdev") for kind in ("images", "instructions")}
    (tmp_path / "README.md").write_text(card(names))
    preset = dataclasses.replace(PRESETS["gqa"], dataset=str(tmp_path))

    def open_gqa(*, text_only: bool = False, **options: Any) -> SampleSource:
        return open_preset(
            preset, DataSpec(**{"source": "gqa", "split": None, "samples": None, **options}), text_only=text_only
        )

    return open_gqa


def image_of(sample: Any) -> int:
    return int(sample.images[0].getpixel((0, 0))[0]) // 10


def test_gqa_joins_every_question_with_its_image(gqa: Gqa) -> None:
    samples = list(gqa())
    assert len(samples) == 15
    for sample in samples:
        assert sample.answer.split("-")[0] == str(image_of(sample))
        assert sample.question.endswith("?\nAnswer the question using a single word or phrase.")
    assert samples[0].id == "gqa/train/000"
    assert Counter(sample.task for sample in samples) == {"query": 9, "verify": 6}
    assert {image_of(sample) for sample in gqa(split="testdev")} == {9}


def test_gqa_draws_different_images_first(gqa: Gqa) -> None:
    few = gqa(samples=6)
    assert {image_of(sample) for sample in few} == set(range(6))
    three = list(gqa(samples=3, seed=2))
    assert len({image_of(sample) for sample in three}) == 3
    assert few.digest == gqa(samples=6).digest
    assert len({gqa(samples=6, seed=seed).digest for seed in range(4)}) > 1
    assert len(gqa(samples=15)) == 15
    with pytest.raises(BadData, match=r"has `15` usable samples, not `16`"):
        gqa(samples=16)


def test_gqa_names_questions_without_an_image_or_with_a_bad_one(gqa: Gqa, tmp_path: Path, png: Png) -> None:
    folder = tmp_path / "testdev_balanced_images"
    for rows, reason in [
        ([{"id": "other", "image": {"bytes": png(), "path": None}}], "its image `n9` is not in the data set"),
        ([{"id": "n9", "image": {"bytes": png("red", (50, 50))[:-30], "path": None}}], "the image cannot be decoded"),
        ([{"id": "n9", "image": {"bytes": b"", "path": None}}], "has no image"),
    ]:
        pq.write_table(pa.Table.from_pylist(rows), folder / "testdev-00000-of-00001.parquet")
        with pytest.raises(BadData, match=rf"`gqa/testdev/090`: {reason}"):
            gqa(split="testdev")


def test_gqa_as_text(gqa: Gqa) -> None:
    assert [sample.images for sample in gqa(split="testdev", text_only=True)] == [(), ()]


def test_gqa_refuses_splits_without_answers_and_columns(gqa: Gqa) -> None:
    with pytest.raises(BadOption, match="no split `challenge`") as caught:
        gqa(split="challenge")
    assert "`testdev`" in str(caught.value.hint)
    with pytest.raises(BadOption, match="--answer-column"):
        gqa(answer_column="fullAnswer")


def test_coco_halves_are_disjoint_and_complete(tmp_path: Path, png: Png) -> None:
    ids = [f"COCO_val2014_{i:012}.jpg" for i in range(40)]
    rows = [
        {"question_id": name, "image": {"bytes": png(), "path": name}, "question": "?", "answer": ["A cat.", "Cat"]}
        for name in ids
    ]
    put(tmp_path, "data", "val", rows)
    (tmp_path / "README.md").write_text(card({"data": "val"}).replace("config_name: data", "config_name: default"))
    preset = dataclasses.replace(PRESETS["coco"], dataset=str(tmp_path))

    def read(split: str | None, samples: int | None = None) -> list[Any]:
        return list(open_preset(preset, DataSpec("coco", split, samples), text_only=False))

    halves = [{sample.id.rpartition("/")[2] for sample in read(split)} for split in (None, "evaluation")]
    assert halves[0] & halves[1] == set()
    assert halves[0] | halves[1] == set(ids)
    assert all(half_of(name) == 0 for name in halves[0])
    assert len(read("val")) == 40
    (sample,) = read("calibration", 1)
    assert (sample.question, sample.answer) == ("Provide a one-sentence caption for the provided image.", "A cat.")
    assert sample.task == "coco"


def test_every_preset_has_its_default_splits() -> None:
    for preset in PRESETS.values():
        assert {preset.calibrate, preset.evaluate} <= preset.parts.keys()
