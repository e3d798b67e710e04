"""Noticing that a folder changes while it is checked or loaded: what was digested must be what was used."""

import stat
from collections.abc import Iterator
from pathlib import Path

from modes_cli.errors import BadArtifact

State = tuple[int, ...]


class Watch:
    """The state of every file of a folder, from now on.

    The kernel sets the time of the last change of a file (ctime) at each write, rename, link or change of rights, and lets
    nobody set it back; so a file that was altered and restored is noticed as well.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._states = folder, _states(folder)

    def require_unchanged(self) -> None:
        """Raises BadArtifact, naming the first file that is no longer what it was."""
        now = _states(self._folder)
        for path in sorted(self._states.keys() | now.keys()):
            if self._states.get(path) != now.get(path):
                raise BadArtifact(
                    str(path), "file", "changed while it was checked", hint="let nothing write in the folder, and try again"
                )


def _states(folder: Path) -> dict[Path, State]:
    try:
        return {path: _state(path) for path in (folder, *walk(folder))}
    except OSError:  # it is no folder, or something in it has just gone: the comparison, or the check, says what is missing
        return {}


def _state(path: Path) -> State:
    status = path.lstat()
    return status.st_dev, status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def walk(folder: Path) -> Iterator[Path]:
    """Everything below a folder, in order; links are named, not followed."""
    for path in sorted(folder.iterdir()):
        yield path
        if stat.S_ISDIR(path.lstat().st_mode):
            yield from walk(path)
