"""One writer at a time in a folder: a second command is refused, and told who writes there since when.

The lock is the operating system's (`flock`), on a hidden file in the folder: the kernel drops it with the process that holds
it, however that ends, and knows the processes of other containers and, over NFS, those of other machines. What is written into
the file is for people only. It is removed at the end; one that a killed process leaves behind hinders nobody.

Where a file system has no such locks, that the file is there is the lock, and nobody can tell whether its owner still runs: the
message names the file to remove. Where a folder cannot be written, nothing is locked, since nothing can be changed either.

Whoever only reads needs no lock: every file is replaced as a whole.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from modes_cli.errors import RunLocked, WriteFailed
from modes_cli.files import failing_clearly

FILE = ".modes.lock"
_RECORD_LIMIT = 4096  # bytes of a record that are read
_MOMENT = 0.05  # seconds that a new owner has to say who it is
_ATTEMPTS = 100  # each fails only when another process has just removed the file or the folder
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)

# What the running code holds already: a command made of several steps locks once. Other threads begin with none.
_held: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())
_open: set[int] = set()  # descriptors that a forked child gives up, or the lock would outlive its owner

Release = Callable[[], None]


@contextlib.contextmanager
def one_writer(
    folder: Path, command: str, *, name: str = FILE, instead: str = "choose another folder with `--run`"
) -> Iterator[None]:
    """Be the only one who writes in `folder` while the block runs; a block inside another one of the same folder is free.

    Args:
        command: what others are told is running.
        name: of the lock file.
        instead: what else the one can do who is refused.

    Raises:
        RunLocked: another process, or another thread of this one, is at it.
        WriteFailed: the folder or the lock cannot be made.
    """
    with failing_clearly(folder):
        path = Path(os.path.realpath(folder)) / name
        missing = [one for one in (path.parent, *path.parent.parents) if not one.exists()]
    if path in _held.get():
        yield
        return
    with failing_clearly(folder):
        release = _take(path, f"modes {command}", instead)
    before, process = _held.get(), os.getpid()
    _held.set(before | {path})
    try:
        yield
    finally:
        _held.set(before)
        if os.getpid() == process:  # not a forked child on its way out
            release()
            with contextlib.suppress(OSError):  # not empty: that is what it was made for
                for made in missing:
                    made.rmdir()


def replacing_folder(output: Path, command: str) -> contextlib.AbstractContextManager[None]:
    """As `one_writer`, for a folder that is replaced as a whole: the lock lies beside it."""
    return one_writer(output.absolute().parent, command, name=f".{output.name}.lock", instead="choose another `--output`")


def _take(path: Path, command: str, instead: str) -> Release:
    """Lock; what undoes it."""
    for _ in range(_ATTEMPTS):
        try:
            handle = _opened(path)
        except FileNotFoundError:  # whoever made the folder has just removed it
            continue
        if handle is None:
            return _nothing
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            said = _owner(handle)
            os.close(handle)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise RunLocked(
                    f"`{path.parent}` is in use: {said}", hint=f"wait until that has ended, or {instead}"
                ) from error
            if error.errno in _NO_LOCKS:
                return _take_by_name(path, command, instead)
            raise
        if _is(handle, path):
            _open.add(handle)
            _write(handle, command)
            return partial(_release, handle, path)
        os.close(handle)  # its owner removed it between our opening and our locking it
    if path.parent.is_dir():
        raise RunLocked(f"`{path.parent}` is in use: others come and go", hint=f"try again, or {instead}")
    raise PermissionError(errno.EACCES, "no folder can be made there", str(path.parent))  # in places such as /proc


def _opened(path: Path) -> int | None:
    """The lock file, made if it is not there; None where nothing can be made because nothing may be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise WriteFailed(f"cannot lock `{path}`: it is a link", hint="remove it") from error
        if error.errno in _NOT_WRITABLE and not path.exists():
            return None
        raise


def _is(handle: int, path: Path) -> bool:
    """Whether an open file still has its name."""
    try:
        here, there = os.fstat(handle), path.lstat()
    except FileNotFoundError:
        return False
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _release(handle: int, path: Path) -> None:
    with contextlib.suppress(OSError):  # somebody may have removed the whole folder
        if _is(handle, path):  # removed while it is locked: who opened it before finds it gone, and makes a new one
            path.unlink()
    _open.discard(handle)
    os.close(handle)


def _take_by_name(path: Path, command: str, instead: str) -> Release:
    """Without help of the file system: whoever makes the file has the lock, and only people can tell when its owner is dead."""
    held = path.with_name(f"{path.name}.held")
    with contextlib.suppress(OSError):
        path.unlink()
    try:
        handle = os.open(held, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    except FileExistsError as error:
        handle = os.open(held, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        said = _owner(handle)
        os.close(handle)
        hint = f"wait until that has ended, or {instead}; this file system has no locks: if it was killed, remove `{held}`"
        raise RunLocked(f"`{path.parent}` is in use: {said}", hint=hint) from error
    _write(handle, command)
    os.close(handle)
    return partial(held.unlink, missing_ok=True)


def _nothing() -> None:
    pass


def _write(handle: int, command: str) -> None:
    """Say who has it. Nothing depends on it, so a full disk is no obstacle."""
    since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    record = {"command": command, "process": os.getpid(), "host": socket.gethostname(), "since": since}
    with contextlib.suppress(OSError):
        os.ftruncate(handle, 0)
        os.pwrite(handle, (json.dumps(record) + "\n").encode(), 0)


def _owner(handle: int) -> str:
    """Who says to have it, for people."""
    for patience in (_MOMENT, 0.0):
        try:
            said = json.loads(os.pread(handle, _RECORD_LIMIT, 0))
            command, process, host, since = (said[name] for name in ("command", "process", "host", "since"))
            return f"`{command}`, process `{process}` on `{host}`, since {since}"
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            time.sleep(patience)
    return "another process, which has not said who it is"


def _give_up() -> None:
    """In a forked child: closing our copies leaves the parent's lock alone."""
    for handle in _open:
        with contextlib.suppress(OSError):
            os.close(handle)
    _open.clear()


os.register_at_fork(after_in_child=_give_up)
