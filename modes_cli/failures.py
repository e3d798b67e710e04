"""From an exception to what a user sees: exit code, one or two lines, a hint. Every command ends here when it fails."""

import contextlib
import errno
import json
import re
import sys
import traceback
from dataclasses import dataclass
from typing import Any, TextIO

from modes_cli import ranks
from modes_cli.errors import ModesError, ProcessLost, first_line, is_memory

USAGE = 2
INTERRUPTED = 130

_CONTINUES = "what was finished is valid: the same command continues"


@dataclass(frozen=True)
class Failure:
    """What is shown of an exception. `kind` is for scripts, `hint` says what to do next."""

    kind: str
    message: str
    hint: str | None
    exit_code: int

    def as_object(self) -> dict[str, Any]:
        return {"error": {"kind": self.kind, "message": self.message, "hint": self.hint}}


def describe(error: BaseException) -> Failure:
    """What to show of an exception, whoever raised it."""
    if isinstance(error, ModesError):
        return Failure(error.kind, str(error), error.hint, error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        return Failure("interrupted", "interrupted", _CONTINUES, INTERRUPTED)
    if is_memory(error):
        hint = f"use a smaller `--batch-size`, fewer `--samples` or `--dtype bfloat16`; {_CONTINUES}"
        return Failure("out_of_memory", f"out of memory: `{first_line(error)}`", hint, 1)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        where = f" writing `{error.filename}`" if error.filename else ""
        return Failure("disk_full", f"no space left on the disk{where}", f"free some space; {_CONTINUES}", 1)
    message = f"unexpected {type(error).__name__}: {first_line(error)}"
    return Failure("unexpected", message, "run it again with `--debug` for the traceback, and report it", 2)


def ours_to_tell(error: BaseException) -> bool:
    """Whether this process reports an error: of several, only the first does, unless it cannot have been told."""
    return ranks.is_first() or isinstance(error, ProcessLost)


def usage(message: str, command: str) -> Failure:
    """A command line that does not parse. Typer quotes values; here they stand in backticks, as everywhere."""
    message = re.sub(r"'([^']*)'", r"`\1`", message.replace("Value error, ", ""))
    return Failure("usage", message, f"`{command} --help` lists what there is", USAGE)


def report(
    failure: Failure, *, out: TextIO | None, error: BaseException | None = None, result: dict[str, Any] | None = None
) -> None:
    """Write a failure to stderr, and as part of the one JSON object to `out` (None: not asked for).

    Args:
        error: print its traceback first; only with `--debug`.
        result: what the command had found before it failed; a gate fails after its result is known.
    """
    if error is not None:
        traceback.print_exception(error, file=sys.stderr)
    sys.stderr.write(f"error: {printable(failure.message)}\n")
    if failure.hint:
        sys.stderr.write(f"hint: {printable(failure.hint)}\n")
    sys.stderr.flush()
    if out is not None:
        with contextlib.suppress(OSError):  # it may be stdout that is full; stderr has said so
            out.write(json.dumps({**(result or {}), **failure.as_object()}) + "\n")
            out.flush()


def printable(text: str) -> str:
    """One line that does nothing to a terminal: messages quote names from files that anybody may have written."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
