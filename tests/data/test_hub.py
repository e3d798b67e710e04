"""Hub data sets, read through the `datasets` library from local copies: there is no network in the tests."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]
import pyarrow.parquet as pq  # type: ignore[import-untyped,unused-ignore]
import pytest

from modes_cli.data import DataSpec, hub, open_source
from modes_cli.data.images import Unusable
from modes_cli.data.sample import SampleSource
from modes_cli.errors import BadData, WriteFailed

Png = Callable[..., bytes]

CARD = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: train.parquet}
  - {split: test, path: test.parquet}
dataset_info:
- config_name: default
  features:
  - {name: image, dtype: image}
  - {name: question, dtype: string}
  - {name: answers, sequence: string}
  - {name: id, dtype: string}
---
"""


@pytest.fixture
def copy(tmp_path: Path, png: Png) -> Path:
    """A data set with 60 training rows and 10 test rows, as the Hub would serve it."""
    for split, count in (("train", 60), ("test", 10)):
        columns = {
            "image": [{"bytes": png((i, 0, 0)), "path": None} for i in range(count)],
            "question": [f"Q{i}" for i in range(count)],
            "answers": [[f"A{i}", "other"] for i in range(count)],
            "id": [f"row-{i}" for i in range(count)],
        }
        pq.write_table(pa.table(columns), tmp_path / f"{split}.parquet", row_group_size=16)
    (tmp_path / "README.md").write_text(CARD)
    return tmp_path


def read(source: Path | str, *, text_only: bool = False, **options: Any) -> SampleSource:
    return hub.open_samples(DataSpec(**{"source": str(source), "split": None, "samples": None, **options}), text_only=text_only)


def test_all_samples_in_order_more_than_once(copy: Path) -> None:
    source = read(copy, split="test")
    first = list(source)
    assert [sample.answer for sample in first] == [f"A{i}" for i in range(10)]
    assert [sample.images[0].getpixel((0, 0)) for sample in first] == [(i, 0, 0) for i in range(10)]
    assert first[3].id.endswith("/test/row-3")
    assert first[3].task == copy.name
    assert list(source) == first
    a, b = iter(source), iter(source)  # two readers at once do not disturb each other
    assert [next(a), next(b), next(b), next(a)] == [first[0], first[0], first[1], first[1]]


def test_a_seeded_draw(copy: Path) -> None:
    source = read(copy, split="train", samples=12)
    assert len({sample.id for sample in source}) == len(source) == 12
    assert [sample.id for sample in source] != [sample.id for sample in read(copy, split="train")][:12]
    assert source.digest == read(copy, split="train", samples=12).digest
    assert source.digest != read(copy, split="train", samples=12, seed=1).digest
    with pytest.raises(BadData, match=r"has `10` usable samples, not `11`"):
        read(copy, split="test", samples=11)


def test_splits_must_exist_and_be_chosen(copy: Path) -> None:
    with pytest.raises(BadData, match="several splits: `train`, `test`"):
        read(copy)
    with pytest.raises(BadData, match="no split `val`; it has `train`, `test`"):
        read(copy, split="val")


def test_bad_images_are_named(copy: Path, png: Png) -> None:
    table = pq.read_table(copy / "test.parquet").to_pylist()
    table[4]["image"] = {"bytes": png("red", (50, 50))[:-30], "path": None}
    pq.write_table(pa.Table.from_pylist(table), copy / "test.parquet")
    with pytest.raises(BadData, match=r"/test/row-4`: the image cannot be decoded"):
        read(copy, split="test")
    assert len(read(copy, split="test", text_only=True)) == 10


def test_missing_columns(copy: Path) -> None:
    with pytest.raises(BadData, match="no image column `photo`; its columns are `image`, `question`, `answers`, `id`"):
        read(copy, split="test", image_column="photo")


def test_image_folder_whose_images_are_files(tmp_path: Path, png: Png) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png((i, 0, 0)))
    lines = [json.dumps({"file_name": f"{i}.png", "question": f"Q{i}", "answer": "A"}) for i in range(3)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    source = read(tmp_path)
    assert [sample.images[0].getpixel((0, 0)) for sample in source] == [(i, 0, 0) for i in range(3)]


def test_several_images_per_row(tmp_path: Path, png: Png) -> None:
    features = datasets.Features(
        {"images": datasets.List(datasets.Image()), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    )
    rows = {
        "images": [[{"bytes": png("red"), "path": None}, {"bytes": png("blue"), "path": None}]],
        "question": ["Q"],
        "answer": ["A"],
    }
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    (sample,) = read(tmp_path)
    assert [image.getpixel((0, 0)) for image in sample.images] == [(255, 0, 0), (0, 0, 255)]


def test_rows_cannot_name_files_outside_their_data_set(copy: Path) -> None:
    rows = [{"image": {"bytes": None, "path": "/etc/passwd"}, "question": "Q", "answers": ["A"], "id": "x"}]
    pq.write_table(pa.Table.from_pylist(rows), copy / "test.parquet")
    with pytest.raises(BadData, match=r"`/etc/passwd`"):
        read(copy, split="test")
    open_image = hub.reader("owner/name")
    for name in (
        "/etc/passwd",
        "file:///etc/passwd",
        "https://x/y.png",
        "hf://datasets/owner/name2/a.png",
        "hf://datasets/owner/name/../x",
    ):
        with pytest.raises(Unusable, match="leads out of the data set"):
            open_image(name)


def test_equal_images_are_stored_once(copy: Path) -> None:
    rows = pq.read_table(copy / "test.parquet").to_pylist()
    big = rows[0]["image"]
    pq.write_table(pa.Table.from_pylist([{**row, "image": big} for row in rows]), copy / "test.parquet")
    assert len({sample.images[0].tobytes() for sample in read(copy, split="test")}) == 1


def test_the_cache_is_used_when_offline(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert len(read(copy, split="test")) == 10
    drawn = read(copy, split="test", samples=5)
    assert len(drawn) == 5
    assert drawn.digest == read(copy, split="test", samples=5).digest


def test_a_full_disk_is_called_so(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(WriteFailed, match="No space left") as caught:
        read(copy, split="test")
    assert "free some space" in str(caught.value.hint)


UNREACHABLE = """
import sys
from modes_cli.data import DataSpec, open_source
from modes_cli.errors import BadData
for source in sys.argv[1:]:
    try:
        open_source(DataSpec(source, None, 4))
    except BadData as error:
        print(error, "|", error.hint)
"""


def test_unreachable_hub() -> None:
    names = ["nobody/nothing", "nobody/nothing:config", "gqa", "coco"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", UNREACHABLE, *names], capture_output=True, text=True, env=environment, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    for line, name in zip(lines, ["nobody/nothing", "nobody/nothing", "lmms-lab/GQA", "lmms-lab/COCO-Caption"], strict=True):
        assert line.startswith(f"the data set `{name}` cannot be read from the Hugging Face Hub: ")
        assert "| check the name and the network" in line
    assert "Traceback" not in done.stderr


def test_an_existing_path_goes_before_an_id(tmp_path: Path, png: Png, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "a.png").write_bytes(png())
    (tmp_path / "owner" / "name" / "x.jsonl").write_text(json.dumps({"image": "a.png", "question": "Q", "answer": "A"}))
    monkeypatch.chdir(tmp_path)
    assert [sample.id for sample in open_source(DataSpec("owner/name", None, None))] == ["x.jsonl:1"]
