"""The parts of gpu_check: what each runs, and what it reads from that. Free of torch."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Json = dict[str, Any]

AT_ONCE = 4  # files of tests
LIBRARIES = ("libmodes_cpu.so", "libmodes_cuda.so")
SANITIZER_FAILED, RIGHT = 9, "layers are right"
DECODER = "qwen3-vl-30b-a3b"


@dataclass
class Context:
    """What parts share. `ok`: how those before went."""

    root: Path
    deadline: float
    ok: dict[str, bool] = field(default_factory=dict)

    @property
    def build(self) -> Path:
        return self.root / "build" / "gpu"


@dataclass
class Part:
    """One part while it runs, and what came of it.

    Attributes:
        until: when it is stopped, by the monotonic clock.
        notes: what people should know. results: for the JSON.
    """

    name: str
    until: float
    ok: bool = True
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    results: Json = field(default_factory=dict)

    def fail(self, why: str) -> None:
        self.ok = False
        self.notes.append(why)

    def left(self) -> float:
        return max(0.1, self.until - time.monotonic())

    def said(self) -> str:
        return "".join(f"\n  {note}" for note in self.notes)

    def summary(self) -> Json:
        return {"part": self.name, "ok": self.ok, "seconds": round(self.seconds, 1), "said": self.notes}


@dataclass(frozen=True)
class Ended:
    """`code` is None where it was stopped."""

    code: int | None
    output: str

    @property
    def last(self) -> str:
        """The last line that says something."""
        return next((line.strip() for line in reversed(self.output.splitlines()) if line.strip()), "no output")[:300]


def run(command: list[str], seconds: float, root: Path, **environment: str) -> Ended:
    """A command in a process group of its own, which is killed when the time is up."""
    process = subprocess.Popen(
        command,
        cwd=root,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return Ended(None, output)
    return Ended(process.returncode, output)


def build(context: Context, part: Part) -> None:
    """libmodes_cpu.so and libmodes_cuda.so, to where the package looks for them."""
    cmake = shutil.which("cmake")
    if cmake is None:
        return part.fail("`cmake` is not installed")
    version = re.search(r'^version = "(.+)"', (context.root / "pyproject.toml").read_text(), re.MULTILINE)
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    options = [
        "-DMODES_CUDA=ON",
        "-DCMAKE_CUDA_FLAGS=--threads=4",
        f"-DSKBUILD_PROJECT_VERSION={version[1] if version else ''}",
    ]
    commands = (
        [cmake, "-S", str(context.root / "kernels"), "-B", str(context.build), *generator, *options],
        [cmake, "--build", str(context.build), "--parallel", str(os.cpu_count() or 1)],
    )
    for command in commands:
        ended = run(command, part.left(), context.root)
        if ended.code != 0:
            errors = [line for line in ended.output.splitlines() if re.search(r"\berror\b|Error", line)]
            return part.fail(f"`{' '.join(command[:2])}` {_how(ended)}: {(errors or [ended.last])[0][:300]}")
    target = context.root / "modes_cli" / "lib"
    target.mkdir(exist_ok=True)
    for name in LIBRARIES:
        shutil.copy(context.build / name, target / name)
    return None


def tests(context: Context, part: Part) -> None:
    """Every file with tests that are marked `gpu`, in a process of its own: a kernel that hangs stops one file.

    There is no other runner than pytest: the tests are made of its fixtures and parameters.
    """
    if not context.ok.get("build"):
        return part.fail("not run: there is no library")
    files = sorted(path for path in context.root.glob("tests/**/test_*.py") if _has_gpu_tests(path))
    if not files:
        return part.fail("no file under tests/ has tests for a GPU")

    def one(path: Path) -> Json:
        return test_file(context, path, part.left())

    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(one, files))
    part.results["tests"] = found
    passed, skipped = sum(f["passed"] for f in found), sum(f["skipped"] for f in found)
    part.notes.append(f"{passed} passed, {skipped} skipped in {len(files)} files")
    for file in found:
        for failure in file["failures"]:
            part.fail(f"{file['file']}: {failure}")
    if not passed:
        part.fail("no test ran")
    return None


def _has_gpu_tests(path: Path) -> bool:
    """Those in tests/cuda get a GPU as a parameter, others are marked."""
    return path.parent.name == "cuda" or "mark.gpu" in path.read_text()


def test_file(context: Context, path: Path, seconds: float) -> Json:
    """Counts and failures of one file."""
    report = context.root / "build" / "gpu-tests" / f"{path.parent.name}-{path.stem}.xml"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    # Strictness about settings and warnings is for the versions that the project is developed with.
    options = ["-m", "gpu", "-o", "addopts=--import-mode=importlib", "-o", "filterwarnings=default", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", *options, f"--junitxml={report}", str(path)]
    library = str(context.root / "modes_cli" / "lib" / "libmodes_cuda.so")
    ended = run(command, seconds, context.root, MODES_TEST_CUDA_LIBRARY=library)
    found: Json = {"file": path.relative_to(context.root).as_posix(), "passed": 0, "skipped": 0, "failures": []}
    if report.is_file():
        found |= read_report(report)
    if ended.code not in (0, 5) and not found["failures"]:  # 5: nothing is for a GPU here
        found["failures"].append(f"{_how(ended)}: {ended.last}")
    return found


def read_report(path: Path) -> Json:
    """Counts of a JUnit file, and the first line of each failure."""
    passed, skipped, failures = 0, 0, []
    for case in ElementTree.parse(path).iter("testcase"):
        bad = [child for child in case if child.tag in ("failure", "error")]
        if bad:
            failures.append(f"{case.get('name')}: {(bad[0].get('message') or '').splitlines()[:1]}"[:300])
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return {"passed": passed, "skipped": skipped, "failures": failures}


def layer(context: Context, part: Part) -> None:
    """bench_gpu.py."""
    if not context.ok.get("build"):
        return part.fail("not run: there is no library")
    target, seconds = context.build / "layer.json", part.left() - 5
    target.unlink(missing_ok=True)
    command = [sys.executable, "kernels/bench/bench_gpu.py", "--json", str(target), "--seconds", f"{seconds:.0f}"]
    ended = run(command, part.left(), context.root)
    if target.is_file():
        found = json.loads(target.read_text())
        found.pop("claims")
        part.results["layer"] = found
        part.notes += [f"{_case(e)}: {e['reason']}" for e in found["errors"]]
        part.notes += [f"{_case(r)} is wrong by {r['error']:.1e}" for r in found["rows"] if not r["right"]]
    if ended.code != 0:
        part.fail(f"bench_gpu.py {_how(ended)}" + ("" if target.is_file() else f": {ended.last}"))
    return None


def decoder(context: Context, part: Part) -> None:
    """`modes bench --shape`."""
    if not context.ok.get("build"):
        return part.fail("not run: there is no library")
    folder = context.build / "run"
    target = folder / "bench.json"
    target.unlink(missing_ok=True)
    command = [sys.executable, "-m", "modes_cli", "bench", "--shape", DECODER, "--device", "cuda", "--run", str(folder)]
    ended = run(command, part.left(), context.root)
    if target.is_file():
        part.results["decoder"] = json.loads(target.read_text())
        part.notes += part.results["decoder"].get("notes", [])
        if not any("+modes" in case["runtime"] for case in part.results["decoder"]["cases"]):
            part.fail("nothing was measured with skipping")
    if ended.code != 0:
        errors = [line for line in ended.output.splitlines() if line.startswith("error:") or "Error" in line]
        part.fail(f"`modes bench` {_how(ended)}: {errors[-1][:300] if errors else ended.last}")
    return None


def sanitizer(context: Context, part: Part) -> None:
    """Each of NVIDIA's checkers on small layers, where it is installed and works on this machine."""
    tool = shutil.which("compute-sanitizer") or next(iter(_beside_nvcc("compute-sanitizer")), None)
    if tool is None:
        part.notes.append("compute-sanitizer is not installed")
        return None
    if not context.ok.get("build"):
        return part.fail("not run: there is no library")
    found: Json = {}
    for checker in ("memcheck", "racecheck"):
        half = part.left() / (1 if checker == "racecheck" else 2)
        options = ["--tool", checker, "--error-exitcode", str(SANITIZER_FAILED), "--target-processes", "all"]
        command = [tool, *options, sys.executable, "-m", "kernels.bench.small_layers"]
        ended = run(command, half, context.root, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        found[checker] = sanitizer_said(ended)
        part.notes.append(f"{checker}: {found[checker]}")
        refused = "not supported" in ended.output.lower()  # not on every machine may a program be watched
        if ended.code == SANITIZER_FAILED or (ended.code is not None and RIGHT not in ended.output and not refused):
            part.fail(f"{checker} did not end well")
    part.results["sanitizer"] = found
    return None


def sanitizer_said(ended: Ended) -> str:
    """Its own summary, and the first thing that it found."""
    marked = [line.lstrip("= ").strip() for line in ended.output.splitlines() if line.startswith("=========")]
    summary = next((line for line in reversed(marked) if "SUMMARY" in line), "")
    first = next((line for line in marked if re.search(r"Invalid|Race|hazard|Error|not supported", line)), "")
    if ended.code is None:
        return "stopped: it took too long"
    if summary and "0 errors" not in summary and "0 hazards" not in summary:
        return f"{summary}; {first}"
    return summary or first or ended.last


def onnxruntime(context: Context, part: Part) -> None:
    """The operator in an ONNX Runtime session beside MoE and QMoE, where the package has a CUDA provider."""
    if not context.ok.get("build"):
        return part.fail("not run: there is no library")
    target = context.build / "onnxruntime.json"
    target.unlink(missing_ok=True)
    ended = run([sys.executable, "-m", "kernels.bench.ort_gpu", str(target)], part.left(), context.root)
    if target.is_file():
        part.results["onnxruntime"] = json.loads(target.read_text())
        part.notes += part.results["onnxruntime"]["notes"]
    if ended.code != 0:
        part.fail(f"{_how(ended)}: {ended.last}")
    return None


def _beside_nvcc(name: str) -> Iterator[str]:
    if nvcc := shutil.which("nvcc"):
        toolkit = Path(nvcc).resolve().parents[1]
        for place in (toolkit / "bin" / name, toolkit / "compute-sanitizer" / name):
            if place.is_file():
                yield str(place)


def _how(ended: Ended) -> str:
    return "was stopped: no time left" if ended.code is None else f"ended with {ended.code}"


def _case(row: Json) -> str:
    words = [str(row.get("runtime", "run"))]
    words += [f"T={row['tokens']}"] if "tokens" in row else []
    words += [f"{row['skip_ratio']:.0%} skipped"] if "skip_ratio" in row else []
    return " ".join(words)


# Name, seconds at most, seconds that it should find left at least. What matters most comes first.
PARTS: list[tuple[str, float, float, Callable[[Context, Part], None]]] = [
    ("build", 190, 190, build),
    ("tests", 110, 60, tests),
    ("layer", 150, 90, layer),
    ("decoder", 150, 100, decoder),
    ("sanitizer", 90, 30, sanitizer),
    ("onnxruntime", 40, 10, onnxruntime),
]
