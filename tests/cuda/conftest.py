"""The devices that the CUDA kernels are tested on: the emulated ones, and the real one where there is one.

The emulated library is built once under build/emulated, and again when a source is newer. MODES_TEST_EMULATED_LIBRARY and
MODES_TEST_CUDA_LIBRARY name other libraries to test. Only tests read them, as with MODES_TEST_LIBRARY.
"""

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from modes_cli.runtime import libraries
from tests.cuda.calling import Device
from tests.kernels.calling import ROOT
from tools.cmake import find_cmake

BUILD = ROOT / "build" / "emulated"
COMPILER = os.environ.get("CXX", "g++")
DEVICES = ("emulated 8.0", "emulated 9.0", pytest.param("gpu", marks=pytest.mark.gpu))


def run(*words: str | Path) -> None:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, words))}\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}"


@pytest.fixture(scope="session")
def emulated_library() -> Path:
    """libmodes_emulated.so, up to date."""
    if path := os.environ.get("MODES_TEST_EMULATED_LIBRARY"):
        return Path(path)
    cmake = find_cmake()
    if cmake is None or not shutil.which(COMPILER):
        pytest.skip(f"no {COMPILER if cmake else 'cmake 3.24'} on this machine to build the emulated kernels with")
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:  # several runs of the tests may start at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (BUILD / "CMakeCache.txt").is_file():
            generator = ("-G", "Ninja") if shutil.which("ninja") else ()
            run(cmake, "-S", ROOT / "kernels", "-B", BUILD, *generator, "-DMODES_EMULATED=ON", "-DMODES_CUDA=OFF",
                f"-DCMAKE_CXX_COMPILER={COMPILER}")  # fmt: skip
        threads = str(len(os.sched_getaffinity(0)))
        run(cmake, "--build", BUILD, "--target", "modes_emulated", "route_check", "--parallel", threads)
    return BUILD / "libmodes_emulated.so"


def cuda_library() -> Path:
    if path := os.environ.get("MODES_TEST_CUDA_LIBRARY"):
        return Path(path)
    installed = libraries.library_path(libraries.CUDA)
    if installed is not None:
        return installed
    pytest.skip("libmodes_cuda.so is not installed: the package was built without a CUDA compiler")


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Device:
    """Each device in turn. To test on some only: @pytest.mark.parametrize("device", [...], indirect=True)."""
    name: str = request.param
    if name == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("no GPU that torch can use")
        return Device(torch.cuda.get_device_name(), cuda_library(), torch.device("cuda"), torch.cuda.get_device_capability())
    major, minor = name.removeprefix("emulated ").split(".")
    return Device(name, request.getfixturevalue("emulated_library"), torch.device("cpu"), (int(major), int(minor)))
