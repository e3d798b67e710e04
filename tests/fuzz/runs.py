"""A target in a process of its own: whoever starts it sees that it ended, and how."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modes_cli.errors import ModesError
from modes_cli.fingerprint import code_digest
from tests.fuzz import engine, places
from tests.fuzz.engine import ENDLESS

ROOT = Path(__file__).parents[2]
MARGIN = 300.0  # seconds for a process to start and end on a busy machine, beyond what it was given to fuzz
COVERED = (
    "modes_cli.export", "modes_cli.data", "modes_cli.run_folder", "modes_cli.artifacts", "modes_cli.unfinished",
    "modes_cli.models.checkpoint", "modes_cli.models.loading", "modes_cli.safetensors_header", "modes_cli.skipping", "zipfile",
    "json.decoder",
)  # fmt: skip


@dataclass(frozen=True)
class Limits:
    engine: str = "plain"
    seconds: float = 60.0
    executions: int = ENDLESS
    seed: int = 0


def has_atheris() -> bool:
    return importlib.util.find_spec("atheris") is not None


def prepare_files(out: Path) -> None:
    """Real artifacts in OUT/files: a bundle that is exported here from a tiny random checkpoint. Made again by other code.

    The same code gives the same bytes, wherever OUT is.
    """
    folder = out.resolve() / "files"
    made_by = folder / "code"
    if made_by.exists() and made_by.read_text("utf-8") == code_digest():
        return
    from modes_cli.export import export_bundle
    from modes_cli.requests import ExportRequest
    from tests.export.bundles import make_checkpoint, make_run

    shutil.rmtree(folder, ignore_errors=True)
    made = folder / "made"
    made.mkdir(parents=True)
    with contextlib.chdir(made):  # paths stand in artifacts
        run = make_run(Path("run"), make_checkpoint(Path("checkpoint")))
        export_bundle(ExportRequest(run=run))
        places.make_files(folder, run / "bundle", Path("checkpoint"))
    shutil.rmtree(made)
    made_by.write_text(code_digest(), "utf-8")


def run(target: str, limits: Limits, out: Path) -> dict[str, Any]:
    """The report of one target. A process that ends in another way than it should is a defect, with the input it was at."""
    path, last, log = (out / f"{target}.{suffix}" for suffix in ("json", "last", "log"))
    for old in (path, last):
        old.unlink(missing_ok=True)
    memory = Path("/dev/shm")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="modes-fuzz-", dir=memory if os.access(memory, os.W_OK) else None) as scratch:
        os.environ |= {places.FILES: str(out / "files"), places.SCRATCH: scratch}
        start = _forked if limits.engine == "plain" else _started
        code = start(target, limits, out, log)
    if path.exists() and code == 0:
        return dict(json.loads(path.read_text("utf-8")))
    report = engine.Report(target, limits.engine, seconds=time.monotonic() - started).__dict__
    how = "did not end in time" if code is None else f"ended with {code}"
    found = {
        "input": last.read_bytes()[:50_000].hex() if last.exists() else "",
        "traceback": log.read_text("utf-8", "replace")[-3000:],
    }
    return {**report, "defects": {f"the process {how}": found}}


def _started(target: str, limits: Limits, out: Path, log: Path) -> int | None:
    """A new process: coverage needs modules that are not imported yet."""
    words = [sys.executable, "-m", "tests.fuzz", target, "--inside", "--engine", limits.engine, "--out", str(out),
             "--seconds", str(limits.seconds), "--executions", str(limits.executions), "--seed", str(limits.seed)]  # fmt: skip
    env = {**os.environ, "PYTHONHASHSEED": "0"}  # the order of sets is part of what coverage sees
    with log.open("wb") as file, contextlib.suppress(subprocess.TimeoutExpired):
        return subprocess.run(
            words, cwd=ROOT, env=env, stdout=file, stderr=file, timeout=limits.seconds + MARGIN, check=False
        ).returncode
    return None


def _forked(target: str, limits: Limits, out: Path, log: Path) -> int | None:
    """A copy of this process, which has imported everything once for all targets."""
    for name in engine.TARGETS:
        importlib.import_module(f"tests.fuzz.harness.{name}")
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            inside(target, limits, out)
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)
    until = time.monotonic() + min(limits.seconds, 3600.0) + MARGIN
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def inside(target: str, limits: Limits, out: Path) -> None:
    """What the process of one target does."""
    last = out / f"{target}.last"
    if limits.engine == "atheris":
        import atheris

        # Modules that the loader of an editable install finds get no counters; this folder has them all.
        sys.meta_path[:] = [finder for finder in sys.meta_path if "Redirecting" not in type(finder).__name__]
        with atheris.instrument_imports(include=list(COVERED)):  # what is imported from here on
            watched = engine.Watched(target, limits.engine, last)
    else:
        watched = engine.Watched(target, limits.engine, last)
    with contextlib.suppress(ModesError):
        watched.module.one(watched.module.seeds()[0])  # what is imported late has its memory before memory is limited
    engine.prepare()
    report, started = watched.report, time.monotonic()

    def done() -> None:
        report.seconds = time.monotonic() - started
        engine.write(report, out / f"{target}.json")
        sys.stdout.flush()
        os._exit(0)  # libFuzzer takes an exit for a crash

    if limits.engine == "atheris":
        engine.with_atheris(watched, limits.executions, limits.seconds, limits.seed, out / "corpus" / target, done)
    engine.plain(watched, limits.executions, limits.seconds, limits.seed)
    done()
