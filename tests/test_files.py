"""Writing all or nothing: whatever happens, what stands under the final name is whole."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modes_cli import files, run_folder
from modes_cli.artifacts import SCHEMAS
from modes_cli.errors import BadArtifact, WriteFailed
from tests import examples

KILLS = 12


def write_half(path: Path, error: Exception) -> None:
    with files.replacing(path) as file:
        file.write(b"half")
        raise error


def test_a_file_is_replaced_and_its_folder_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    for content in (b"one", b"two, longer", b""):
        files.write_bytes(path, content)
        assert path.read_bytes() == content
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_a_block_that_fails_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_bytes(path, b"old")
    with pytest.raises(ZeroDivisionError):
        write_half(path, ZeroDivisionError())
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_refusals_of_the_system_are_explained(tmp_path: Path, code: int) -> None:
    path = tmp_path / "file"
    files.write_bytes(path, b"old")
    with pytest.raises(WriteFailed, match="cannot write") as caught:
        write_half(path, OSError(code, os.strerror(code)))
    assert caught.value.hint is not None
    assert "same command continues" in caught.value.hint
    assert path.read_bytes() == b"old"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_is_really_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".file.full.part").symlink_to("/dev/full")
    monkeypatch.setattr(Path, "with_name", lambda self, name: tmp_path / ".file.full.part")
    with pytest.raises(WriteFailed, match="No space left"):
        files.write_bytes(tmp_path / "file", b"x" * 100_000)
    assert not (tmp_path / "file").exists()


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("not a folder")
    with pytest.raises(WriteFailed):
        files.write_bytes(tmp_path / "run" / "profile.json", b"{}")


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    files.replace_folder(path, lambda folder: (folder / "old").write_text("1") and None)
    files.replace_folder(path, lambda folder: (folder / "new").write_text("2") and None)
    assert [entry.name for entry in path.iterdir()] == ["new"]

    def fail(folder: Path) -> None:
        (folder / "half").write_text("3")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        files.replace_folder(path, fail)
    assert [entry.name for entry in path.iterdir()] == ["new"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["bundle"]


def test_a_folder_is_replaced_where_two_cannot_be_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: object())
    test_a_folder_is_replaced_as_a_whole(tmp_path)


DEAD = 2**22 + 1  # larger than any process id on Linux


def test_leftovers_of_dead_processes_are_removed(tmp_path: Path) -> None:
    running = os.getppid()
    kept = [f".file.{running}.part", ".file.1x.part", f".file2.{DEAD}.part", f"file.{DEAD}.part", f".file.{DEAD}.partial"]
    for name in (*kept, f".file.{DEAD}.part", f".file.{DEAD + 1}.old"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / f".file.{DEAD + 2}.part").mkdir()
    (tmp_path / f".file.{DEAD + 2}.part" / "inner").write_bytes(b"half")
    files.write_bytes(tmp_path / "file", b"whole")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([*kept, "file"])


def test_a_folder_that_was_moved_away_comes_back(tmp_path: Path) -> None:
    """Killed between two renames, a file system that cannot exchange has the last whole bundle under another name."""
    (tmp_path / f".bundle.{DEAD}.old").mkdir()
    (tmp_path / f".bundle.{DEAD}.old" / "whole").write_text("1")
    with pytest.raises(ZeroDivisionError):
        files.replace_folder(tmp_path / "bundle", lambda folder: 1 // 0 and None)
    assert [entry.name for entry in tmp_path.iterdir()] == ["bundle"]
    assert (tmp_path / "bundle" / "whole").read_text() == "1"


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadArtifact, match="not a regular file"):
        files.read_text(tmp_path / "pipe", 10)


def test_text_that_is_too_large_or_no_text(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"x" * 11)
    (tmp_path / "binary").write_bytes(b"ab\xff")
    with pytest.raises(BadArtifact, match="size 11"):
        files.read_text(tmp_path / "large", 10)
    with pytest.raises(BadArtifact, match="byte 2"):
        files.read_text(tmp_path / "binary", 10)


REWRITE = """
import sys
from pathlib import Path
from modes_cli.artifacts import SCHEMAS
from modes_cli.run_folder import RunFolder, read_json
folder, example = Path(sys.argv[1]), Path(sys.argv[2])
thresholds = read_json(example, SCHEMAS["thresholds"])
versions = [thresholds.model_copy(update={"results": thresholds.results[:n], "model_passes": float(n)}) for n in (1, 2, 3)]
print("ready", flush=True)
while True:
    for version in versions:
        RunFolder(folder).write(version)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_killed_at_any_moment_the_artifact_is_whole(tmp_path: Path) -> None:
    rng = random.Random(0)
    found = set()
    for _ in range(KILLS):
        command = [sys.executable, "-c", REWRITE, str(tmp_path), str(examples.path("thresholds"))]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            time.sleep(0.02 + rng.random() * 0.1)
            process.send_signal(signal.SIGKILL)
        path = tmp_path / "thresholds.json"
        if path.exists():  # the first one may be killed before its first write
            artifact = run_folder.read_json(path, SCHEMAS["thresholds"])
            found.add(artifact.model_passes)
    assert found <= {1.0, 2.0, 3.0}
    assert found
