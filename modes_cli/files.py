"""Writing so that a reader never sees half a file, and digests.

Everything is written to a temporary name in the same folder, synced, renamed, and the folder synced. Killed at any
moment, the old content or the new one stands under the final name. What a killed process leaves behind has its process
id in its name, and is removed by the next one that writes under the same final name.
"""

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from modes_cli.errors import BadArtifact, WriteFailed

CHUNK = 1 << 20
_AT_FDCWD, _EXCHANGE = -100, 2  # of renameat2, Linux


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


def remove(path: Path) -> None:
    """Remove a file, for good, if it is there, and what is left of attempts to write it."""
    with failing_clearly(path):
        remove_leftovers(path)
        if path.exists():
            path.unlink()
            sync_folder(path.parent)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """An open file that takes the name `path` when the block ends well, and vanishes when it does not.

    Raises:
        WriteFailed: no space, no permission, a read-only folder.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with failing_clearly(path):
        _make_folder(path.parent)
        remove_leftovers(path)
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def replace_folder(
    path: Path, fill: Callable[[Path], None], *, begun: Path | None = None, ready: Callable[[], None] | None = None
) -> None:
    """Let `fill` write into a fresh folder beside `path`, then give it the name `path`.

    Args:
        begun: the folder to fill, beside `path`; it may hold something already, and stays when `fill` fails.
        ready: called when everything is on the disk, just before it gets its name.
    """
    temporary = begun or path.with_name(f".{path.name}.{os.getpid()}.part")
    with failing_clearly(path):
        remove_leftovers(path)
        try:
            if begun is None:
                shutil.rmtree(temporary, ignore_errors=True)
            _make_folder(temporary)
            fill(temporary)
            for file in sorted(temporary.rglob("*")):
                if file.is_file():
                    sync_file(file)
            if ready is not None:
                ready()
            sync_folder(temporary)
            _rename_folder(temporary, path)
            sync_folder(path.parent)
        except BaseException:
            if begun is None:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        shutil.rmtree(temporary, ignore_errors=True)  # what was replaced, if anything


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # in places such as /proc, where nothing can be made
        raise PermissionError(errno.EACCES, "no folder can be made there", str(folder)) from error


def _rename_folder(new: Path, path: Path) -> None:
    """Give `new` the name `path`. A folder that has this name takes the name `new`, in the same instant where possible."""
    if not path.exists():
        os.rename(new, path)
        return
    try:
        exchange = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or a C library without it
        exchange = None
    if exchange is not None and exchange(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(path), _EXCHANGE) == 0:
        return
    # A file system that cannot exchange: for a moment there is no `path`.
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    os.rename(path, old)
    os.rename(new, path)
    shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(path: Path) -> None:
    """Remove what processes that no longer run left behind while they were writing `path`."""
    name = re.compile(rf"\.{re.escape(path.name)}\.(\d+)\.(part|old)")
    for leftover in path.parent.iterdir() if path.parent.is_dir() else ():
        match = name.fullmatch(leftover.name)
        if match is None or _runs(int(match[1])):
            continue
        if match[2] == "old" and not path.exists():  # killed between two renames: this is the last whole one
            os.rename(leftover, path)
        elif leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    if process == os.getpid():
        return False  # nothing of ours is under way when this is asked: an earlier process had the same number
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it runs and is somebody else's
        return True
    return True


def sync_file(path: Path) -> None:
    """Make a file's content survive a power cut."""
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


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
    space, allowed = "free some space", "choose a folder you may write to"
    hints = {errno.ENOSPC: space, errno.EDQUOT: space, errno.EACCES: allowed, errno.EPERM: allowed, errno.EROFS: allowed}
    others = (errno.EFBIG, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG)
    try:
        yield
    except OSError as error:
        if error.errno in hints or error.errno in others:
            hint = hints.get(error.errno or 0, "choose another folder")
            raise WriteFailed(f"cannot write `{path}`: {error.strerror}", hint=f"{hint}; the same command continues") from error
        raise


def read_text(path: Path, limit: int) -> str:
    """The text of a file, refusing one larger than `limit` bytes before it is read.

    Raises:
        BadArtifact: not a regular file, unreadable, too large, or not UTF-8.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would make us wait
            raise BadArtifact(str(path), "file", "not a regular file")
        if status.st_size > limit:
            raise BadArtifact(str(path), f"size {status.st_size} bytes", f"more than the {limit} a file of this kind can have")
        return path.read_text("utf-8")
    except OSError as error:
        raise BadArtifact(str(path), "file", error.strerror or "cannot be read") from error
    except UnicodeDecodeError as error:
        raise BadArtifact(str(path), f"byte {error.start}", "not UTF-8") from error


def canonical_json(tree: Any) -> str:
    """JSON with a fixed layout: the same content gives the same bytes."""
    import json

    return json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False, sort_keys=False) + "\n"
