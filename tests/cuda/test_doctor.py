"""What `modes doctor` says of the kernels: the libraries, and the path that each device gets."""

from pathlib import Path

import pytest
import torch

from modes_cli.doctor_kernels import cuda_kernels, diagnose_kernels
from modes_cli.runtime import libraries
from modes_cli.runtime.cuda import Cuda
from tests.cuda.as_gpu import Emulated, real_gpu

DEVICE = torch.device("cpu")
PATHS = {"hopper", "decode", "mma", "float", "plain"}


@pytest.fixture
def emulated(emulated_library: Path, monkeypatch: pytest.MonkeyPatch) -> Emulated:
    monkeypatch.setattr(libraries, "library_path", lambda _name=libraries.CPU: emulated_library)
    monkeypatch.delenv("MODES_CUDA_PATH", raising=False)
    return Emulated(emulated_library)


@pytest.mark.parametrize("capability", ["8.0", "9.0", "12.0"])
def test_a_devices_paths(capability: str, emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODES_EMULATED_DEVICE", capability)
    library, device = cuda_kernels(emulated, [DEVICE])
    assert (library["name"], library["available"]) == ("cuda", True)
    assert "it sees 1 CUDA device" in library["reason"]
    assert device["available"]
    assert f"compute capability {capability}: bfloat16 runs on `{emulated.path(DEVICE, 8192)}` for 8192" in device["reason"]
    assert {emulated.path(DEVICE, 8192), emulated.path(DEVICE, 1)} <= PATHS


def test_a_forced_path(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODES_EMULATED_DEVICE", "8.0")
    monkeypatch.setenv("MODES_CUDA_PATH", "plain")
    assert "on `plain` for 8192 tokens, on `plain` for 1" in cuda_kernels(emulated, [DEVICE])[1]["reason"]
    monkeypatch.setenv("MODES_CUDA_PATH", "fastest")
    device = cuda_kernels(emulated, [DEVICE])[1]
    assert not device["available"]
    assert "MODES_CUDA_PATH is `fastest`" in device["reason"]


def test_no_device(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODES_EMULATED_DEVICE", "none")
    (library,) = cuda_kernels(emulated, [])
    assert not library["available"]
    assert "it sees no CUDA devices" in library["reason"]


def test_devices_that_torch_cannot_use(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODES_EMULATED_DEVICE", "9.0")
    assert "for ONNX Runtime only" in cuda_kernels(emulated, [])[0]["reason"]


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "library_path", lambda _name=libraries.CPU: None)
    libraries.load.cache_clear()
    cpu, cuda = diagnose_kernels()[:2]
    assert not cpu["available"]
    assert not cuda["available"]
    assert cuda["library"] is None
    assert "`libmodes_cuda.so` is not installed" in cuda["reason"]
    assert "MODES_CUDA=ON" in cuda["reason"]
    libraries.load.cache_clear()


@pytest.mark.gpu
def test_the_gpu() -> None:
    device = real_gpu()
    found = {entry["name"]: entry for entry in diagnose_kernels()}
    assert found["cuda"]["available"], found["cuda"]["reason"]
    assert found[str(device)]["available"], found[str(device)]["reason"]
    assert Cuda().path(device, 8192) in PATHS - {"plain", "float"}
