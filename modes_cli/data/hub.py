"""`--data owner/name` (or `owner/name:config`): a data set on the Hugging Face Hub, streamed.

Only what is used is downloaded. The samples are kept in a temporary file, so that iterating again needs no network and
gives the same. With HF_HUB_OFFLINE=1 the data set is taken from the local cache of `datasets`, which is divided in
another way than the Hub's files: the same seed may then draw other samples.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from modes_cli.data import Use
from modes_cli.data.checked import Candidate, Check, CheckedSource
from modes_cli.data.images import MAX_IMAGE_BYTES, Unusable, read_inside
from modes_cli.data.rows import Layout, RawSample, Reader, Row, build, find_layout
from modes_cli.data.sample import DataSpec
from modes_cli.data.spool import Spool
from modes_cli.errors import BadData, ModesError

ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?")
SHUFFLE_BUFFER = 256  # encoded rows in memory


def claims(source: str) -> bool:
    return ID.fullmatch(source) is not None


def default_split(source: str, use: Use) -> str | None:
    return None


def open_samples(spec: DataSpec, *, text_only: bool) -> CheckedSource:
    """Check the samples of one split: all, or `spec.samples` from a stream shuffled with `spec.seed`.

    Raises:
        BadData: see open_source; also when the Hub, the data set, the configuration or the split cannot be found.
    """
    dataset, _, config = spec.source.partition(":")
    rows = stream(dataset, config or None, spec.split)
    layout = find_layout(spec.source, column_names(dataset, rows), spec, text_only=text_only)
    rows = shuffled(select(rows, layout.columns), spec)
    return take(spec, dataset, rows, layout, f"{spec.source}/{rows.split or 'all'}", task=dataset.rpartition("/")[2])


def take(
    spec: DataSpec,
    dataset: str,
    rows: Iterable[Row],
    layout: Layout,
    prefix: str,
    *,
    task: str | Callable[[Row], str],
    wanted: Callable[[Row], bool] | None = None,
    complete: Callable[[Row], Row] | None = None,
) -> CheckedSource:
    """Check rows as they come and keep them.

    Args:
        prefix: what sample ids begin with.
        wanted: rows for which this is false are passed over, as if they were not there.
        complete: adds to a row what the table does not hold; raises Unusable.
    """
    check, spool, read = Check(spec.source, spec.samples), Spool(), reader(dataset)

    def candidates() -> Iterator[Candidate]:
        for index, row in enumerate(row for row in rows if wanted is None or wanted(row)):
            name = sample_name(prefix, row, layout, index)
            said = task if isinstance(task, str) else task(row)
            yield Candidate(name, partial(load, row, name, said))

    def load(row: Row, name: str, said: str) -> RawSample:
        return build(row if complete is None else complete(row), name, layout, read, task=said)

    with reaching(dataset):
        for raw in check.usable(candidates()):
            spool.add(raw)
    return CheckedSource(spec, check, spool.candidates)


def sample_name(prefix: str, row: Row, layout: Layout, index: int) -> str:
    """The row's own id where it has one, otherwise its place in the stream."""
    own = row.get(layout.id) if layout.id is not None else None
    usable = isinstance(own, (str, int)) and not isinstance(own, bool) and str(own).isprintable() and 0 < len(str(own)) <= 200
    return f"{prefix}/{own if usable else index}"


def stream(dataset: str, config: str | None, split: str | None) -> Any:
    """A `datasets.IterableDataset` of one split whose images are left encoded, as {bytes, path}.

    Raises:
        BadData: it cannot be found or reached, or there are several splits and none was named.
    """
    import datasets  # type: ignore[import-untyped,unused-ignore]
    from huggingface_hub import constants

    datasets.disable_progress_bars()  # the core shows nothing by itself
    with reaching(dataset):
        found: Any = datasets.load_dataset(dataset, config, streaming=not constants.HF_HUB_OFFLINE)
        if split not in found:
            names = ", ".join(f"`{name}`" for name in found)
            if split is not None:
                raise BadData(f"`{dataset}` has no split `{split}`; it has {names}", hint="choose one of them with `--split`")
            if len(found) != 1:
                raise BadData(f"`{dataset}` has several splits: {names}", hint="choose one with `--split`")
            split = next(iter(found))
        rows = found[split]
        return (rows.to_iterable_dataset() if isinstance(rows, datasets.Dataset) else rows).decode(False)


def select(rows: Any, columns: list[str]) -> Any:
    """Only these columns, so that no others are downloaded; those that do not exist are left out."""
    there = rows.column_names
    return rows.select_columns([column for column in dict.fromkeys(columns) if there is None or column in there])


def shuffled(rows: Any, spec: DataSpec) -> Any:
    """In the seed's order when only some are taken; as they are otherwise."""
    return rows if spec.samples is None else rows.shuffle(seed=spec.seed, buffer_size=SHUFFLE_BUFFER)


def half_of(key: object) -> int:
    """0 or 1 from a row's name: the same everywhere, and independent of the order of the rows."""
    return hashlib.sha256(str(key).encode("utf-8", "replace")).digest()[0] & 1


def column_names(dataset: str, rows: Any) -> list[str]:
    """From the metadata, or the first row where there is none."""
    if rows.column_names is not None:
        return [str(name) for name in rows.column_names]
    with reaching(dataset):
        return [str(name) for name in next(iter(rows), {})]


def reader(dataset: str) -> Reader:
    """Opens images that a data set keeps beside its tables: those within the same data set, nothing else."""
    folder = Path(dataset)
    inside = re.compile(rf"([a-z0-9]+://[^:]*::)?hf://datasets/{re.escape(dataset)}[@/].*", re.DOTALL)

    def read(name: str) -> bytes:
        if folder.is_dir():  # a copy on this disk
            path = Path(name)
            return read_inside(folder, str(path.relative_to(folder)) if path.is_relative_to(folder) else name)
        if inside.fullmatch(name) is None or "/../" in name:
            raise Unusable(f"image `{name}` leads out of the data set")
        import fsspec  # type: ignore[import-untyped,unused-ignore]

        try:
            with fsspec.open(name, "rb") as file:
                data: bytes = file.read(MAX_IMAGE_BYTES + 1)
        except FileNotFoundError as error:
            raise Unusable(f"image `{name}` does not exist") from error
        if len(data) > MAX_IMAGE_BYTES:
            raise Unusable(f"image `{name}` has more than {MAX_IMAGE_BYTES} bytes")
        return data

    return read


@contextmanager
def reaching(dataset: str) -> Iterator[None]:
    """Say clearly what went wrong with a data set on the Hub. The libraries below raise errors of many families
    (OSError, ValueError, RuntimeError, httpx, Arrow), and each may mean that it cannot be read."""
    try:
        yield
    except (ModesError, MemoryError):
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise BadData(
            f"the data set `{dataset}` cannot be read from the Hugging Face Hub: {reason}",
            hint="check the name and the network, `hf auth login` if it is private or gated; or give a local file to `--data`",
        ) from error
