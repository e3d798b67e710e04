"""One writer in a folder, whatever happens to it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from modes_cli.errors import RunLocked, WriteFailed
from modes_cli.locks import FILE, one_writer, replacing_folder

# Holds the lock of a folder until its stdin is closed. With `fork`, a child of it sleeps for longer.
HOLDER = """
import os, sys, time
from pathlib import Path
from modes_cli.locks import one_writer
with one_writer(Path(sys.argv[1]), "calibrate"):
    child = os.fork() if "fork" in sys.argv else None
    if child == 0:
        time.sleep(60)
        os._exit(0)
    print(child or 0, flush=True)
    sys.stdin.read()
"""
WAIT = 30.0  # seconds, on a machine that is busy


class Holder:
    """Another process that has the lock."""

    def __init__(self, folder: Path, *more: str) -> None:
        command = [sys.executable, "-c", HOLDER, str(folder), *more]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.child = int(self.process.stdout.readline())

    def end(self) -> None:
        self.process.communicate()
        assert self.process.returncode == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def test_the_second_process_is_told_who_has_it(tmp_path: Path) -> None:
    holder = Holder(tmp_path)
    try:
        with pytest.raises(RunLocked) as refused, one_writer(tmp_path, "search"):
            pass
        assert (
            f"`{tmp_path}` is in use: `modes calibrate`, process `{holder.process.pid}` on `{os.uname().nodename}`, since 20"
            in str(refused.value)
        )
        assert refused.value.hint == "wait until that has ended, or choose another folder with `--run`"
        assert refused.value.exit_code == 1
        assert [path.name for path in tmp_path.iterdir()] == [FILE]
    finally:
        holder.end()
    assert list(tmp_path.iterdir()) == []
    with one_writer(tmp_path, "search"):
        assert json.loads((tmp_path / FILE).read_text())["process"] == os.getpid()


@pytest.mark.parametrize("more", [(), ("fork",)], ids=["alone", "with a child"])
def test_a_dead_owner_hinders_nobody(tmp_path: Path, more: tuple[str, ...]) -> None:
    """Nor does a child that lives on."""
    holder = Holder(tmp_path, *more)
    holder.kill()
    try:
        assert (tmp_path / FILE).exists()
        with one_writer(tmp_path, "search"):
            assert json.loads((tmp_path / FILE).read_text())["command"] == "modes search"
        assert list(tmp_path.iterdir()) == []
    finally:
        if holder.child:
            os.kill(holder.child, signal.SIGKILL)


def test_an_owner_that_says_nothing_has_it_too(tmp_path: Path) -> None:
    with one_writer(tmp_path, "search"):
        for said in ("", "{", '{"command": 1}', "[" * 10_000, "\0"):
            (tmp_path / FILE).write_text(said)
            with pytest.raises(RunLocked, match="in use: another process, which has not said who it is"):
                _in_a_thread(tmp_path)


def test_steps_of_one_command_share_it_and_threads_do_not(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    with one_writer(tmp_path, "demo"):
        with one_writer(tmp_path / "link", "report"):
            pass
        assert (tmp_path / FILE).exists()
        with pytest.raises(RunLocked, match="`modes demo`"):
            _in_a_thread(tmp_path)
    _in_a_thread(tmp_path)


def _in_a_thread(folder: Path) -> None:
    found: list[BaseException] = []

    def work() -> None:
        try:
            with one_writer(folder, "search"):
                pass
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if found:
        raise found[0]


def test_a_folder_is_made_and_goes_if_nothing_was_written(tmp_path: Path) -> None:
    with one_writer(tmp_path / "a" / "b", "profile"):
        assert (tmp_path / "a" / "b" / FILE).exists()
    assert list(tmp_path.iterdir()) == []
    with one_writer(tmp_path / "a" / "b", "profile"):
        (tmp_path / "a" / "file").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]
    with one_writer(tmp_path / "a" / "c", "profile"):
        (tmp_path / "a" / "c" / FILE).unlink()  # somebody tidies up
        (tmp_path / "a" / "c").rmdir()


@pytest.mark.parametrize("where", ["file", "file/run", "/proc/run"])
def test_no_folder(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteFailed, match=f"cannot write `.*{where}`"), one_writer(tmp_path / where, "profile"):
        pass


def test_a_lock_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    (tmp_path / FILE).symlink_to(tmp_path / "precious")
    with pytest.raises(WriteFailed, match="it is a link"), one_writer(tmp_path, "profile"):
        pass
    assert (tmp_path / "precious").read_text() == "data"


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_where_nothing_can_be_written_nothing_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", refuse)
    with one_writer(tmp_path, "calibrate"):  # which may find that there is nothing to do
        pass


def test_a_full_disk_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "pwrite", full)
    with one_writer(tmp_path, "calibrate"), pytest.raises(RunLocked):
        _in_a_thread(tmp_path)


def test_bundles_are_locked_beside_them(tmp_path: Path) -> None:
    output = tmp_path / "bundles" / "mine"
    with replacing_folder(output, "export"):
        assert [path.name for path in output.parent.iterdir()] == [".mine.lock"]
        with replacing_folder(output.parent / "other", "export"):
            pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """That the file is there is the lock; it is never broken, and the message says what a person can do."""

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    held = tmp_path / f"{FILE}.held"
    with one_writer(tmp_path, "calibrate"):
        with pytest.raises(RunLocked, match=f"`modes calibrate`, process `{os.getpid()}`") as refused:
            _in_a_thread(tmp_path)
        assert f"if it was killed, remove `{held}`" in str(refused.value.hint)
        assert [path.name for path in tmp_path.iterdir()] == [held.name]
    assert list(tmp_path.iterdir()) == []
    _in_a_thread(tmp_path)


# -- many at once -----------------------------------------------------------------------------------------------------

# Two threads that enter and leave, saying so in one file. Appends of a line are whole and in order.
WORKER = """
import os, random, sys, threading, time
from pathlib import Path
from modes_cli.errors import RunLocked
from modes_cli.locks import one_writer
folder, log, seconds = Path(sys.argv[1]), os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND), float(sys.argv[3])
end = time.monotonic() + seconds
def work(name):
    rng = random.Random(name)
    while time.monotonic() < end:
        try:
            with one_writer(folder, "search"):
                os.write(log, f"in {name}\\n".encode())
                time.sleep(rng.random() * 0.003)
                os.write(log, f"out {name}\\n".encode())
        except RunLocked:
            time.sleep(rng.random() * 0.002)
