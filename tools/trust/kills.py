"""SIGKILL at random moments and before file operations of every step, and what is left: `python -m tools.trust --long kills`.

Two ways in turn: a step that replaces what an earlier one wrote (`--fresh`), and one that runs for the first time, saves what
is unfinished after every batch, and is continued. After each kill, whatever stands under a final name must be valid, the same
command must end well, and the run folder must have the bytes of one that nobody disturbed, measured times apart. The model is
a tiny random Qwen3-VL-MoE; commands are forked from a process that has the libraries loaded.
"""

import contextlib
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.checkpoints import write_moe
from tests.cli.process import Commands
from tests.cli.surviving import STEPS, command_line, comparable, differences, invalid

KILLS = {True: 30, False: 2}  # at random moments of each step
OPERATIONS = {True: 14, False: 3}  # file operations before which a step is killed, at most
LATE = 20  # times a command may end before it is killed, for each kill
FIRST = {
    "profile": ("profile.json",),
    "calibrate": ("calibration.json", "calibration.safetensors", "thresholds.json", "evaluation.json", "bundle"),
    "search": ("thresholds.json", "evaluation.json", "bundle"),
    "evaluate": ("evaluation.json",),
    "export": ("bundle",),
}


@dataclass
class Counts:
    """Of one step. `continued`: runs after a kill that found unfinished work (of `export`, its folder) and were not told to
    begin again. `differences`: what did not hold.
    """

    random_kills: int = 0
    operation_kills: int = 0
    survived: int = 0
    continued: int = 0
    bytes_compared: int = 0
    differences: list[str] = field(default_factory=list)


def measure(long: bool) -> dict[str, Any]:
    """Kill every step; counts by step, and `seconds`."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, _commands(Path(folder)) as commands:
        bench = _Bench(Path(folder), commands)
        found = {step: asdict(bench.kill(step, long)) for step in STEPS}
    return {"commands": found, "random_each": KILLS[long], "seconds": round(time.monotonic() - began, 1)}


def is_sound(result: dict[str, Any]) -> bool:
    """Whether every step was killed as often as it should be, and nothing differed."""
    return all(one["random_kills"] == result["random_each"] and not one["differences"] for one in result["commands"].values())


def rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What, and its number."""
    found = list(result["commands"].values())

    def total(name: str) -> int:
        return sum(one[name] for one in found)

    kills = total("random_kills") + total("operation_kills")
    return [
        ("kills at random moments", f"{total('random_kills')}"),
        ("kills before file operations", f"{total('operation_kills')}"),
        ("kills survived", f"{total('survived')} of {kills}"),
        ("runs that began with unfinished work", f"{total('continued')}"),
        ("bytes compared", f"{total('bytes_compared'):,}"),
        ("differences", f"{sum(len(one['differences']) for one in found)}"),
    ]


@contextlib.contextmanager
def _commands(folder: Path) -> Iterator[Commands]:
    commands = Commands(folder)
    try:
        yield commands
    finally:
        commands.close()


class _Bench:
    """A run folder that has everything, and what to do to copies of it."""

    def __init__(self, folder: Path, commands: Commands) -> None:
        self._commands, self._run, self._old = commands, folder / "run", folder / "old"
        self._checkpoint = write_moe(folder / "checkpoint")
        for step in STEPS:
            options = ("--max-new-tokens", 1) if step == "evaluate" else ("--target", 0.3) if step == "export" else ()
            commands(*command_line(step, self._checkpoint), *options, "--run", self._old).ok()
        self._other = Path(shutil.copytree(self._old, folder / "other"))  # with a calibration on other samples
        commands(*command_line("calibrate", self._checkpoint), "--seed", 7, "--fresh", "--run", self._other).ok()

    def kill(self, step: str, long: bool) -> Counts:
        counts, rng = Counts(), random.Random(step)
        expected, usual = dict[bool, dict[str, bytes]](), dict[bool, float]()
        for fresh in (True, False):
            arguments = self._start(step, fresh)
            began = time.monotonic()
            self._commands(*arguments, interval=0).ok()
            usual[fresh], expected[fresh] = time.monotonic() - began, comparable(self._run)
        for number in range(KILLS[long]):
            fresh = number % 2 == 0
            for _ in range(LATE):
                arguments = self._start(step, fresh)
                began = time.monotonic()
                ended = self._commands.start(*arguments, interval=0).kill_after(rng.random() * usual[fresh]).wait()
                usual[fresh] = min(usual[fresh], time.monotonic() - began) if ended.code == 0 else usual[fresh]
                if ended.code == -signal.SIGKILL:
                    counts.random_kills += 1
                    self._judge(counts, f"{step}, random kill {number}", arguments, expected[fresh])
                    break
        for place in range(OPERATIONS[long]):
            fresh = place % 2 == 0
            arguments = self._start(step, fresh)
            if self._commands(*arguments, interval=0, die_at=place).code == -signal.SIGKILL:
                counts.operation_kills += 1
                self._judge(counts, f"{step}, file operation {place}", arguments, expected[fresh])
        return counts

    def _start(self, step: str, fresh: bool) -> tuple[Any, ...]:
        """A run folder where the step has something to replace, or has not run yet."""
        shutil.rmtree(self._run, ignore_errors=True)
        shutil.copytree(self._other if fresh and step == "calibrate" else self._old, self._run)
        for name in () if fresh else FIRST[step]:
            path = self._run / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return (*command_line(step, self._checkpoint), *(("--fresh",) if fresh else ()), "--run", self._run)

    def _judge(self, counts: Counts, what: str, arguments: tuple[Any, ...], expected: dict[str, bytes]) -> None:
        wrong = [f"not valid: {problem}" for problem in invalid(self._run)]
        if any(".unfinished" in path.name for path in self._run.iterdir()):
            counts.continued += "--fresh" not in arguments
        ended = self._commands(*arguments, interval=0)
        wrong += [] if ended.code == 0 else [f"exit code {ended.code}: {ended.err.strip()[-200:]}"]
        wrong += [f"`{name}` differs" for name in differences(self._run, expected)]
        counts.bytes_compared += sum(map(len, expected.values()))
        counts.survived += not wrong
        counts.differences += [f"{what}: {one}" for one in wrong]
