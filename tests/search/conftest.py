"""Calibrated run folders, made once."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from modes_cli.calibration import calibrate
from tests.once import once
from tests.runs import calibration_request


@pytest.fixture(scope="session")
def calibrated(tiny_checkpoint: Path, one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders of the tiny and of the built-in model; not to be changed."""
    base = tmp_path_factory.getbasetemp()
    return {
        name: once(base, f"calibrated-{name}", lambda run, model=model: calibrate(calibration_request(model, run)))
        for name, model in (("tiny", tiny_checkpoint), ("digits", "digits"))
    }


@pytest.fixture
def fresh_run(calibrated: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """`fresh_run(name, copy="run")`: a copy of a calibrated run folder, to be searched in."""

    def copy(name: str, copy: str = "run") -> Path:
        return Path(shutil.copytree(calibrated[name], tmp_path / copy))

    return copy
