"""`calibrate` and `search` as 2 and 3 processes: the bytes of one, and an end together whatever happens to one of them."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from modes_cli.locks import one_writer
from tests.distributed.conftest import calibrate, search
from tests.distributed.world import Change, Process, World
from tests.runs import content

BATCHES = 6
SOON = 20.0  # seconds, on a machine that is busy; a wait for nobody would last 30 minutes


def assert_all_well(ended: list[Process]) -> None:
    assert [process.code for process in ended] == [0] * len(ended), [process.err for process in ended]


def assert_only_the_first_spoke(ended: list[Process]) -> None:
    for process in ended[1:]:
        assert (process.out, process.err) == ("", "")


@pytest.mark.parametrize("processes", [2, 3])
def test_the_same_bytes_as_one_process(
    processes: int, world: World, alone: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ended = world.run(processes, *calibrate(tiny_checkpoint, run), "--json")
    assert_all_well(ended)
    assert_only_the_first_spoke(ended)
    assert json.loads(ended[0].out)["samples"] == 11
    assert [process.batches for process in ended] == [BATCHES // processes] * processes
    again = world.run(processes, *calibrate(tiny_checkpoint, run))  # finished: used again
    assert_all_well(again)
    assert [process.batches for process in again] == [0] * processes

    ended = world.run(processes, *search(run))
    assert_all_well(ended)
    assert_only_the_first_spoke(ended)
    assert "written: " in ended[0].out
    assert content(run) == content(alone)


@pytest.mark.parametrize("samples", [1, 3, 8])
def test_any_number_of_samples(samples: int, world: World, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """One batch for three processes; two; and four, of which the first process gets two."""
    assert_all_well(world.run(1, *calibrate(tiny_checkpoint, tmp_path / "one", samples)))
    ended = world.run(3, *calibrate(tiny_checkpoint, tmp_path / "three", samples))
    assert_all_well(ended)
    assert sum(process.batches for process in ended) == (samples + 1) // 2
    assert content(tmp_path / "one") == content(tmp_path / "three")


def test_killed_and_continued_as_another_number(world: World, alone: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Rank 1 of 3 is killed after the third batch, rank 1 of 2 after the fifth; one process measures the sixth."""
    run = tmp_path / "run"
    arguments = calibrate(tiny_checkpoint, run)
    started = time.monotonic()
    ended = world.run(3, *arguments, changes={1: Change(kill_at=1)})
    assert time.monotonic() - started < SOON
    assert [process.code for process in ended] == [1, -9, 1]
    assert "error: process `0` of 3 has lost another one" in ended[0].err
    assert "the same command continues" in ended[0].err
    assert (run / "calibration.unfinished.safetensors").exists()
    assert not (run / "calibration.json").exists()

    ended = world.run(2, *arguments, changes={1: Change(kill_at=1)})
    assert [(process.code, process.batches) for process in ended] == [(1, 1), (-9, 1)]

    (last,) = world.run(1, *arguments)
    assert (last.code, last.batches) == (0, 1)
    assert content(run) == {name: data for name, data in content(alone).items() if name.startswith("calibration.")}


@pytest.mark.parametrize(
    ("rank", "change", "code", "says"),
    [
        (2, Change(fail_at=1), 1, "error: process `2` of 3: sample `x` is bad"),
        (0, Change(fail_at=0), 1, "error: sample `x` is bad"),
        (1, Change(exhaust_at=1), 1, "error: process `1` of 3: "),
        (1, Change(fail_at=0, error="bug"), 2, "error: process `1` of 3: unexpected KeyError: 'a bug'"),
        (0, Change(fail_writing=True), 1, "error: cannot write `calibration.json`"),
        (1, Change(more=("--seed", "5")), 1, "error: process `1` of 3 has another model, data or library version"),
    ],
    ids=["sample", "first", "memory", "bug", "disk", "disagreement"],
)
def test_an_error_anywhere_ends_all_with_its_code(
    rank: int, change: Change, code: int, says: str, world: World, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    started = time.monotonic()
    ended = world.run(3, *calibrate(tiny_checkpoint, tmp_path / "run"), "--json", changes={rank: change})
    assert time.monotonic() - started < SOON
    assert [process.code for process in ended] == [code] * 3, [process.err for process in ended]
    assert_only_the_first_spoke(ended)
    assert says in ended[0].err
    assert "hint: " in ended[0].err
    assert ended[0].err.count("error: ") == 1
    assert says.removeprefix("error: ") in json.loads(ended[0].out)["error"]["message"]
    assert not (tmp_path / "run" / "calibration.json").exists()


def test_the_lock_is_the_first_process_s(world: World, alone: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Refused, all of them end; and the others of one run do not refuse each other (all tests above)."""
    run = Path(shutil.copytree(alone, tmp_path / "run"))
    with one_writer(run, "evaluate"):
        for arguments in (calibrate(tiny_checkpoint, run), search(run)):
            ended = world.run(2, *arguments, "--json")
            assert [process.code for process in ended] == [1, 1]
            assert_only_the_first_spoke(ended)
            assert json.loads(ended[0].out)["error"]["kind"] == "run_locked"
            assert f"`modes evaluate`, process `{os.getpid()}`" in ended[0].err
    assert content(run) == content(alone)


def test_a_search_that_was_killed_keeps_its_passes(world: World, alone: Path, tmp_path: Path) -> None:
    """Rank 1 of 2 is killed in the middle; what both had found is used by two others."""
    run = Path(shutil.copytree(alone, tmp_path / "run"))
    (run / "thresholds.json").unlink()
    ended = world.run(2, *search(run), changes={1: Change(kill_at_pass=12)})
    assert [process.code for process in ended] == [1, -9], [process.err for process in ended]
    assert (run / "thresholds.unfinished.safetensors").exists()
    assert_all_well(world.run(2, *search(run)))
    assert content(run) == content(alone)


def test_a_search_without_calibration_says_so_once(world: World, tmp_path: Path) -> None:
    ended = world.run(2, *search(tmp_path))
    assert [process.code for process in ended] == [1, 1]
    assert_only_the_first_spoke(ended)
    assert "make it first" in ended[0].err


def test_other_commands_and_usage_errors(world: World, tmp_path: Path) -> None:
    for arguments, code, says in (
        (("export", "--run", tmp_path), 1, "`modes export` runs as one process, not as `2`"),
        (("calibrate", "digits", "--device-map", "auto", "--run", tmp_path), 1, "and `2` processes take one each"),
        (("calibrate", "digits", "--samples", "none"), 2, "Invalid value for `--samples`"),
    ):
        ended = world.run(2, *arguments)
        assert [process.code for process in ended] == [code, code]
        assert_only_the_first_spoke(ended)
        assert says in ended[0].err


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is ``, not a number"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is `2` where WORLD_SIZE is `2`"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE is `two`"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR is not set"),
    ],
)
def test_half_an_environment_is_refused(variables: dict[str, str], says: str, world: World, tmp_path: Path) -> None:
    (ended,) = world.run(1, *calibrate(Path("digits"), tmp_path), **variables)
    assert ended.code == 1
    assert says in ended.err
