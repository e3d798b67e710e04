"""What the processes of one run of the tests share: it is made by one of them, and again only where that failed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import conftest
from tests.once import once, shared_base

ROOT = Path(__file__).parent.parent
ASK = """
import sys, time
from pathlib import Path
from tests.once import once
base = Path(sys.argv[1])
def make(folder):
    folder.mkdir()
    (folder / base.name).touch()
    time.sleep(0.3)
    (folder / "last").touch()
print(sorted(path.name for path in once(base, "thing", make).iterdir()))
"""


def test_two_processes_get_what_one_of_them_made(tmp_path: Path) -> None:
    asked = []
    for worker in ("gw0", "gw1"):
        (tmp_path / f"popen-{worker}").mkdir()
        command = [sys.executable, "-c", ASK, str(tmp_path / f"popen-{worker}")]
        environment = {**os.environ, "PYTEST_XDIST_WORKER": worker}
        asked.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True))
    first, second = (process.communicate(timeout=60)[0] for process in asked)
    assert first == second
    assert first in ("['last', 'popen-gw0']\n", "['last', 'popen-gw1']\n")


def test_what_failed_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)

    def fail(folder: Path) -> None:
        folder.mkdir()
        (folder / "half").touch()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        once(tmp_path, "thing", fail)
    assert list(once(tmp_path, "thing", Path.mkdir).iterdir()) == []
    assert once(tmp_path, "thing", fail) == tmp_path / "thing"  # whole now, so not made


def test_one_process_shares_with_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    assert shared_base(tmp_path) == tmp_path
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw3")
    assert shared_base(tmp_path) == tmp_path
    assert shared_base(tmp_path / "popen-gw3") == tmp_path


def test_the_files_that_go_first_are_there() -> None:
    assert [name for name in conftest.LONGEST if not (ROOT / "tests" / name).is_file()] == []
