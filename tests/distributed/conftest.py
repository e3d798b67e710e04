"""Real processes on 127.0.0.1, and what one process makes of the same."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.world import World

SAMPLES = 11  # five batches of two and one of one: 2 and 3 processes do not divide them alike
BATCH = 2


def calibrate(checkpoint: Path, run: Path, samples: int = SAMPLES) -> tuple[object, ...]:
    data = ("--data", "digits", "--samples", samples, "--batch-size", BATCH)
    return ("calibrate", checkpoint, *data, "--device", "cpu", "--run", run)


def search(run: Path) -> tuple[object, ...]:
    return ("search", "--target", 0.3, "--target", 0.5, "--passes", 6, "--device", "cpu", "--run", run)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("world"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def alone(world: World, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder that one process makes."""
    run = tmp_path_factory.mktemp("alone") / "run"
    for arguments in (calibrate(tiny_checkpoint, run), search(run)):
        (only,) = world.run(1, *arguments)
        assert only.code == 0, only.err
    return run
