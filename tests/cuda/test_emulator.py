"""The emulated GPU itself: that it computes what the PTX ISA says, and that it finds the mistakes it is there to find."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.kernels.calling import ROOT

COMPILER = os.environ.get("CXX", "g++")
FLAGS = ("-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-fno-strict-aliasing", "-DMODES_EMULATED", "-Ikernels",
         "-Ikernels/include")  # fmt: skip
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")

RIGHT = ("barriers", "copies", "exchange", "gathered", "launch", "matrices", "multiply", "phases", "product",
         "product-unawaited", "shuffles", "tensor-load")  # fmt: skip
SEEDS = range(6)

MISTAKES = {
    "arrivals": r"barrier_arrive: more than the 1 arrivals",
    "barrier-counts": r"barrier 2 is for \d+ threads here, for \d+ where others wait",
    "barrier-not-visible": r"made without a barrier_init_done",
    "barrier-overwritten": r"something wrote over the barrier",
    "deadlock": r"block 0, thread \d+ .*deadlock, 0 threads are over and\n  64 threads, from thread 0, wait for barrier_wait",
    "diverged": r"its warp diverges: .*__(syncwarp|ballot_sync)",
    "diverged-barrier": r"its warp diverges: .*barrier_sync",
    "fence-before-wait": r"a product's a reads byte \d+ of dynamic shared memory, which thread \d+ wrote and did not fence",
    "load-unfenced": r"tensor_load: byte 0 of dynamic shared memory was written by thread 0",
    "misaligned-copy": r"copy_async to shared memory: the address .* is not a multiple of 16",
    "no-begin": r"no product_begin\(\) since",
    "one-thread-fences": r"which thread [1-9]\d* wrote and did not fence",
    "overwritten-copy": r"another copy is still arriving at byte 0",
    "past-the-end": r"bytes 1024 to 1040 of dynamic shared memory, which has 1024",
    "tile-misplaced": r"the tile of a starts at byte \d+",
    "touched": r"accumulator \d+ of lane \d+ was written while a product was under way",
    "unfenced": r"reads byte \d+ of dynamic shared memory, which thread \d+ wrote and did not fence",
}
# What only the address sanitizer sees.
OUTSIDE = {
    "plain-past-the-end": "use-after-poison.*WRITE of size 1",
    "plain-past-global": "heap-buffer-overflow.*READ of size 16",
}


def compiled(source: Path, folder: Path, flags: tuple[str, ...]) -> str | None:
    """What the compiler says where it fails."""
    words = [COMPILER, *FLAGS, *flags, "-c", str(source), "-o", str(folder / f"{source.stem}.o")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    return f"{' '.join(words)}\n{done.stderr[-4000:]}" if done.returncode else None


@pytest.fixture(scope="module")
def sanitizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    if not shutil.which(COMPILER):
        pytest.skip(f"no {COMPILER} on this machine to build the emulated GPU with")
    folder = tmp_path_factory.mktemp("probe")
    (folder / "probe.cpp").write_text("int main() { return 0; }\n")
    words = [COMPILER, *SANITIZERS, str(folder / "probe.cpp"), "-o", str(folder / "probe")]
    works = subprocess.run(words, capture_output=True, check=False).returncode == 0
    return SANITIZERS if works and subprocess.run([folder / "probe"], check=False).returncode == 0 else ()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory, sanitizers: tuple[str, ...]) -> Path:
    folder = tmp_path_factory.mktemp("emulator")
    sources = [ROOT / "tests" / "cuda" / "emulator_check.cpp", *sorted((ROOT / "kernels" / "emulator").glob("*.cpp"))]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for failure in pool.map(lambda source: compiled(source, folder, sanitizers), sources):
            assert failure is None, failure
    words = [COMPILER, *sanitizers, *map(str, sorted(folder.glob("*.o"))), "-o", str(folder / "check")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "check"


def check(program: Path, name: str, seed: int = 0, device: str = "9.0") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"MODES_EMULATED_SEED": str(seed), "MODES_EMULATED_DEVICE": device}
    return subprocess.run([program, name], capture_output=True, text=True, env=environment, timeout=120, check=False)


@pytest.mark.parametrize("name", RIGHT)
def test_it_computes_what_the_isa_says_under_every_schedule(program: Path, name: str) -> None:
    for seed in SEEDS:
        done = check(program, name, seed)
        assert done.returncode == 0, f"seed {seed}\n{done.stdout}{done.stderr}"
        assert "wrong reads: 0" in done.stdout or not done.stdout


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_the_process_and_is_named(program: Path, name: str) -> None:
    for seed in SEEDS:
        done = check(program, f"mistake-{name}", seed)
        assert done.returncode < 0, f"seed {seed}: it went on\n{done.stdout}{done.stderr}"
        assert re.search(MISTAKES[name], done.stderr), done.stderr
        assert f"(seed {seed})" in done.stderr


@pytest.mark.parametrize("name", OUTSIDE)
def test_the_address_sanitizer_sees_where_memory_ends(program: Path, sanitizers: tuple[str, ...], name: str) -> None:
    if not sanitizers:
        pytest.skip(f"{COMPILER} has no address sanitizer here")
    done = check(program, f"mistake-{name}")
    assert done.returncode != 0
    assert re.search(OUTSIDE[name], done.stderr, re.DOTALL), done.stderr


@pytest.mark.parametrize("name", ["exchange-unsynchronised", "copies-early"])
def test_a_missing_wait_is_seen_as_wrong_numbers(program: Path, name: str) -> None:
    wrong = [int(check(program, name, seed).stdout.removeprefix("wrong reads: ")) for seed in SEEDS]
    assert any(wrong), wrong


@pytest.mark.parametrize("device", ["8.0", "12.0"])
def test_what_only_hopper_has_is_refused_elsewhere(program: Path, device: str) -> None:
    done = check(program, "gathered", device=device)
    assert done.returncode < 0
    assert f"products of warpgroups are of compute capability 9.0, this is {device}" in done.stderr


@pytest.mark.parametrize(("variable", "value"), [("MODES_EMULATED_DEVICE", "7.0"), ("MODES_EMULATED_SEED", "one")])
def test_a_wrong_setting_is_an_error(program: Path, variable: str, value: str) -> None:
    done = subprocess.run([program, "launch"], capture_output=True, text=True, env=os.environ | {variable: value}, check=False)
    assert done.returncode < 0
    assert f"{variable} is `{value}`, expected" in done.stderr


def test_without_a_device_every_launch_says_so(program: Path) -> None:
    done = check(program, "multiply", device="none")
    assert done.returncode == 1
    assert "wrong: no emulated device" in done.stdout
