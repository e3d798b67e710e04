"""Local files: every form that is read, and everything that is refused with the sample's name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]
import pyarrow.parquet as pq  # type: ignore[import-untyped,unused-ignore]
import pytest
from hypothesis import given

from modes_cli.data import DataSpec, SampleSource, open_source
from modes_cli.data.local import select
from modes_cli.errors import BadData, BadOption

Write = Callable[..., Path]


def read(path: Path, *, text_only: bool = False, **options: Any) -> SampleSource:
    return open_source(DataSpec(**{"source": str(path), "split": None, "samples": None, **options}), text_only=text_only)


def rows(count: int) -> list[dict[str, Any]]:
    return [{"image": f"{i % 10}.png", "question": f"Which one? {i}", "answer": str(i)} for i in range(count)]


def test_jsonl(write: Write) -> None:
    path = write([{**rows(2)[0], "task": "red"}, rows(2)[1]])
    source = read(path)
    first, second = source
    assert (first.id, first.question, first.answer, first.task) == ("data.jsonl:1", "Which one? 0", "0", "red")
    assert (second.id, second.task) == ("data.jsonl:2", "data")
    assert second.images[0].getpixel((0, 0)) == (20, 0, 0)
    assert list(source) == [first, second]
    assert len(source) == 2
    assert source.digest == read(path.parent).digest  # the folder holds just this file


def test_several_images_and_several_answers(write: Write) -> None:
    path = write([{"images": ["3.png", "1.png"], "prompt": "Compare.", "answers": ["same", "equal"], "label": "no"}])
    (sample,) = read(path)
    assert [image.getpixel((0, 0)) for image in sample.images] == [(60, 0, 0), (20, 0, 0)]
    assert (sample.question, sample.answer) == ("Compare.", "same")


def test_named_columns(write: Write) -> None:
    path = write([{"picture": "1.png", "q": "Q?", "a": "A", "question": "other", "answer": "other"}])
    (sample,) = read(path, image_column="picture", question_column="q", answer_column="a")
    assert (sample.question, sample.answer) == ("Q?", "A")


def test_parquet_in_all_forms_gives_the_same(tmp_path: Path, write: Write, png: Callable[..., bytes]) -> None:
    write([])
    texts = {"question": [f"Q{i}" for i in range(40)], "answer": [f"A{i}" for i in range(40)]}
    data = [png((20 * (i % 10), 0, 0)) for i in range(40)]
    names = [f"{i % 10}.png" for i in range(40)]
    forms: list[list[Any]] = [
        data,
        [{"bytes": item, "path": None} for item in data],
        [{"bytes": None, "path": name} for name in names],
        names,
        [[name] for name in names],
    ]
    digests = set()
    for form in forms:
        path = tmp_path / "same.parquet"
        pq.write_table(pa.table({"image": form, **texts}), path, row_group_size=15)
        source = read(path, samples=20, seed=4)
        digests.add(source.digest)
        assert [sample.id for sample in source] == [f"same.parquet:{i}" for i in sorted(list(select(40, 20, 4))[:20])]
        assert [s.answer for s in source] == [s.answer for s in source]
    assert len(digests) == 1


@given(total=st.integers(1, 60), seed=st.integers(0, 2**40), data=st.data())
def test_selection_is_a_seeded_permutation(total: int, seed: int, data: st.DataObject) -> None:
    samples = data.draw(st.integers(1, total))
    order = list(select(total, samples, seed))
    assert sorted(order) == list(range(total))
    assert order[:samples] == sorted(order[:samples])
    assert order == list(select(total, samples, seed))
    assert list(select(total, None, seed)) == list(range(total))


def test_selection_stays_as_it_was() -> None:
    assert list(select(10, 4, 0))[:4] == [0, 4, 5, 9]


def test_samples_and_seed_decide_the_digest(write: Write) -> None:
    path = write(rows(30))
    digests = {
        read(path, samples=n, seed=s).digest for n, s in [(10, 0), (10, 0), (10, 1), (11, 0), (30, 0), (30, 7), (None, 3)]
    }
    assert len(digests) == 4  # all thirty are all thirty, whatever the seed


def test_bad_samples_up_to_one_percent_are_left_out_and_replaced(write: Write) -> None:
    items = rows(300)
    items[10]["answer"] = " "
    items[20]["image"] = "missing.png"
    path = write(items)
    source = read(path)
    assert len(source) == len(list(source)) == 298
    assert source.bad == (
        "`data.jsonl:11`: `answer` is empty",
        "`data.jsonl:21`: image `missing.png` does not exist",
    )
    assert len(read(path, samples=250)) == 250
    with pytest.raises(BadData, match=r"`298` usable samples, not `300`"):
        read(path, samples=300)
    items[30]["question"] = 7
    items[40]["question"] = None
    with pytest.raises(
        BadData, match=r"`4` of the `41` samples .* more than 1%; the first is `data.jsonl:11`: `answer` is empty"
    ):
        read(write(items))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image": "broken.png"}, "the image cannot be decoded"),
        ({"image": "data.jsonl"}, "the image is not an image"),
        ({"image": "../x.png"}, "leads out of the data folder"),
        ({"image": "/etc/passwd"}, "absolute path"),
        ({"image": None}, "has no image in `image`"),
        ({"image": ""}, "has no image in `image`"),
        ({"image": []}, "has no image in `image`"),
        ({"image": ["1.png", None]}, "has no image in `image`"),
        ({"image": ["1.png", "broken.png"]}, "image 2 of 2 cannot be decoded"),
        ({"image": ["1.png"] * 257}, "257 images, the limit is 256"),
        ({"image": 5}, "`image` is of type int"),
        ({"image": {"url": "x"}}, "`image` is of type dict"),
        ({"question": ""}, "`question` is empty"),
        ({"question": ["a"]}, "`question` is of type list"),
        ({"question": "\ud800"}, "`question` is not valid Unicode"),
        ({"answer": None}, "`answer` is empty"),
        ({"answer": []}, "`answer` is empty"),
        ({"answer": [""]}, "`answer` is empty"),
        ({"answer": 3}, "`answer` is of type int"),
        ({"answer": True}, "`answer` is of type bool"),
        ({"answer": [{"a": 1}]}, "`answer` is of type dict"),
    ],
)
def test_each_bad_sample_is_named(change: dict[str, Any], reason: str, write: Write, png: Callable[..., bytes]) -> None:
    items = rows(2)
    items[1] = {**items[1], **change}
    path = write(items)
    (path.parent / "broken.png").write_bytes(png("red", (50, 50))[:-30])
    with pytest.raises(BadData) as caught:
        read(path)
    assert "`data.jsonl:2`: " in str(caught.value)
    assert reason in str(caught.value)
    assert caught.value.hint


def test_whole_files_that_cannot_be_used(write: Write, tmp_path: Path) -> None:
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 nothing PAR1")
    (tmp_path / "table.xlsx").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    pq.write_table(pa.table({"question": pa.array([], pa.string())}), tmp_path / "none.parquet")
    for name, reason in [
        ("damaged.parquet", "not a readable Parquet file"),
        ("table.xlsx", "of a kind that cannot be read"),
        ("empty", "0 data files"),
        ("gone.jsonl", "does not exist"),
        ("none.parquet", "has no samples"),
        (".", "data files"),
    ]:
        with pytest.raises(BadData, match=reason) as caught:
            read(tmp_path / name)
        assert caught.value.hint
    with pytest.raises(BadData, match="has no samples"):
        read(write([]))
    with pytest.raises(BadData, match=r"has `3` usable samples, not `4`"):
        read(write(rows(3)), samples=4)


def test_missing_columns_are_listed_with_what_there_is(write: Write) -> None:
    path = write([{"picture": "1.png", "text": "Q?", "answer": "A"}])
    with pytest.raises(
        BadData, match=r"no image column and no question column; its columns are `picture`, `text`, `answer`"
    ) as caught:
        read(path)
    assert "--image-column NAME --question-column NAME" in str(caught.value.hint)
    with pytest.raises(BadData, match="no answer column `reply`"):
        read(path, image_column="picture", question_column="text", answer_column="reply")


def test_text_only_needs_no_images(write: Write) -> None:
    path = write([{"question": "Q?", "answer": "A"}])
    with pytest.raises(BadData, match="no image column") as caught:
        read(path)
    assert "--text-only" in str(caught.value.hint)
    (sample,) = read(path, text_only=True)
    assert sample.images == ()
    with pytest.raises(BadOption, match="contradict"):
        read(path, text_only=True, image_column="image")


def test_split_names_one_of_several_files(write: Write) -> None:
    write(rows(1), "train.jsonl")
    path = write(rows(2), "test.jsonl")
    assert len(read(path.parent, split="test")) == 2
    with pytest.raises(BadData, match=r"2 data files \(`test.jsonl`, `train.jsonl`\)"):
        read(path.parent)
    with pytest.raises(BadOption, match="`--split dev`"):
        read(path.parent, split="dev")
    with pytest.raises(BadOption, match="single file"):
        read(path, split="test")


def test_a_file_that_changes_meanwhile_is_noticed(write: Write) -> None:
    path = write(rows(3))
    source = read(path)
    (path.parent / "1.png").unlink()
    with pytest.raises(BadData, match=r"`data.jsonl:2` was usable at first"):
        list(source)


@pytest.mark.parametrize("source", ["nothing", "", "a b/c", "digits2", "\0"])
def test_unknown_sources(source: str) -> None:
    with pytest.raises(BadData, match="there is no data set") as caught:
        open_source(DataSpec(source, None, None))
    assert "`digits`, `gqa`" in str(caught.value.hint)
