"""`modes` as a process: its exit code, what it writes, and what is left when it is stopped."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modes_cli.failures import printable

ROOT = Path(__file__).parent.parent.parent
LIMIT = 120.0  # seconds; a command that waits for ever ends with -9
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "default",
    # What the command sets before it imports libraries, and the forked ones have imported already.
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


@dataclass(frozen=True)
class Ended:
    """How a command ended. A negative code is the signal that killed it."""

    code: int
    out: str
    err: str

    def ok(self) -> "Ended":
        assert self.code == 0, self.err
        return self

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object on stdout; fails where there is anything else."""
        assert self.out.count("\n") == 1, self.out
        found: dict[str, Any] = json.loads(self.out)
        return found

    def refused(self, kind: str, *words: str, code: int = 1, hint: str = "") -> "Ended":
        """As the contract has it: exit code, one line `error:` with a value in backticks, one line `hint:`, an object."""
        lines = self.err.splitlines()
        assert self.code == code, self.err
        assert "Traceback" not in self.err
        assert [line.split(":")[0] for line in lines if line.startswith(("error:", "hint:"))] == ["error", "hint"], self.err
        assert lines[-2].startswith("error: "), self.err
        assert lines[-1].startswith("hint: "), self.err
        assert lines[-2].count("`") >= 2, self.err
        for word in words:
            assert word in lines[-2], (word, self.err)
        assert hint in lines[-1], (hint, self.err)
        if self.out:
            error = self.json["error"]
            assert set(error) == {"kind", "message", "hint"}
            assert error["kind"] == kind
            assert (printable(error["message"]), printable(error["hint"])) == (lines[-2][7:], lines[-1][6:])
        return self


class Running:
    """A command that was started."""

    def __init__(self, zygote: "subprocess.Popen[str]", out: Path, err: Path) -> None:
        assert zygote.stdout is not None
        self._zygote, self._answers, self._out, self._err = zygote, zygote.stdout, out, err
        self._timer: threading.Timer | None = None
        self.pid = int(self._answers.readline())

    def kill_after(self, seconds: float, by: signal.Signals = signal.SIGKILL) -> "Running":
        """Send a signal, unless it has ended by then."""
        self._timer = threading.Timer(seconds, self._kill, [by])
        self._timer.start()
        return self

    def _kill(self, by: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, by)

    def wait(self) -> Ended:
        code = int(self._answers.readline())
        if self._timer is not None:
            self._timer.cancel()
        return Ended(code, self._out.read_text("utf-8"), self._err.read_text("utf-8"))


class Commands:
    """Runs command lines, one at a time. `fork` makes them children of a process that has the libraries loaded."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        environment = {**os.environ, **ENVIRONMENT}
        environment.pop("MODES_RUN", None)
        self._environment = environment
        command = [sys.executable, "-m", "tests.cli.zygote"]
        self._zygote = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )
        assert self._zygote.stdout is not None
        assert self._zygote.stdout.readline() == "ready\n"

    def close(self) -> None:
        assert self._zygote.stdin is not None
        assert self._zygote.stdout is not None
        self._zygote.stdin.close()
        self._zygote.stdout.close()
        self._zygote.wait(60)

    def start(
        self,
        *arguments: object,
        cwd: Path | None = None,
        out: str | None = None,
        file_bytes: int | None = None,
        more_memory: int | None = None,
        die_at: int | None = None,
        interval: float | None = None,
        **environment: str,
    ) -> Running:
        """Start a command.

        Args:
            out: where stdout goes, instead of being kept.
            file_bytes: no file may become larger.
            more_memory: how many bytes more than now the process may map.
            die_at: SIGKILL before the file operation of this number.
            interval: seconds between saves of what is unfinished; 0 saves after every batch.
        """
        kept = self._folder / "out", self._folder / "err"
        kept[0].write_bytes(b"")
        asked = {
            "arguments": [str(argument) for argument in arguments],
            "cwd": str(cwd or self._folder),
            "out": out or str(kept[0]),
            "err": str(kept[1]),
            "env": environment,
            "file_bytes": file_bytes,
            "more_memory": more_memory,
            "die_at": die_at,
            "interval": interval,
        }
        assert self._zygote.stdin is not None
        self._zygote.stdin.write(json.dumps(asked) + "\n")
        self._zygote.stdin.flush()
        return Running(self._zygote, *kept)

    def __call__(self, *arguments: object, **more: Any) -> Ended:
        return self.start(*arguments, **more).kill_after(LIMIT).wait()

    def cold(self, *arguments: object, out: str | None = None) -> Ended:
        """`python -m modes_cli`, with nothing loaded before and nothing changed. `out`: where stdout goes."""
        environment = {k: v for k, v in self._environment.items() if k not in ENVIRONMENT} | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "modes_cli", *(str(argument) for argument in arguments)]
        with open(out or os.devnull, "w") as elsewhere:
            done = subprocess.run(
                command,
                cwd=self._folder,
                env=environment,
                stdout=elsewhere if out else subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        return Ended(done.returncode, done.stdout or "", done.stderr)


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    found = sorted(path for path in folder.rglob("*") if not path.is_dir()) if folder.exists() else []
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}
