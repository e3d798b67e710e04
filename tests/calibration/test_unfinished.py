"""A calibration that is stopped goes on, and ends with the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from modes_cli import unfinished
from modes_cli.calibration import calibrate
from modes_cli.data.sample import DataSpec
from modes_cli.requests import CalibrateRequest, ModelSpec


class Stopped(Exception):
    pass


class StopAfter:
    """Progress that ends the run after so many batches."""

    def __init__(self, batches: int) -> None:
        self.left, self.seen, self.notes = batches, 0, list[str]()

    def start(self, label: str, total: int) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)

    def advance(self, pieces: int = 1) -> None:
        self.seen += 1
        self.left -= 1
        if self.left == 0:
            raise Stopped


def request(checkpoint: Path, run: Path, progress: StopAfter, *, seed: int = 0, fresh: bool = False) -> CalibrateRequest:
    data = DataSpec("digits", "validation", 12, seed)
    return CalibrateRequest(ModelSpec(str(checkpoint), device="cpu"), data, run, 4, fresh, progress)


@pytest.fixture(autouse=True)
def _save_every_batch(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.setattr(unfinished, "INTERVAL", 0.0)


def stop_after_two(checkpoint: Path, run: Path) -> None:
    with pytest.raises(Stopped):
        calibrate(request(checkpoint, run, StopAfter(2)))
    assert (run / "calibration.unfinished.safetensors").exists()
    assert not (run / "calibration.json").exists()


def test_a_stopped_calibration_continues_and_gives_the_same_bytes(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    calibrate(request(tiny_checkpoint, whole, StopAfter(99)))
    stop_after_two(tiny_checkpoint, parts)

    from modes_cli.calibration.replay import Replay

    recorded: list[int] = []
    original = Replay.record
    monkeypatch.setattr(Replay, "record", lambda self, batch: recorded.append(1) or original(self, batch))
    calibrate(request(tiny_checkpoint, parts, StopAfter(99)))

    assert len(recorded) == 1  # of three batches, two were done
    for name in ("calibration.json", "calibration.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    assert not (parts / "calibration.unfinished.safetensors").exists()


@pytest.mark.parametrize("change", ["seed", "fresh", "damaged"])
def test_progress_of_something_else_is_not_used(tiny_checkpoint: Path, tmp_path: Path, change: str) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    seed = 1 if change == "seed" else 0
    calibrate(request(tiny_checkpoint, whole, StopAfter(99), seed=seed))
    stop_after_two(tiny_checkpoint, parts)
    if change == "damaged":
        file = parts / "calibration.unfinished.safetensors"
        file.write_bytes(file.read_bytes()[:-100])

    calibrate(request(tiny_checkpoint, parts, StopAfter(99), seed=seed, fresh=change == "fresh"))

    assert (whole / "calibration.json").read_bytes() == (parts / "calibration.json").read_bytes()
