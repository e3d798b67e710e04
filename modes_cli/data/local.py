"""`--data PATH`: a .jsonl or .parquet file, or a folder that holds one beside its images.

An image is a path relative to the file's folder, a list of such paths, or (in Parquet) bytes or a {bytes, path} struct.
A folder with several data files needs `--split NAME` to pick NAME.jsonl or NAME.parquet.
"""

import os
from array import array
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from random import Random

from modes_cli.data import Use
from modes_cli.data.checked import Candidate, Check, CheckedSource, too_few
from modes_cli.data.images import Unusable, read_inside
from modes_cli.data.rows import RawSample, Row, build, find_layout
from modes_cli.data.sample import DataSpec
from modes_cli.data.tables import JsonLines, Parquet, Table
from modes_cli.errors import BadData, BadOption

KINDS: dict[str, type[JsonLines] | type[Parquet]] = {".jsonl": JsonLines, ".parquet": Parquet}


def claims(source: str) -> bool:
    """What exists, and what can only have been meant as a path."""
    looks_local = source.startswith((".", "/", "~")) or source.endswith(tuple(KINDS)) or source.count("/") > 1
    return looks_local or os.path.exists(source)


def default_split(source: str, use: Use) -> str | None:
    return None


def open_samples(spec: DataSpec, *, text_only: bool) -> CheckedSource:
    """Check the file's samples: all, or `spec.samples` of them drawn with `spec.seed`, in the order of the file.

    Raises:
        BadOption: `--split` where there is nothing to choose from.
        BadData: see open_source.
    """
    path = find_file(spec)
    table: Table = KINDS[path.suffix](path)
    if len(table) == 0:
        raise BadData(f"`{path}` has no samples", hint="choose another file")
    if spec.samples is not None and spec.samples > len(table):
        raise too_few(str(path), spec.samples, len(table))
    layout = find_layout(str(path), table.columns(), spec, text_only=text_only)
    read = partial(read_inside, path.parent)

    def candidates(indices: Iterable[int]) -> Iterator[Candidate]:
        for index, row in table.rows(indices, layout.columns):
            name = f"{path.name}:{table.label(index)}"
            yield Candidate(name, partial(load, row, name, index))

    def load(row: Row | Unusable, name: str, index: int) -> RawSample:
        if isinstance(row, Unusable):
            raise row
        return build(row, name, layout, read, task=path.stem, index=index)

    check = Check(str(path), spec.samples, planned=len(table))
    kept = [raw.index for raw in check.usable(candidates(select(len(table), spec.samples, spec.seed)))]
    return CheckedSource(spec, check, lambda: candidates(kept))


def select(total: int, samples: int | None, seed: int) -> Iterator[int]:
    """Row numbers: all in order; or the first `samples` of a seeded permutation, sorted so that reading is sequential,
    then the rest of the permutation to stand in for rows that are bad."""
    if samples is None or samples >= total:
        yield from range(total)
        return
    rng, order = Random(seed), array("q", range(total))
    for last in range(total - 1, 0, -1):  # only `random()` is promised to stay the same across Python versions
        other = int(rng.random() * (last + 1))
        order[last], order[other] = order[other], order[last]
    yield from sorted(order[:samples])
    yield from order[samples:]


def find_file(spec: DataSpec) -> Path:
    """The one data file that the source and split mean.

    Raises:
        BadOption, BadData: as open_samples.
    """
    path = Path(os.path.expanduser(spec.source))
    if os.path.isfile(path):
        if path.suffix not in KINDS:
            raise BadData(
                f"`{path}` is of a kind that cannot be read", hint=f"use one of {', '.join(KINDS)}, or a folder with one"
            )
        if spec.split is not None:
            raise BadOption(f"`--split {spec.split}` does not apply to the single file `{path}`", hint="leave it out")
        return path
    if not os.path.isdir(path):
        raise BadData(
            f"`{path}` does not exist", hint="give a folder, .jsonl or .parquet file, or a Hugging Face id `owner/name`"
        )
    try:
        files = sorted(file for file in path.iterdir() if file.suffix in KINDS and os.path.isfile(file))
    except OSError as error:
        raise BadData(f"cannot read the folder `{path}`: {error.strerror}", hint="give a folder that you may read") from error
    names = ", ".join(f"`{file.name}`" for file in files[:8]) or "none"
    if spec.split is not None:
        files = [file for file in files if file.stem == spec.split]
        if len(files) != 1:
            raise BadOption(
                f"`--split {spec.split}` names none of the data files of `{path}` ({names}), or several", hint="name one"
            )
    if len(files) != 1:
        raise BadData(
            f"the folder `{path}` has {len(files)} data files ({names}), not one",
            hint="put one .jsonl or .parquet with image, question and answer columns there, or name the file itself",
        )
    return files[0]
