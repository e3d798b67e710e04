"""Killed at any moment: what was finished stays valid, and the same command ends with the bytes of an undisturbed run.

A kill before each file operation meets the moments that matter; a few at random times meet the others.
"""

import json
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import DATA, SEARCH
from tests.cli.process import Commands, content
from tests.cli.surviving import LEFTOVER, STEPS, command_line, comparable, differences, invalid
from tests.export.bundles import shared_bundle

KILLS = 2  # at random moments, of each step
MOST_STEPS = 7  # of the places where a command can be cut; which ones is decided by a seed


@pytest.fixture(scope="module")
def old(command: Commands, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder where every step has something to replace: an evaluation, and a bundle of another target."""
    run = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("old") / "run"))
    command("evaluate", *DATA, "--max-new-tokens", 1, "--run", run).ok()
    command("export", "--format", "safetensors", "--target", 0.3, "--run", run).ok()
    return run


def start(step: str, old: Path, command: Commands, checkpoint: Path, folder: Path) -> tuple[Any, ...]:
    """Copy `old` to `folder`; what the step will replace was made with another seed where that makes a difference."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(old, folder)
    if step == "calibrate":
        command("calibrate", checkpoint, *DATA, "--seed", 7, "--fresh", "--run", folder).ok()
    return (*command_line(step, checkpoint), "--fresh", "--run", folder)


def assert_continues(command: Commands, arguments: tuple[Any, ...], folder: Path, expected: dict[str, bytes]) -> None:
    command(*arguments).ok()
    assert differences(folder, expected) == []


@pytest.fixture(scope="module")
def undisturbed(
    command: Commands, tiny_checkpoint: Path, old: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, bytes]]:
    """What each step ends with when nobody stops it."""
    found = {}
    for step in STEPS:
        folder = tmp_path_factory.mktemp(step) / "run"
        command(*start(step, old, command, tiny_checkpoint, folder)).ok()
        found[step] = comparable(folder)
    return found


@pytest.mark.parametrize("step", STEPS)
def test_killed_before_a_file_operation(
    command: Commands, tiny_checkpoint: Path, old: Path, undisturbed: dict[str, dict[str, bytes]], tmp_path: Path, step: str
) -> None:
    folder = tmp_path / "run"
    killed = 0
    for place in places(step):
        arguments = start(step, old, command, tiny_checkpoint, folder)
        ended = command(*arguments, die_at=place, interval=0)
        if ended.code == 0:
            break  # it has fewer
        assert ended.code == -signal.SIGKILL, ended.err
        killed += 1
        assert invalid(folder) == []
        assert_continues(command, arguments, folder, undisturbed[step])
    assert killed >= 3


def places(step: str) -> Iterator[int]:
    """The first operations, and some of the later ones."""
    yield from range(4)
    yield from sorted(random.Random(step).sample(range(4, 16), MOST_STEPS - 4))


@pytest.mark.parametrize("step", STEPS)
def test_killed_at_any_moment(
    command: Commands, tiny_checkpoint: Path, old: Path, undisturbed: dict[str, dict[str, bytes]], tmp_path: Path, step: str
) -> None:
    rng = random.Random(step)
    folder = tmp_path / "run"
    began = time.monotonic()
    command(*start(step, old, command, tiny_checkpoint, folder)).ok()
    usual = time.monotonic() - began
    for _ in range(KILLS):
        arguments = start(step, old, command, tiny_checkpoint, folder)
        command.start(*arguments, interval=0).kill_after(rng.random() * usual).wait()
        assert invalid(folder) == []
        assert_continues(command, arguments, folder, undisturbed[step])


def test_a_calibration_that_was_killed_goes_on(
    command: Commands, tiny_checkpoint: Path, prepared: Path, tmp_path: Path
) -> None:
    """After its first batch was saved; an altered save is not used."""
    run, arguments = tmp_path / "run", ("calibrate", tiny_checkpoint, *DATA, "--run", tmp_path / "run")
    for alter in (False, True):
        assert command(*arguments, die_at=4, interval=0).code == -signal.SIGKILL
        saved = run / "calibration.unfinished.safetensors"
        if alter:
            raw = bytearray(saved.read_bytes())
            raw[-40] ^= 1
            saved.write_bytes(raw)
        assert not (run / "calibration.json").exists()
        command(*arguments).ok()
        for name in ("calibration.json", "calibration.safetensors"):
            assert (run / name).read_bytes() == (prepared / name).read_bytes()
        assert sorted(path.name for path in run.iterdir()) == ["calibration.json", "calibration.safetensors"]
        shutil.rmtree(run)


def test_a_search_that_was_killed_keeps_its_first_target(command: Commands, folder: Path, prepared: Path) -> None:
    (folder / "thresholds.json").unlink()
    arguments = ("search", *SEARCH, "--run", folder)
    assert command(*arguments, die_at=3).code == -signal.SIGKILL
    (kept,) = json.loads((folder / "thresholds.json").read_text())["results"]
    assert kept["target"] == 0.3
    command(*arguments).ok()
    assert content(folder) == content(prepared)


def test_killed_while_graphs_are_exported(command: Commands, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    whole = shared_bundle(tmp_path_factory.getbasetemp())
    run = tmp_path / "run"
    run.mkdir()
    for name in ("calibration.json", "thresholds.json"):
        shutil.copy(whole.parent / name, run)
    arguments = ("export", "--run", run)
    running = command.start(*arguments)
    while not any(path.suffix == ".onnx" for path in run.rglob("*.onnx")):
        time.sleep(0.02)
    assert running.kill_after(0).wait().code == -signal.SIGKILL
    assert not (run / "bundle").exists()
    assert [path.name for path in run.iterdir() if LEFTOVER.search(path.name)]
    command(*arguments).ok()
    assert content(run / "bundle") == content(whole)
    assert not [path.name for path in run.iterdir() if LEFTOVER.search(path.name)]


def test_interrupted(command: Commands, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Ctrl-C is no error to report, and leaves nothing behind."""
    arguments = ("calibrate", tiny_checkpoint, "--data", "digits", "--samples", 500, "--run", tmp_path / "run")
    ended = command.start(*arguments, "--json").kill_after(1.5, signal.SIGINT).wait()
    assert ended.code == 130
    assert "Traceback" not in ended.err
    assert ended.json["error"] | {"hint": ""} == {"kind": "interrupted", "message": "interrupted", "hint": ""}
    assert "same command continues" in ended.err
    assert content(tmp_path) == {}
