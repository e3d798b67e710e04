"""Reading tables: rows by number, lines and files that are damaged, and anything at all (hypothesis)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]
import pyarrow.parquet as pq  # type: ignore[import-untyped,unused-ignore]
import pytest
from hypothesis import HealthCheck, given, settings

from modes_cli.data import DataSpec, SampleSource, open_source, tables
from modes_cli.errors import BadData

Write = Callable[..., Path]
FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(path: Path, *, text_only: bool = False) -> SampleSource:
    return open_source(DataSpec(str(path), None, None), text_only=text_only)


def rows(count: int) -> list[dict[str, Any]]:
    return [{"image": f"{i % 10}.png", "question": f"Which one? {i}", "answer": str(i)} for i in range(count)]


def test_parquet_rows_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"n": list(range(100))}), path, row_group_size=37)
    order = [99, 0, 36, 37, 37, 5, 98, 40, 41, 73, 74]
    assert [row["n"] for _, row in tables.Parquet(path).rows(order, ["n"])] == order  # type: ignore[index]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{oops", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[1]", "holds a list"),
        (b"\xff\xfe", "not UTF-8"),
        (b'"' + b"x" * 2000 + b'"', "more than 1000 bytes"),
    ],
)
def test_bad_lines_are_named_by_number(line: bytes, reason: str, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason.startswith("more"):
        monkeypatch.setattr(tables, "MAX_LINE", 1000)
    path = write(rows(2))
    path.write_bytes(path.read_bytes() + b"\n  \n" + line + b"\n")  # blank lines count as lines, not as samples
    with pytest.raises(BadData, match=rf"`data.jsonl:5`.*{reason}"):
        read(path)
    path.write_bytes(line)
    with pytest.raises(BadData, match=rf"data.jsonl`, line `1`.*{reason}"):
        read(path)


def test_damage_in_the_middle_of_a_parquet_file(tmp_path: Path, png: Callable[..., bytes]) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": [png()] * 50, "question": ["q"] * 50, "answer": ["a"] * 50}), path, row_group_size=10)
    data = bytearray(path.read_bytes())
    data[4 : len(data) // 2] = bytes(len(data) // 2 - 4)
    path.write_bytes(data)
    with pytest.raises(BadData, match="not a readable Parquet file"):
        read(path)


@FEW
@given(
    content=st.binary(max_size=200)
    | st.lists(st.text(max_size=20), max_size=5).map(lambda x: "\n".join(x).encode("utf-8", "replace"))
)
def test_any_bytes_are_read_or_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "any.jsonl"
    path.write_bytes(content)
    with pytest.raises(BadData):
        read(path)


values = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.lists(st.text(max_size=3), max_size=2)
)


@FEW
@given(items=st.lists(st.fixed_dictionaries({"question": values, "answer": values}), min_size=1, max_size=6))
def test_any_json_values_are_read_exactly_or_refused(items: list[dict[str, Any]], tmp_path: Path) -> None:
    def text(value: Any) -> bool:
        return isinstance(value, str) and value.strip() != "" and not any("\ud800" <= c <= "\udfff" for c in value)

    path = tmp_path / "values.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    first = [a[0] if isinstance(a, list) and a else a for a in (item["answer"] for item in items)]
    if all(text(item["question"]) and text(answer) for item, answer in zip(items, first, strict=True)):
        found = [(sample.question, sample.answer) for sample in read(path, text_only=True)]
        assert found == [(item["question"], answer) for item, answer in zip(items, first, strict=True)]
    else:
        with pytest.raises(BadData, match=r"`values.jsonl:\d`: "):
            read(path, text_only=True)
