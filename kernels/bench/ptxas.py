"""What the compiler makes of the CUDA kernels for every architecture: registers, shared memory, spills.

    python kernels/bench/ptxas.py --out docs/benchmarks/cuda-ptxas.json

Needs nvcc and CMake, no GPU. Every CUDA file is compiled once for each architecture that it is meant for, with the
options the build gives it. Exits with 1 when a file does not compile, or a kernel spills registers.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, its folder is there instead

from tools.cmake import find_cmake

KERNELS = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("80", "86", "89", "90a", "120")
ONLY = {"hopper.cu": ("90a",)}  # files with instructions that one architecture has

_ENTRY = re.compile(r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<architecture>\w+)'")
_FRAME = re.compile(r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads")
_USED = re.compile(r"Used (?P<registers>\d+) registers")
_SHARED = re.compile(r"(?P<shared>\d+) bytes smem")
_ARCHITECTURE_OPTION = re.compile(r"--?gen(erate-)?code[= ]\S+|-arch[= ]\S+")


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture. Sizes in bytes; `shared_bytes` without what a launch asks for."""

    file: str
    architecture: str
    kernel: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int


def parse(file: str, text: str) -> Iterator[Kernel]:
    """The kernels in what `ptxas -v` says about one file. Functions that are not kernels are left out."""
    entry: re.Match[str] | None = None
    frame = (0, 0)
    for line in text.splitlines():
        if found := _ENTRY.search(line):
            entry, frame = found, (0, 0)
        elif found := _FRAME.search(line):
            frame = int(found["stack"]), int(found["stores"]) + int(found["loads"])
        elif (found := _USED.search(line)) and entry is not None:
            shared, registers = _SHARED.search(line), int(found["registers"])
            size = int(shared["shared"]) if shared else 0
            yield Kernel(file, entry["architecture"], entry["name"], registers, size, *frame)
            entry = None


def commands(folder: Path) -> dict[Path, list[str]]:
    """How the build compiles each CUDA file, without its architectures and its output."""
    subprocess.run(
        [find_cmake() or "cmake", "-S", KERNELS, "-B", folder, "-DMODES_CUDA=ON", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    found = {}
    for entry in json.loads((folder / "compile_commands.json").read_text("utf-8")):
        file = Path(entry["file"])
        if file.suffix == ".cu":
            words = shlex.split(_ARCHITECTURE_OPTION.sub("", entry["command"]))
            end = min(words.index(word) for word in ("-MD", "-c", "-o", "-x") if word in words)
            found[file] = words[:end]
    return found


def compiled(folder: Path, file: Path, command: list[str], architecture: str) -> list[Kernel]:
    """Compile one file for one architecture. The command's own paths are relative to `folder`.

    Raises:
        subprocess.CalledProcessError: it does not compile; what the compiler said is in `stderr`.
    """
    target = [f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-Xptxas=-v", "-c", str(file), "-o", os.devnull]
    done = subprocess.run([*command, *target], cwd=folder, capture_output=True, text=True, check=True)
    return list(parse(file.name, done.stderr + done.stdout))


def readable(names: list[str]) -> dict[str, str]:
    """Mangled names as they are in the source, without namespaces and parameters."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return {name: name for name in names}
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    noise = re.compile(r"\(anonymous namespace\)::|\((int|bool)\)|modes::(gpu::)?|^void ")
    plain = (noise.sub("", line) for line in done.stdout.splitlines())
    short = (line.partition("(")[0] for line in plain)
    return dict(zip(names, short, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description="Registers, shared memory and spills of every CUDA kernel.")
    parser.add_argument("--out", type=Path, help="write the JSON here")
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES), help="90a, 120, ...")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sources = commands(Path(folder))
        jobs = [
            (Path(folder), f, c, a)
            for f, c in sources.items()
            for a in options.architectures
            if a in ONLY.get(f.name, ARCHITECTURES)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            try:
                found = [kernel for kernels in pool.map(lambda job: compiled(*job), jobs) for kernel in kernels]
            except subprocess.CalledProcessError as error:
                print(error.stderr, file=sys.stderr)
                return 1
    names = readable(sorted({kernel.kernel for kernel in found}))
    rows = [asdict(kernel) | {"kernel": names[kernel.kernel]} for kernel in found]
    nvcc = subprocess.run([next(iter(sources.values()))[0], "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release [\d.]+, V[\d.]+", nvcc)
    record = {"command": "kernels/bench/ptxas.py", "nvcc": release[0] if release else nvcc.strip(), "kernels": rows}
    if options.out is not None:
        options.out.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    spilling = [row for row in rows if row["spill_bytes"]]
    for row in rows:
        mark = f"  spills {row['spill_bytes']} bytes" if row["spill_bytes"] else ""
        used = f"{row['registers']:4} registers {row['shared_bytes']:6} B shared"
        print(f"sm_{row['architecture']:5}{used}  {row['file']:12} {row['kernel']}{mark}")
    print(f"{len(rows)} kernels, {len(spilling)} with spills")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
