"""What a command prints: results on stdout, everything else on stderr. The only place that knows about terminals.

While a command runs, file descriptor 1 points at stderr: libraries that print cannot spoil the one JSON object. The
session writes its results to a copy of the real stdout.
"""

import contextlib
import io
import json as jsonlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

import typer

from modes_cli import failures, ranks
from modes_cli.progress import Progress, Silent

if TYPE_CHECKING:
    from rich.console import Console

WIDTH_WITHOUT_TERMINAL = 120  # columns; nothing is cut when a table goes into a file

# Read by these libraries when they are imported, which is later than this.
_QUIET_LIBRARIES = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
_NO_BARS = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


class Lines:
    """Progress where there is no terminal: one line per stage, so that a log shows how far it came."""

    def start(self, label: str, total: int) -> None:
        sys.stderr.write(f"{label} ({total})\n" if total > 1 else f"{label}\n")
        sys.stderr.flush()

    def advance(self, pieces: int = 1) -> None:
        pass

    def note(self, text: str) -> None:
        sys.stderr.write(failures.printable(text) + "\n")
        sys.stderr.flush()


class Session:
    """One run of one command: its progress, its notes and its single result."""

    def __init__(self, out: TextIO, *, json: bool, quiet: bool) -> None:
        self._out = out
        self._json = json
        self._quiet = quiet
        self._began = time.perf_counter()
        self.result: dict[str, Any] | None = None
        self.progress: Progress = Silent() if quiet else Lines()

    @property
    def seconds(self) -> float:
        """Wall time since the command began."""
        return round(time.perf_counter() - self._began, 3)

    def note(self, text: str) -> None:
        """One line on stderr, unless `--quiet`."""
        if not self._quiet:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    def step(self, text: str) -> None:
        """One line for people on stdout while a longer command is under way. Not with `--json`."""
        if not self._json:
            self._console().print(text, markup=False, highlight=False, soft_wrap=True)

    def show(self, result: dict[str, Any], *shown: Any, artifact: object = None) -> None:
        """The command's result: `result` for scripts, `shown` (tables, lines) for people.

        `artifact` is the file that was written, `seconds` how long the command took; both are part of every object.
        """
        self.result = {**result, "artifact": None if artifact is None else str(artifact), "seconds": self.seconds}
        if not self._json:
            console = self._console()
            for item in shown:
                console.print(item, markup=False, highlight=False, soft_wrap=isinstance(item, str))

    def finish(self) -> None:
        """Print the one JSON object. Held back until the end: a gate that fails adds its error to it."""
        if self._json and self.result is not None:
            self._out.write(jsonlib.dumps(self.result, allow_nan=False) + "\n")
        self._out.flush()

    def _console(self) -> "Console":
        from rich.console import Console

        width = None if self._out.isatty() else WIDTH_WITHOUT_TERMINAL
        return Console(file=self._out, width=width, highlight=False)


@contextlib.contextmanager
def session(*, json: bool = False, quiet: bool = False, debug: bool = False) -> Iterator[Session]:
    """Everything a command does happens inside: what it raises is reported here and ends the process.

    Of several processes that share a command, only the first prints.

    Args:
        json: exactly one JSON object on stdout, instead of tables.
        quiet: no progress, no logs.
        debug: tracebacks, and what libraries log.
    """
    first = ranks.is_first()
    quiet = quiet or not first
    with _real_stdout() as out:
        current = Session(out if first else io.StringIO(), json=json, quiet=quiet)
        try:
            with _libraries(quiet=quiet, debug=debug), _bar(current, quiet=quiet):
                yield current
            current.finish()
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except (Exception, KeyboardInterrupt) as error:
            failure = failures.describe(error)
            if failures.ours_to_tell(error):
                failures.report(failure, out=out if json else None, error=error if debug else None, result=current.result)
            raise typer.Exit(failure.exit_code) from error


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Any:
    """A table for people; the first column is left aligned, numbers to the right."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=any(columns))
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        made.add_row(*(cell(value) for value in row))
    return Group(Text(title, style="bold"), made)  # not the table's own title, which is folded to the table's width


def cell(value: object) -> Any:
    """A table cell: never read as markup, floats with four digits."""
    from rich.text import Text

    return Text(f"{value:.4g}" if isinstance(value, float) else str(value))


@contextlib.contextmanager
def _real_stdout() -> Iterator[TextIO]:
    """The stdout that the shell gave us, while everybody else's stdout is stderr."""
    shell = sys.stdout
    try:
        is_descriptor_1 = shell.fileno() == 1
    except (OSError, ValueError, AttributeError):  # replaced by a test, or closed
        is_descriptor_1 = False
    if not is_descriptor_1:
        with contextlib.redirect_stdout(sys.stderr):
            yield shell
        return
    shell.flush()
    copy = os.dup(1)
    out = os.fdopen(os.dup(1), "w", encoding=shell.encoding, errors="backslashreplace")
    try:
        os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.stderr):
            yield out
    finally:
        os.dup2(copy, 1)
        os.close(copy)
        _close(out)


def _close(out: TextIO) -> None:
    try:
        out.close()
    except OSError:  # the reader left (`modes ... | head`), or the disk is full
        if sys.exception() is None:
            raise


@contextlib.contextmanager
def _libraries(*, quiet: bool, debug: bool) -> Iterator[None]:
    """Keep transformers, datasets, tqdm and warnings from talking, unless `--debug`."""
    wanted = {} if debug else dict(_QUIET_LIBRARIES)
    if quiet or not sys.stderr.isatty():
        wanted.update(_NO_BARS)
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update({name: value for name, value in wanted.items() if before[name] is None})
    level = logging.root.level
    try:
        with warnings.catch_warnings():
            if not debug:
                warnings.simplefilter("ignore")
                logging.disable(logging.ERROR if quiet else logging.WARNING)
            yield
    finally:
        logging.disable(logging.NOTSET)
        logging.root.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


@contextlib.contextmanager
def _bar(current: Session, *, quiet: bool) -> Iterator[None]:
    """A progress bar on stderr, where stderr is a terminal and nobody asked for quiet."""
    if quiet or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield
        return
    from modes_cli.progress_bar import Bar

    with Bar() as bar:
        current.progress = bar
        yield
