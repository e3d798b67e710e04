"""Writing so that a reader never sees half a file, and digests.

Everything is written to a temporary name in the same folder, synced, renamed, and the folder synced. Killed at any
moment, the old content or the new one stands under the final name.
"""

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from modes_cli.errors import BadArtifact, WriteFailed

CHUNK = 1 << 20


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, all or nothing."""
    with replacing(path) as file:
        file.write(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """An open file that takes the name `path` when the block ends well, and vanishes when it does not.

    Raises:
        WriteFailed: no space, no permission, a read-only folder.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with failing_clearly(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def replace_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a fresh folder beside `path`, then give it the name `path`."""
    temporary, old = path.with_name(f".{path.name}.{os.getpid()}.part"), path.with_name(f".{path.name}.{os.getpid()}.old")
    with failing_clearly(path):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            fill(temporary)
            for file in sorted(temporary.rglob("*")):
                if file.is_file():
                    with file.open("rb") as handle:
                        os.fsync(handle.fileno())
            sync_folder(temporary)
            if path.exists():
                os.rename(path, old)
            os.rename(temporary, path)
            sync_folder(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def failing_clearly(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write into WriteFailed."""
    hints = {
        errno.ENOSPC: "free some space",
        errno.EACCES: "choose a folder you may write to",
        errno.EROFS: "choose a folder you may write to",
    }
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            hint = hints.get(error.errno, "choose another folder")
            raise WriteFailed(f"cannot write `{path}`: {error.strerror}", hint=f"{hint}; the same command continues") from error
        raise


def read_text(path: Path, limit: int) -> str:
    """The text of a file, refusing one larger than `limit` bytes before it is read.

    Raises:
        BadArtifact: too large, or not UTF-8.
    """
    size = path.stat().st_size
    if size > limit:
        raise BadArtifact(str(path), f"size {size} bytes", f"more than the {limit} a file of this kind can have")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise BadArtifact(str(path), f"byte {error.start}", "not UTF-8") from error


def canonical_json(tree: Any) -> str:
    """JSON with a fixed layout: the same content gives the same bytes."""
    import json

    return json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False, sort_keys=False) + "\n"
