"""No disk, no permission, no memory, a shard cut short, a process that dies: what is lost, what is half-written, what a second
try makes. On a tiny random checkpoint, through the real command line: `python -m tools.trust [--long] faults`.

After each fault every file under a final name must have the bytes that it had before, or those that an undisturbed run gives
it, or be a valid artifact (a search keeps the targets that it has finished); then the cause is removed, and the same command
must end with the bytes of the undisturbed run. Measured times, which no two runs share, are left out of that comparison.
"""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.checkpoints import in_shards, write_moe
from tests.cli.process import Commands, content
from tests.cli.test_full import WRITERS, step
from tests.distributed.conftest import calibrate as calibrate_ranks
from tests.distributed.world import Change, World
from tools.trust.tally import Tally

MAKES = {  # what stands before a step runs for the first time
    "profile": ("profile.json",),
    "calibrate": ("calibration.json", "calibration.safetensors", "thresholds.json"),
    "search": ("thresholds.json",),
}
DISKS = {"calibrate": (4, 64), "search": (4,), "export": (4, 256)}  # kB that are free when the step begins
ROOM = "192m"  # of the disk before and after: an export wants 64 MB to spare
FULL, DENIED, MEMORY = "write_failed", "write_failed", "out_of_memory"


@dataclass
class Bench:
    """A checkpoint, a run folder in which every step has been done, and what is compared."""

    root: Path
    command: Commands
    checkpoint: Path
    tally: Tally = field(default_factory=Tally)
    expected: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def prepare(self) -> None:
        self.whole = self.root / "whole"
        for name in ("profile", "calibrate", "search"):
            self.command(*step(name, self.checkpoint), "--run", self.whole).ok()
        for name in WRITERS:
            run = self.before(name)
            self.command(*step(name, self.checkpoint), "--run", run).ok()
            self.expected[name] = content(run)

    def before(self, name: str, folder: Path | None = None) -> Path:
        """A run folder as it is when a step runs for the first time."""
        run = folder or self.root / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(self.whole, run)
        for made in MAKES.get(name, ()):
            (run / made).unlink()
        return run

    def fault(
        self, kind: str, name: str, run: Path, error: str, arguments: Sequence[object] = (), words: str = "", **limits: Any
    ) -> bool:
        """Run a step in which something fails, then look at what is left. False: nothing failed."""
        before, where = content(run), f"{kind}, {name} {limits}"
        ended = self.command(*step(name, self.checkpoint), *arguments, "--run", run, "--json", **limits)
        if not self.tally.broke(kind, where, ended, error, words):
            return False
        self.tally.whole(where, run, before, self.expected[name])
        return True

    def again(self, kind: str, name: str, run: Path) -> None:
        """The same command, with the cause removed."""
        ended = self.command(*step(name, self.checkpoint), "--run", run)
        if ended.code:
            self.tally.problems.append(f"{kind}, {name}: does not continue: {ended.err[-200:]!r}")
        self.tally.same(f"{kind}, {name}", content(run), self.expected[name])


# -- the faults -----------------------------------------------------------------------------------------------------------


def no_larger_files(bench: Bench, long: bool) -> None:
    """A limit on the size of a file stops a write in the middle, wherever a step writes. Messages are files here as well."""
    for name in WRITERS:
        for limit in (500, 2_000, 4_000, 30_000, 100_000, 300_000) if long else (500, 30_000):
            run = bench.before(name)
            if bench.fault("file size", name, run, FULL, words="File too large", file_bytes=limit):
                bench.again("file size", name, run)


@contextlib.contextmanager
def mounted(folder: Path, size: str) -> Iterator[bool]:
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "modes-faults", str(folder)]
    may = os.geteuid() == 0 and shutil.which("mount") is not None and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield may
    finally:
        if may:
            subprocess.run(["umount", folder], check=True)


def full_disk(bench: Bench, long: bool) -> None:
    """A tmpfs with a few kB free, then with room."""
    for name, sizes in DISKS.items():
        for free in [size for base in sizes for size in ((base, 2 * base, 3 * base) if long else (base,))]:
            with mounted(bench.root / "disk", ROOM) as may:
                if not may:
                    bench.tally.not_tried.append("a full disk: no file system may be mounted here")
                    return
                run = bench.before(name, bench.root / "disk" / "run")
                state = os.statvfs(run)
                taken = (state.f_blocks - state.f_bfree) * state.f_frsize // 1024
                resize(bench.root / "disk", f"{taken + free}k")
                broken = bench.fault("full disk", name, run, FULL)
                resize(bench.root / "disk", ROOM)
                if broken:
                    bench.again("full disk", name, run)


def resize(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True, capture_output=True)


def read_only_folder(bench: Bench, long: bool) -> None:
    """A folder that may not be written; for root, one that is immutable."""
    for name in WRITERS:
        run = bench.before(name)
        if not lock(run, True):
            bench.tally.not_tried.append(
                "a read-only folder: root may write everywhere, and nothing can be made immutable here"
            )
            return
        try:
            bench.fault("read-only folder", name, run, DENIED, words="cannot write `")
        finally:
            lock(run, False)
        bench.again("read-only folder", name, run)


