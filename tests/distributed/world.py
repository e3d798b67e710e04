"""One command line as several processes on this machine, the way launchers start them: RANK, WORLD_SIZE and MASTER_*.

`python -m tests.distributed.world` imports the libraries once and forks the processes of each run; one JSON object per line
on stdin asks for a run, one on stdout says how each process ended. Every process has its own sockets, descriptors, exit code.
"""

import gc
import importlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tests.cli.process import ENVIRONMENT, ROOT
from tests.cli.zygote import PRELOADED

LIMIT = 60.0  # seconds; processes that wait for each other for ever end with -9


@dataclass(frozen=True)
class Process:
    """How one process ended; a negative code is the signal that killed it. `batches`: how many it measured."""

    code: int
    out: str
    err: str
    batches: int


@dataclass(frozen=True)
class Change:
    """What is different in one process: it fails, is killed, or needs more memory than it may have when it is about to measure
    its n-th batch (from 0), or fails when it writes calibration.json; or it gets other arguments at the end. `kill_at_pass`:
    before a search measures that batch."""

    kill_at: int | None = None
    fail_at: int | None = None
    exhaust_at: int | None = None
    fail_writing: bool = False
    error: str = "data"  # or "bug"
    more: Sequence[str] = ()
    kill_at_pass: int | None = None


class World:
    """Runs command lines as several processes, one after the other."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        environment = {name: value for name, value in {**os.environ, **ENVIRONMENT}.items() if name != "MODES_RUN"}
        self._zygote = subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.world"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
        )  # fmt: skip
        assert self._zygote.stdout is not None
        assert self._zygote.stdout.readline() == "ready\n"

    def close(self) -> None:
        assert self._zygote.stdin is not None
        assert self._zygote.stdout is not None
        self._zygote.stdin.close()
        self._zygote.stdout.close()
        self._zygote.wait(60)

    def run(
        self, processes: int, *arguments: object, changes: Mapping[int, Change] | None = None, **environment: str
    ) -> list[Process]:
        """The processes of one run, by rank. One process has no launcher's variables."""
        assert self._zygote.stdin is not None
        assert self._zygote.stdout is not None
        asked = {
            "processes": processes,
            "arguments": [str(argument) for argument in arguments],
            "folder": str(self._folder),
            "changes": {str(rank): vars(change) for rank, change in (changes or {}).items()},
            "env": environment,
        }
        self._zygote.stdin.write(json.dumps(asked) + "\n")
        self._zygote.stdin.flush()
        codes = json.loads(self._zygote.stdout.readline())
        return [
            Process(
                code,
                (self._folder / f"out{rank}").read_text("utf-8"),
                (self._folder / f"err{rank}").read_text("utf-8"),
                len((self._folder / f"batches{rank}").read_text("utf-8")),
            )
            for rank, code in enumerate(codes)
        ]


def main() -> None:
    for name in (*PRELOADED, "torch.distributed.distributed_c10d"):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        launch = variables(asked["processes"])
        children = []
        for rank in range(asked["processes"]):
            if (pid := os.fork()) == 0:
                become(asked, rank, {**launch, "RANK": str(rank), "LOCAL_RANK": str(rank)} if launch else {})
            children.append(pid)
        print(json.dumps(wait(children)), flush=True)


def variables(processes: int) -> dict[str, str]:
    if processes == 1:
        return {}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def wait(children: list[int]) -> list[int]:
    codes: dict[int, int] = {}
    end = time.monotonic() + LIMIT
    while len(codes) < len(children):
        for pid in children:
            if pid not in codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(found[1])
            elif pid not in codes and time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in children]


def become(asked: dict[str, Any], rank: int, launch: dict[str, str]) -> NoReturn:
    """One process of a run."""
    folder = Path(asked["folder"])
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), descriptor)
    os.environ.update(launch | asked["env"])
    change = asked["changes"].get(str(rank), {})
    alter(folder / f"batches{rank}", **change)
    from modes_cli import app

    code = 1
    try:
        app.main([*asked["arguments"], *change.get("more", ())])
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
        sys.stdout.flush()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


def alter(
    counted: Path,
    kill_at: int | None = None,
    fail_at: int | None = None,
    exhaust_at: int | None = None,
    fail_writing: bool = False,
    error: str = "data",
    more: Sequence[str] = (),
    kill_at_pass: int | None = None,
) -> None:
    """Save progress after every batch, count measured batches, and do what a Change asks for."""
    from modes_cli import unfinished
    from modes_cli.artifacts import Calibration
    from modes_cli.calibration.replay import Replay
    from modes_cli.errors import BadData, WriteFailed
    from modes_cli.run_folder import RunFolder
    from modes_cli.search.objective import Objective

    unfinished.INTERVAL = 0.0
    counted.write_text("")
    record, write = Replay.record, RunFolder.write

    def recording(self: Replay, batch: Any) -> Any:
        number = len(counted.read_text())
        if number == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == exhaust_at:
            exhaust()
        if number == fail_at:
            raise BadData("sample `x` is bad") if error == "data" else KeyError("a bug")
        counted.write_text("." * (number + 1))
        return record(self, batch)

    def writing(self: RunFolder, artifact: Any) -> Path:
        if fail_writing and isinstance(artifact, Calibration):
            raise WriteFailed("cannot write `calibration.json`: No space left on device", hint="free some space")
        return write(self, artifact)

    damage, searched = Objective._damage, [0]

    def measuring(self: Objective, number: int, batch: Any) -> Any:
        if searched[0] == kill_at_pass:
            os.kill(os.getpid(), signal.SIGKILL)
        searched[0] += 1
        return damage(self, number, batch)

    Objective._damage = measuring  # type: ignore[method-assign]
    Replay.record = recording  # type: ignore[method-assign]
    RunFolder.write = writing  # type: ignore[method-assign]


def exhaust() -> None:
    """Ask for 64 MB where the process may map 16 more."""
    import torch

    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (16 << 20),) * 2)
    torch.zeros(64 << 20, dtype=torch.uint8)


if __name__ == "__main__":
    main()
