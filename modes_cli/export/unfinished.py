"""Files of a bundle that an export had finished when it was stopped: `.NAME.unfinished` beside the bundle.

Weights and graphs are written there under their final names; a list says every minute which are whole and on the disk. The same
command takes those over after comparing their SHA-256, and writes the others. The folder becomes the bundle at the end.
"""

import json
import shutil
import stat
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic

from modes_cli import files, strict_json
from modes_cli.artifacts.base import first_difference
from modes_cli.artifacts.bundle import BundleFile
from modes_cli.errors import BadArtifact
from modes_cli.progress import Progress
from modes_cli.unfinished import Interval

LIST = "unfinished.json"
LIST_LIMIT = 16 << 20  # bytes


class UnfinishedBundle:
    """The files of `output` that are finished.

    Args:
        fingerprint: everything that must be equal for them to be used, flat.
    """

    def __init__(self, output: Path, fingerprint: Mapping[str, Any], progress: Progress) -> None:
        self.folder = folder_of(output)
        self.files: dict[str, BundleFile] = {}
        self._fingerprint, self._progress = json.loads(json.dumps(fingerprint)), progress
        self._interval, self._turn = Interval(), threading.Lock()
        self._synced: set[str] = set()

    @property
    def bytes(self) -> int:
        """How much need not be written again."""
        return sum(file.bytes for file in self.files.values())

    def restore(self) -> None:
        """Keep what is whole in the folder, and nothing else."""
        listed = self._listed()
        if not listed:
            discard(self.folder)
            return
        for path in self.folder.iterdir():
            known = listed.get(path.name)
            if known is not None and _is_whole(path, known):
                self.files[path.name] = known
            elif path.name == LIST:
                continue
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        self._synced = set(self.files)

    def finished(self, file: BundleFile) -> None:
        """A file is whole. May be called by several threads."""
        with self._turn:
            self.files[file.path] = file
            if not self._interval.due:
                return
            with self._interval.spending():
                for name in sorted(self.files.keys() - self._synced):
                    files.sync_file(self.folder / name)
                    self._synced.add(name)
                tree = {"fingerprint": self._fingerprint, "files": [one.model_dump() for one in self.files.values()]}
                files.write_bytes(self.folder / LIST, files.canonical_json(tree).encode())

    def close(self) -> None:
        """The bundle is whole: what is left is no part of it."""
        (self.folder / LIST).unlink(missing_ok=True)

    def stopped(self) -> None:
        """The export has failed: keep the folder only if something in it is worth it."""
        if not (self.folder / LIST).exists():
            discard(self.folder)

    def _listed(self) -> dict[str, BundleFile]:
        """What the list says; nothing if it is of something else, or cannot be read."""
        path = self.folder / LIST
        if self.folder.is_symlink() or not path.exists():
            return {}
        try:
            tree = strict_json.read(path, LIST_LIMIT)
            if difference := first_difference(tree["fingerprint"], self._fingerprint):
                name, before, now = difference
                self._say(f"is of another export, {name} was `{before}` and is `{now}`")
                return {}
            found = [BundleFile.model_validate(one) for one in tree["files"]]
        except (BadArtifact, KeyError, TypeError, AttributeError, pydantic.ValidationError):
            self._say("is damaged")
            return {}
        return {file.path: file for file in found}

    def _say(self, problem: str) -> None:
        self._progress.note(f"note: `{self.folder}` {problem}; it is not used")


def folder_of(output: Path) -> Path:
    """Where the unfinished files of a bundle lie."""
    return output.with_name(f".{output.name}.unfinished")


def discard(folder: Path) -> None:
    """Remove it, whatever it is."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _is_whole(path: Path, known: BundleFile) -> bool:
    status = path.lstat()
    return stat.S_ISREG(status.st_mode) and status.st_size == known.bytes and files.sha256(path) == known.sha256