def lock(folder: Path, on: bool) -> bool:
    if os.geteuid() != 0:
        folder.chmod(0o555 if on else 0o755)
        return True
    change = ["chattr", "+i" if on else "-i", str(folder)]
    return shutil.which("chattr") is not None and subprocess.run(change, capture_output=True).returncode == 0


def cut_shard(bench: Bench, long: bool) -> None:
    """A checkpoint of several files, one of which ends too early; then it is whole again."""
    shards = sorted(bench.checkpoint.glob("*.safetensors"))
    for name in ("profile", "calibrate", "search", "evaluate", "export"):
        for shard in shards if long else shards[-1:]:
            data = shard.read_bytes()
            for kept in (0, 5, 1000, len(data) // 2, len(data) - 1) if long else (len(data) - 1,):
                run = bench.before(name)
                try:
                    shard.write_bytes(data[:kept])
                    broken = bench.fault("truncated shard", name, run, "bad_artifact", words=shard.name)
                finally:
                    shard.write_bytes(data)
                if broken:
                    bench.again("truncated shard", name, run)
                else:
                    bench.tally.problems.append(f"truncated shard, {name}: `{shard.name}` cut to {kept} bytes is taken")


def no_memory(bench: Bench, long: bool) -> None:
    """A batch that needs more than a process may map."""
    large = ("--samples", 512, "--batch-size", 512, "--fresh")
    for name in ("profile", "calibrate", "evaluate"):
        for more in (50, 100, 150, 200) if long else (150,):
            run = bench.before(name)
            if bench.fault("out of memory", name, run, MEMORY, large, words="out of memory", more_memory=more << 20):
                bench.again("out of memory", name, run)


def dying_ranks(bench: Bench, long: bool) -> None:
    """One of several processes is killed, or runs out of memory, at a batch; the others end, and any number continues."""
    world, tally = World(bench.root / "world"), bench.tally
    try:
        one = bench.root / "one"
        (alone,) = world.run(1, *calibrate_ranks(bench.checkpoint, one))
        assert alone.code == 0, alone.err
        after = content(one)
        for processes in (2, 3):
            for rank in range(processes) if long else (processes - 1,):
                for batch in range(6 // processes) if long else (1,):
                    for kind, change in (
                        ("rank killed", Change(kill_at=batch)),
                        ("rank out of memory", Change(exhaust_at=batch)),
                    ):
                        run = bench.root / "ranks"
                        shutil.rmtree(run, ignore_errors=True)
                        ended = world.run(processes, *calibrate_ranks(bench.checkpoint, run), changes={rank: change})
                        where = f"{kind}, rank {rank} of {processes} at batch {batch}"
                        tally.faults[kind] += 1
                        codes = [-9 if kind == "rank killed" and number == rank else 1 for number in range(processes)]
                        if [process.code for process in ended] != codes:
                            tally.problems.append(f"{where}: ended with {[process.code for process in ended]}")
                        tally.whole(where, run, {}, after)
                        (last,) = world.run(1, *calibrate_ranks(bench.checkpoint, run))
                        if last.code:
                            tally.problems.append(f"{where}: does not continue: {last.err[-200:]!r}")
                        tally.same(where, content(run), after)
    finally:
        world.close()


FAULTS: tuple[Callable[[Bench, bool], None], ...] = (
    no_larger_files, full_disk, read_only_folder, cut_shard, no_memory, dying_ranks,
)  # fmt: skip


def measure(long: bool) -> dict[str, Any]:
    """Every fault, on a checkpoint of two shards; `long`: at more places. Leaves nothing behind."""
    with tempfile.TemporaryDirectory(prefix="modes-faults-") as folder:
        root = Path(folder)
        for name in ("commands", "world"):
            (root / name).mkdir()
        command = Commands(root / "commands")
        try:
            bench = Bench(root, command, in_shards(write_moe(root / "checkpoint")))
            bench.prepare()
            for fault in FAULTS:
                fault(bench, long)
        finally:
            command.close()
    tally = bench.tally
    return {
        "faults": dict(sorted(tally.faults.items())),
        "files_compared": tally.compared_files,
        "bytes_compared": tally.compared_bytes,
        "problems": tally.problems,
        "not_tried": tally.not_tried,
    }


def rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The section of docs/trust.md."""
    faults = result["faults"]
    return [
        ("faults (" + ", ".join(f"{kind} {count}" for kind, count in faults.items()) + ")", f"{sum(faults.values()):,}"),
        ("unclear messages; files lost, half-written, or different in the end", f"{len(result['problems']):,}"),
        ("bytes compared with undisturbed runs", f"{result['bytes_compared']:,} in {result['files_compared']:,} files"),
        *((what, "not tried") for what in result["not_tried"]),
    ]


def is_sound(result: dict[str, Any]) -> bool:
    """Whether there were faults, and every one was met as it should be."""
    return bool(result["faults"]) and not result["problems"]
