"""Run the named attacks, one test each, and count those that were refused.

    python -m tools.trust [--long] hostile

An attack is refused when its test passes: the command ends with exit code 1 and names the file, or the library raises the error
that makes it do so, before anything is loaded. Memory is how far the test's process grew meanwhile; commands run in processes
of their own, whose memory is not measured.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
SHORT = ("tests/attacks",)
LONG = (*SHORT, "tests/cli/test_damaged_bundle.py", "tests/cli/test_damaged_run.py", "tests/cli/test_damaged_checkpoint.py")
# Tests among them that show what is not refused, and why; they are run, and not counted.
NO_ATTACKS = ("test_nothing_changes", "test_of_another_machine", "test_a_bundle_runs_where_nothing_is_installed",
              "test_any_bytes_are_read_or_refused", "test_any_header_is_read_or_refused",
              "test_export_replaces_nothing_but_bundles")  # fmt: skip
OPERATOR = "operator:"  # begins the names of attacks on inputs, not files
REPORT = "MODES_HOSTILE_REPORT"  # where the plugin below writes


def measure(long: bool) -> dict[str, Any]:
    """Run the attacks. `long`: those on the command line as well.

    Returns:
        {"attacks", "refused", "seconds", "most_bytes", "named": [{"name", "refused", "command", "seconds", "bytes"}]};
        command: whether it was the command, as a process, and not the library.

    Raises:
        RuntimeError: pytest did not run them.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.jsonl"
        environment = {**os.environ, REPORT: str(report), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "tools.trust.hostile", *(LONG if long else SHORT)]
        started = time.monotonic()
        ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if ended.returncode not in (0, 1) or not report.exists():  # 1: some tests failed
            raise RuntimeError(f"pytest ended with {ended.returncode}: {ended.stdout[-2000:]}{ended.stderr[-2000:]}")
        seconds = time.monotonic() - started
        named = [json.loads(line) for line in report.read_text("utf-8").splitlines()]
    return {
        "attacks": len(named),
        "refused": sum(one["refused"] for one in named),
        "seconds": round(seconds, 1),
        "most_bytes": max((one["bytes"] for one in named if one["bytes"] is not None), default=None),
        "named": named,
    }


def rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The result as a table."""
    named, most = result["named"], result["most_bytes"]
    commands = [one for one in named if one["command"]]
    inputs = [one for one in named if one["name"].startswith(OPERATOR)]
    slowest = max(named, key=lambda one: one["seconds"])
    return [
        ("hostile files refused", _share([one for one in named if not one["name"].startswith(OPERATOR)])),
        ("of these by the command, with exit code 1", _share(commands)),
        ("hostile inputs of the operator: an error status, or kept to their token", _share(inputs)),
        ("longest refusal", f"{slowest['seconds']:.2f} s ({slowest['name']})"),
        ("most memory of one test, making the file included", "not measured" if most is None else f"{most / 1e6:.0f} MB"),
    ]


def is_sound(result: dict[str, Any]) -> bool:
    """Whether there were attacks, and every one was refused."""
    return 0 < result["attacks"] == result["refused"]


def _share(attacks: list[dict[str, Any]]) -> str:
    return f"{sum(one['refused'] for one in attacks)} of {len(attacks)}"


# -- the pytest plugin that `measure` loads ---------------------------------------------------------------------------


def _memory(field: str) -> int | None:
    """`VmRSS` or `VmHWM` of this process, in bytes; None where the kernel does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)


_before: int | None = None


def pytest_runtest_setup(item: Any) -> None:
    """Let the most memory be counted anew."""
    global _before
    try:
        Path("/proc/self/clear_refs").write_text("5")
        _before = _memory("VmHWM")
    except OSError:
        _before = None


def pytest_runtest_logreport(report: Any) -> None:
    """Note how an attack ended."""
    where = os.environ.get(REPORT)
    if where is None or (report.when != "call" and report.passed) or report.skipped:
        return
    file, _, test = report.nodeid.partition("::")
    if test.split("[")[0] in NO_ATTACKS:
        return
    on_command = file.startswith("tests/cli/")
    now = _memory("VmHWM")
    grown = None if on_command or _before is None or now is None else max(0, now - _before)
    found = {
        "name": f"{Path(file).stem.removeprefix('test_')}: {test.removeprefix('test_')}",
        "refused": bool(report.passed),
        "command": on_command,
        "seconds": round(report.duration, 3),
        "bytes": grown,
    }
    with Path(where).open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(found, ensure_ascii=True) + "\n")
