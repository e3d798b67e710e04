"""Local tables, row by row and in bounded memory: .jsonl and .parquet."""

import json
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]
import pyarrow.compute as pc  # type: ignore[import-untyped,unused-ignore]
import pyarrow.parquet as pq  # type: ignore[import-untyped,unused-ignore]

from modes_cli.data.images import Unusable
from modes_cli.data.rows import Row
from modes_cli.errors import BadData

MAX_LINE = 16 << 20  # bytes of one .jsonl line
HEAD = 64  # lines that are looked at for column names
BATCH = 16  # parquet rows in memory at a time: they may hold images
MAX_ROW_BYTES = 1 << 30  # of one parquet row, unfolded
MAX_ROWS = 1 << 23  # of one parquet file: the footer may claim any number, and drawing takes time and memory for each


class Table(Protocol):
    """Rows by number. A row that cannot be read is the Unusable that says why, given instead of raised."""

    def __len__(self) -> int: ...

    def columns(self) -> list[str]: ...

    def label(self, index: int) -> int:
        """What people call the row: the line of a .jsonl (from 1), the row of a .parquet (from 0)."""
        ...

    def rows(self, indices: Iterable[int], columns: list[str]) -> Iterator[tuple[int, Row | Unusable]]:
        """Any order is right, ascending order is fast."""
        ...


class JsonLines:
    """A .jsonl file, of which only the line offsets are kept in memory. Blank lines do not count."""

    def __init__(self, path: Path) -> None:
        """Raises BadData when the file cannot be read."""
        self._path = path
        self._offsets, self._lines = array("Q"), array("Q")
        try:
            with path.open("rb") as file:
                self._index(file)
        except OSError as error:
            raise BadData(f"cannot read `{path}`: {error.strerror}", hint="give a .jsonl file that you may read") from error

    def _index(self, file: Any) -> None:
        offset, line, start, blank = 0, 1, 0, True
        while piece := file.readline(1 << 20):  # a line without end is walked through in pieces, never held
            offset += len(piece)
            blank = blank and not piece.strip()
            if piece.endswith(b"\n"):
                self._note(start, line, blank)
                start, line, blank = offset, line + 1, True
        if offset > start:
            self._note(start, line, blank)

    def _note(self, start: int, line: int, blank: bool) -> None:
        if not blank:
            self._offsets.append(start)
            self._lines.append(line)

    def __len__(self) -> int:
        return len(self._offsets)

    def label(self, index: int) -> int:
        return self._lines[index]

    def columns(self) -> list[str]:
        head = [row for _, row in self.rows(range(min(HEAD, len(self))), [])]
        if head and isinstance(head[0], Unusable) and not any(isinstance(row, dict) for row in head):
            raise BadData(f"`{self._path}`, line `{self.label(0)}`: {head[0]}", hint="each line must be a JSON object")
        return list(dict.fromkeys(key for row in head if isinstance(row, dict) for key in row))

    def rows(self, indices: Iterable[int], columns: list[str]) -> Iterator[tuple[int, Row | Unusable]]:
        with self._path.open("rb") as file:
            for index in indices:
                file.seek(self._offsets[index])
                yield index, parse_line(file.readline(MAX_LINE + 1))


def parse_line(line: bytes) -> Row | Unusable:
    """One line of a .jsonl file: an object, or why not."""
    if len(line) > MAX_LINE:
        return Unusable(f"the line has more than {MAX_LINE} bytes", hint="keep images in files of their own, or use .parquet")
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Unusable("the line is not UTF-8")
    except (ValueError, RecursionError) as error:
        return Unusable(f"the line is not JSON: {str(error)[:200]}")
    return row if isinstance(row, dict) else Unusable(f"the line holds a {type(row).__name__}, not an object")


def count_rows(groups: list[int]) -> list[int]:
    """The rows of each row group as the footer claims them, if they can be true.

    Raises:
        ValueError: a negative number, or more than MAX_ROWS together.
    """
    if any(rows < 0 for rows in groups):
        raise ValueError(f"a row group has {min(groups)} rows")
    if sum(groups) > MAX_ROWS:
        raise ValueError(f"it has {sum(groups)} rows, the limit is {MAX_ROWS}")
    return groups


class Parquet:
    """A .parquet file."""

    def __init__(self, path: Path) -> None:
        """Raises BadData when it is no Parquet file, or a damaged one."""
        self._path = path
        try:
            with pq.ParquetFile(path) as file:
                groups = range(file.metadata.num_row_groups)
                self._groups = count_rows([file.metadata.row_group(group).num_rows for group in groups])
                self._columns = [str(name) for name in file.schema_arrow.names]
                # Kept as numbers of entries in a dictionary: a value that stands in many rows is in memory once.
                leaves = (file.schema.column(number) for number in range(len(file.schema)))
                self._texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> BadData:
        reason = (str(error).splitlines() or [""])[0][:200]
        return BadData(
            f"`{self._path}` is not a readable Parquet file: {reason}", hint="write it again, or fetch an undamaged copy"
        )

    def __len__(self) -> int:
        return sum(self._groups)

    def label(self, index: int) -> int:
        return index

    def columns(self) -> list[str]:
        return self._columns

    def rows(self, indices: Iterable[int], columns: list[str]) -> Iterator[tuple[int, Row | Unusable]]:
        """Raises BadData where the file turns out to be damaged."""
        try:
            with pq.ParquetFile(self._path, pre_buffer=False, read_dictionary=self._texts) as file:
                yield from self._walk(file, indices, columns)
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # ValueError: text that is not UTF-8
            raise self._damaged(error) from error

    def _walk(self, file: Any, indices: Iterable[int], columns: list[str]) -> Iterator[tuple[int, Row | Unusable]]:
        batch: Any = None
        group = first = past = end = 0  # the batch holds rows first..past-1 of a group that ends before `end`
        batches: Iterator[Any] = iter(())
        for index in indices:
            if index < first or index >= end:
                group, first = self._group_of(index)
                past, end = first, first + self._groups[group]
                batches = file.iter_batches(batch_size=BATCH, row_groups=[group], columns=columns)
            while index >= past:
                batch = next(batches, None)
                if batch is None:
                    raise OSError(f"row group {group} ends before row {index}")
                first, past = past, past + batch.num_rows
            row = batch.slice(index - first, 1)
            size = sum(_unfolded(column) for column in row.columns)
            if size > MAX_ROW_BYTES:
                yield index, Unusable(f"the row has {size} bytes, the limit is {MAX_ROW_BYTES}")
            else:
                yield index, row.to_pylist()[0]

    def _group_of(self, index: int) -> tuple[int, int]:
        """The row group that holds a row, and its first row."""
        first = 0
        for group, rows in enumerate(self._groups):
            if index < first + rows:
                return group, first
            first += rows
        raise IndexError(index)


def _unfolded(array: Any) -> int:
    """How many bytes the values of an Arrow array take once each stands for itself."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        lengths = pc.binary_length(array.dictionary).take(array.indices)
        return int(pc.sum(pc.cast(lengths, pa.int64())).as_py() or 0)
    if pa.types.is_struct(kind):
        return sum(_unfolded(field) for field in array.flatten())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _unfolded(array.flatten())
    return int(array.nbytes)
