"""self_check.cpp: the library without Python, here and, where the tools are installed, on processors this is not."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.kernels.calling import ROOT, library, sanitized

COMPILE = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{ROOT / 'kernels' / 'include'}")
SOURCE = str(ROOT / "tests" / "kernels" / "self_check.cpp")
CROSS = "aarch64-linux-gnu-g++"
NO_ISA = {name: value for name, value in os.environ.items() if name not in ("MODES_ISA", "LD_PRELOAD")}


def tool(*names: str) -> str:
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"no {' or '.join(names)} on this machine")
    return found


def output(*words: str | Path, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in words], env=NO_ISA | environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def self_check(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if sanitized():
        pytest.skip("`make sanitize` runs it with its own sanitizer")
    program = tmp_path_factory.mktemp("self_check") / "self_check"
    output(tool("g++"), *COMPILE, SOURCE, library(), "-o", program)
    return program


def test_this_machine(self_check: Path) -> None:
    assert output(self_check).endswith("checks passed\n")


@pytest.mark.parametrize(
    ("processor", "isa"), [("Nehalem", "baseline"), ("Haswell", "avx2")], ids=["without AVX", "without AVX-512"]
)
def test_older_processors(self_check: Path, processor: str, isa: str) -> None:
    """Emulated: an instruction that the processor does not have ends the program, wherever the linker took it from."""
    emulator = tool("qemu-x86_64", "qemu-x86_64-static")
    assert output(emulator, "-cpu", processor, self_check).startswith(f"{isa}: ")
    refused = subprocess.run(
        [emulator, "-cpu", processor, self_check],
        env=NO_ISA | {"MODES_ISA": "avx512"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 1
    assert "MODES_ISA is `avx512`" in refused.stderr


@pytest.mark.slow
def test_aarch64(tmp_path: Path) -> None:
    compiler, emulator, cmake = tool(CROSS), tool("qemu-aarch64", "qemu-aarch64-static"), tool("cmake")
    system = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={compiler}")
    output(cmake, "-S", ROOT / "kernels", "-B", tmp_path, "-DMODES_CUDA=OFF", *system)
    output(cmake, "--build", tmp_path)
    output(compiler, *COMPILE, SOURCE, tmp_path / "libmodes_cpu.so", "-o", tmp_path / "self_check")
    root = Path(output(compiler, "-print-file-name=libc.so.6").strip()).resolve().parents[1]
    assert output(emulator, "-L", root, tmp_path / "self_check").startswith("baseline: ")
