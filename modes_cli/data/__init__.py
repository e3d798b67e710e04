"""Calibration and evaluation samples, from wherever `--data` points.

Every source is one module of this package, named in REGISTRY. It says which values of `--data` are its own (`claims`),
which split a purpose uses by default (`default_split`) and opens them (`open_samples`).
"""

from collections.abc import Iterator
from importlib import import_module
from itertools import islice
from typing import Literal, Protocol, cast

from modes_cli.data.images import check_image_file
from modes_cli.data.sample import DataSpec, Sample, SampleSource
from modes_cli.errors import BadData, BadOption
from modes_cli.progress import Progress

__all__ = ["DataSpec", "Sample", "SampleSource", "Use", "batches", "check_image_file", "default_split", "open_source"]

REGISTRY = ("digits", "presets", "local", "hub")  # asked in this order; a path that exists goes before a Hub id

Use = Literal["calibrate", "evaluate"]


class _SourceModule(Protocol):
    def claims(self, source: str) -> bool: ...

    def default_split(self, source: str, use: Use) -> str | None: ...

    def open_samples(self, spec: DataSpec, *, text_only: bool) -> SampleSource: ...


def open_source(spec: DataSpec, *, text_only: bool = False, progress: Progress | None = None) -> SampleSource:
    """Find, read and check the samples that `spec` asks for. Everything is read once here; iterating decodes again.

    `spec.split` None means the default for calibration. With `text_only` no image is read and samples have none.
    Samples that are left out because they are unusable are named through `progress`.

    Raises:
        BadOption: an option that makes no sense for this source, or a count below one.
        BadData: no such source, missing columns, fewer samples than asked for, or more than 1% of them unusable.
    """
    if spec.samples is not None and spec.samples < 1:
        raise BadOption(f"`--samples {spec.samples}` leaves nothing to read", hint="ask for at least one sample")
    if spec.seed < 0:
        raise BadOption(f"`--seed {spec.seed}` is negative", hint="use 0 or a positive number")
    if text_only and spec.image_column is not None:
        raise BadOption(f"`--image-column {spec.image_column}` and `--text-only` contradict each other", hint="leave one out")
    source = _module_of(spec.source).open_samples(spec, text_only=text_only)
    if progress is not None:
        for reason in source.bad:
            progress.note(f"left out {reason}")
    return source


def default_split(source: str, use: Use) -> str | None:
    """The split a source uses when the user names none: for evaluation never one that calibration saw, where there is
    a choice. None where the source has no splits or only the user can choose.

    Raises:
        BadData: no such source.
    """
    return _module_of(source).default_split(source, use)


def batches(source: SampleSource, size: int) -> Iterator[list[Sample]]:
    """The samples in their order, in lists of `size`; the last may be shorter.

    Raises:
        BadOption: `size` is below one.
    """
    if size < 1:
        raise BadOption(f"`--batch-size {size}` is below one", hint="use 1 or more")
    samples = iter(source)
    return iter(lambda: list(islice(samples, size)), [])


def _module_of(source: str) -> _SourceModule:
    for name in REGISTRY:
        module = cast(_SourceModule, import_module(f"modes_cli.data.{name}"))
        if module.claims(source):
            return module
    from modes_cli.data.presets import PRESETS

    known = ", ".join(f"`{name}`" for name in ("digits", *PRESETS))
    raise BadData(
        f"there is no data set `{source}`: it is neither a preset nor an existing path nor of the form `owner/name`",
        hint=f"use {known}, a Hugging Face id such as `owner/name`, or a folder, .jsonl or .parquet file that exists",
    )