threads = [threading.Thread(target=work, args=(f"{os.getpid()}.{number}",)) for number in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


def test_never_two_at_once(tmp_path: Path) -> None:
    """Threads of four processes, some of which are killed; the folder itself comes and goes with the lock."""
    log, folder, seconds = tmp_path / "log", tmp_path / "run", 4.0
    log.touch()
    rng = random.Random(0)

    def worker() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", WORKER, folder, log, str(seconds)])

    workers, killed = [worker() for _ in range(4)], set[int]()
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [one.kill() for one in workers])
        ended = time.monotonic() + seconds
        while time.monotonic() < ended:
            time.sleep(0.3 + 0.3 * rng.random())
            victim = rng.choice([one for one in workers if one.pid not in killed])
            if len(log.read_bytes()) > 100 and len(killed) < 3:
                victim.kill()
                killed.add(victim.pid)
                workers.append(worker())
        codes = {one.pid: one.wait(WAIT) for one in workers}
    assert {pid for pid, code in codes.items() if code} == killed
    assert len(killed) == 3
    inside: str | None = None
    entered = 0
    for line in _lines(log):
        what, name = line.split()
        if what == "in":
            assert inside is None or int(inside.split(".")[0]) in killed, f"{name} entered while {inside} was in"
            inside, entered = name, entered + 1
        else:
            assert inside == name, f"{name} left while {inside} was in"
            inside = None
    assert entered > 100
    assert [path for path in folder.parent.rglob("*") if path.name == FILE] == []


def _lines(path: Path) -> Iterator[str]:
    yield from path.read_text().splitlines()
