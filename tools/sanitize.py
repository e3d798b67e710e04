"""Run the kernel tests on libraries built with sanitizers: `make sanitize`.

    python -m tools.sanitize [address] [thread] [emulated]

address: invalid memory accesses and undefined behaviour, once for every instruction set that this machine has, and leaks;
thread: data races. emulated, only when asked for: invalid accesses of the CUDA kernels, on the emulator. Each has a library
of its own under build/sanitize; what is installed is left alone.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tools.cmake import find_cmake

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "sanitize"
KERNELS, TESTS = ROOT / "kernels", ROOT / "tests" / "kernels"
COMPILER = os.environ.get("CXX", "g++")
INSTRUCTION_SETS = ("avx512_bf16", "avx512", "avx2", "baseline")  # widest first
ARITHMETIC = ("isa", "memory", "shapes", "skip_experts", "threads")  # what differs between them
ONCE = ("onnx_op", "torch_operator", "route", "quantised")  # the last goes through all of them by itself
EMULATED = ("layer", "decode", "hopper", "mma", "float")
# Python, torch and the test tools leak at exit; the driver below has none of them, and is checked for leaks.
FLAGS = {"address": "-fsanitize=address,undefined -fno-sanitize-recover=undefined", "thread": "-fsanitize=thread"}


def run(*words: str | Path, **environment: str) -> None:
    print("+", *(f"{name}={value}" for name, value in environment.items()), *words, flush=True)
    subprocess.run([str(word) for word in words], cwd=ROOT, env={**os.environ, **environment}, check=True)


def cmake() -> str:
    """A CMake that is new enough; installed next to this Python where there is none."""
    found = find_cmake()
    if found is None:
        run(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "cmake>=3.24")
    return found or str(Path(sys.executable).parent / "cmake")


def build_library(name: str, sanitizer: str, *options: str) -> Path:
    """Folder of the kernel libraries, built without a CUDA compiler."""
    folder, make = BUILD / name, cmake()
    compiler = f"-DCMAKE_CXX_COMPILER={COMPILER}"
    run(make, "-S", KERNELS, "-B", folder, f"-DMODES_SANITIZE={sanitizer}", "-DMODES_CUDA=OFF", compiler, *options)
    run(make, "--build", folder, "--parallel", str(len(os.sched_getaffinity(0))))
    return folder


def build(sanitizer: str) -> tuple[Path, Path]:
    """The library and tests/kernels/self_check.cpp, both with the sanitizer."""
    folder = build_library(sanitizer, sanitizer)
    library, check = folder / "libmodes_cpu.so", folder / "self_check"
    run(COMPILER, "-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", *FLAGS[sanitizer].split(),
        f"-I{KERNELS / 'include'}", TESTS / "self_check.cpp", library, "-o", check)  # fmt: skip
    return library, check


def runtime(name: str) -> str:
    """A library of the compiler's, by its full path."""
    done = subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def instruction_sets(library: Path) -> tuple[str, ...]:
    """Those that this machine has: the one the library takes unless told otherwise, and all narrower ones."""
    code = (
        "import ctypes, sys; isa = ctypes.CDLL(sys.argv[1]).modes_cpu_isa; isa.restype = ctypes.c_char_p; print(isa().decode())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "MODES_ISA"} | preload()
    widest = subprocess.run([sys.executable, "-c", code, library], env=environment, capture_output=True, text=True, check=True)
    return INSTRUCTION_SETS[INSTRUCTION_SETS.index(widest.stdout.strip()) :]


def preload() -> dict[str, str]:
    """What a Python without sanitizer needs: the sanitizer first, and what it looks for when it starts."""
    return {
        "LD_PRELOAD": f"{runtime('libasan.so')}:{runtime('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def address() -> None:
    library, check = build("address")
    for index, isa in enumerate(instruction_sets(library)):
        run(check, MODES_ISA=isa, ASAN_OPTIONS="detect_leaks=1")
        files = [TESTS / f"test_{name}.py" for name in (*ARITHMETIC, *(() if index else ONCE))]
        files += [] if index else [ROOT / "tests" / "attacks" / "test_operator.py"]
        environment = {"MODES_ISA": isa, "MODES_TEST_LIBRARY": str(library), **preload()}
        # What a sanitizer writes before it ends the process must not be captured.
        run(sys.executable, "-m", "pytest", "-q", "--capture=sys", "-p", "no:cacheprovider", *files, **environment)
        fuzz = ("kernel_arguments", "--engine", "plain", "--executions", "2000", "--out", BUILD / "fuzz")
        run(sys.executable, "-m", "tests.fuzz", *fuzz, PYTHONMALLOC="malloc", **environment)  # so that it sees every buffer


def thread() -> None:
    _, check = build("thread")
    # Its shadow memory needs addresses that randomisation may take; a container may forbid to turn that off.
    fixed = ["setarch", "-R"]
    if not shutil.which("setarch") or subprocess.run([*fixed, "true"], capture_output=True).returncode != 0:
        fixed = []
    run(*fixed, check, TSAN_OPTIONS="halt_on_error=1")


def emulated() -> None:
    library = build_library("emulated", "address", "-DMODES_EMULATED=ON") / "libmodes_emulated.so"
    files = [ROOT / "tests" / "cuda" / f"test_{name}.py" for name in EMULATED]
    environment = {"MODES_TEST_EMULATED_LIBRARY": str(library), **preload()}
    environment["ASAN_OPTIONS"] += ":handle_segv=0"  # a test hides weights, and expects the signal where they are read
    run(sys.executable, "-m", "pytest", "-q", "--capture=sys", "-p", "no:cacheprovider", *files, **environment)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("sanitizers", nargs="*", choices=[[], *FLAGS, "emulated"], help="default: address and thread")
    wanted = parser.parse_args().sanitizers or list(FLAGS)
    try:
        if "address" in wanted:
            address()
        if "thread" in wanted:
            thread()
        if "emulated" in wanted:
            emulated()
    except subprocess.CalledProcessError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
