"""Two commands on one run folder, or on one bundle: the second one is refused, and told who has it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from modes_cli.locks import FILE
from tests.cli.conftest import DATA, SEARCH
from tests.cli.process import Commands, content
from tests.test_locks import Holder

ARGUMENTS: dict[str, tuple[object, ...]] = {
    "search": SEARCH,
    "export": ("--format", "safetensors"),
    "evaluate": DATA,
    "bench": ("--data", "digits"),
    "report": (),
    "demo": (),
}


@pytest.fixture
def holder(folder: Path) -> Iterator[Holder]:
    holder = Holder(folder)
    yield holder
    holder.kill()


def test_every_command_that_writes_is_refused(command: Commands, tiny_checkpoint: Path, folder: Path, holder: Holder) -> None:
    """Before anything is loaded or written, also where there would be nothing to do."""
    before = content(folder)
    models = {name: (tiny_checkpoint, *DATA) for name in ("profile", "calibrate")}
    for name, arguments in {**models, **ARGUMENTS}.items():
        ended = command(name, *arguments, "--run", folder, "--json")
        owner = f"`{folder}` is in use: `modes calibrate`, process `{holder.process.pid}` on `{os.uname().nodename}`, since 20"
        ended.refused("run_locked", owner, hint="wait until that has ended, or choose another folder with `--run`")
        assert ended.err.count("\n") == 2, ended.err
        assert content(folder) == before, name
    command("profile", tiny_checkpoint, "--plan", "--run", folder).ok()  # which only reads


def test_when_the_owner_is_killed_the_command_goes_on(command: Commands, folder: Path, holder: Holder, prepared: Path) -> None:
    command("report", "--run", folder).refused("run_locked")
    holder.kill()
    assert (folder / FILE).exists()
    command("search", *SEARCH, "--run", folder).ok()
    assert content(folder) == content(prepared)


def test_two_commands_at_once(command: Commands, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """As they are typed. What is killed in the end leaves nothing that the next one minds."""
    run = tmp_path / "run"
    running = command.start("calibrate", tiny_checkpoint, "--data", "digits", "--samples", 2000, "--run", run)
    while not (run / FILE).exists():
        time.sleep(0.01)
    other = command.cold("report", "--run", run)
    running.kill_after(0).wait()
    assert (other.code, f"process `{running.pid}`" in other.err) == (1, True), other.err
    command("report", "--run", run, "--json").refused("missing_artifact", "profile.json")
    assert not run.exists() or content(run) == {}


def test_two_exports_to_one_bundle(command: Commands, folder: Path, tmp_path: Path) -> None:
    """From different run folders; the run folder itself is only read then, and may be in use."""
    output, other = tmp_path / "bundle", shutil.copytree(folder, tmp_path / "other")
    arguments = ("export", "--format", "safetensors", "--output", output, "--run")
    script = f"""
import sys
import time
from pathlib import Path
from modes_cli.locks import replacing_folder
with replacing_folder(Path({str(output)!r}), "export"):
    print(flush=True)
    sys.stdin.read()
"""
    exporting = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert exporting.stdout is not None
    exporting.stdout.readline()
    owner = f"is in use: `modes export`, process `{exporting.pid}`"
    command(*arguments, other, "--json").refused("run_locked", owner, hint="or choose another `--output`")
    assert not output.exists()
    exporting.communicate()
    reading = Holder(folder)
    command(*arguments, folder).ok()
    reading.kill()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "other", "run"]
