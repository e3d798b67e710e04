"""CPU tensors run as those of a GPU are: queued calls of libmodes_emulated.so, and nothing that the host may wait for."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modes_cli.runtime import devices, libraries
from modes_cli.runtime.cuda import Cuda
from modes_cli.skipping.engine import SkipEngine
from tests.cuda.conftest import cuda_library

# What makes the host wait for a GPU: reading a number, sizes that depend on values, data that comes from the host.
WAITING = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::masked_select", "aten::isin",
    "aten::unique_dim", "aten::_unique2", "aten::bincount", "aten::lift_fresh", "aten::repeat_interleave", "aten::allclose",
}  # fmt: skip
BY_INDEX = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}  # waiting with a mask only


class Emulated(Cuda):
    """`recording`: as if a CUDA graph were being captured. `calls`: how often the kernels were launched."""

    def __init__(self, path: Path) -> None:
        self._library = libraries.open_library(path, cuda=True)
        self.recording, self.calls = False, 0

    def library(self) -> ctypes.CDLL:
        return self._library

    def guard(self, _device: torch.device) -> AbstractContextManager[object]:
        return nullcontext()

    def stream(self, _device: torch.device) -> int | None:
        self.calls += 1
        return None

    def capability(self, _device: torch.device) -> str:
        return os.environ["MODES_EMULATED_DEVICE"]

    def capturing(self) -> bool:
        return self.recording


def install(path: Path, monkeypatch: pytest.MonkeyPatch) -> Emulated:
    """From now on the CPU is a GPU."""
    emulated = Emulated(path)
    monkeypatch.setitem(devices.KINDS, "cpu", emulated)
    return emulated


def real_gpu() -> torch.device:
    """The GPU, with the installed library or the one that MODES_TEST_CUDA_LIBRARY names; the test is skipped without."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")
    path, installed = cuda_library(), libraries.library_path
    if path != installed(libraries.CUDA):
        libraries.library_path = lambda name=libraries.CPU: path if name == libraries.CUDA else installed(name)
    return torch.device("cuda", torch.cuda.current_device())


class _Watch(TorchDispatchMode):
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        masks = [i for i in args[1] if i is not None and i.dtype == torch.bool] if name in BY_INDEX else []
        if name in WAITING or masks:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def watching() -> Iterator[list[str]]:
    """The operations that would make the host wait for a GPU."""
    seen: list[str] = []
    with _Watch(seen):
        yield seen


@contextmanager
def watching_the_engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The operations inside engines, not those of the models around them, that would make the host wait for a GPU."""
    seen: list[str] = []
    with monkeypatch.context() as patch:
        for name in ("_read_tokens", "experts", "_count"):
            patch.setattr(SkipEngine, name, _watched(getattr(SkipEngine, name), seen))
        yield seen


def _watched(method: Any, seen: list[str]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        with _Watch(seen):
            return method(*args, **kwargs)

    return call
