"""How the tests call the CUDA kernels: through the C interface, on a real or an emulated device."""

import ctypes
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from modes_cli.runtime import interface
from tests.kernels.calling import arguments
from tests.kernels.reference import Case

ALIGNMENT = 256  # MODES_CUDA_ALIGNMENT
OK, BAD_ARGUMENT, BAD_SHAPE, BAD_WORKSPACE, NO_DEVICE = 0, 1, 2, 5, 8  # modes_status
SEEDS = (1, 2, 3)  # schedules of the emulated device


@dataclass(frozen=True)
class Device:
    name: str
    library: Path
    memory: torch.device  # where its tensors are
    capability: tuple[int, int]

    @property
    def emulated(self) -> bool:
        return self.memory.type == "cpu"

    def __str__(self) -> str:
        return self.name


@functools.cache
def load(library: Path) -> ctypes.CDLL:
    cdll = ctypes.CDLL(str(library))
    interface.declare_cuda(cdll)
    return cdll


@contextmanager
def environment(**values: str | None) -> Iterator[None]:
    """Variables that the library reads at every call; None takes one away."""
    before = {name: os.environ.get(name) for name in values}

    def put(names: dict[str, str | None]) -> None:
        for name, value in names.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    put(values)
    try:
        yield
    finally:
        put(before)


@contextmanager
def settings(device: Device, path: str | None, seed: int | None) -> Iterator[None]:
    """The environment of a call: which path, and on an emulated device which schedule."""
    values = {"MODES_CUDA_PATH": path}
    if device.emulated:
        values |= {
            "MODES_EMULATED_DEVICE": "{}.{}".format(*device.capability),
            "MODES_EMULATED_SEED": None if seed is None else str(seed),
        }
    with environment(**values):
        yield


def on_device(device: Device, case: Case) -> Case:
    tensors = {f.name: getattr(case, f.name) for f in fields(case)}
    return case.but(**{name: t.to(device.memory) for name, t in tensors.items() if isinstance(t, Tensor)})


def workspace_size(device: Device, args: interface.Args) -> int:
    size, message = ctypes.c_size_t(), interface.Message()
    status = load(device.library).modes_cuda_workspace_size(ctypes.byref(args), ctypes.byref(size), ctypes.byref(message))
    assert status == OK, message.text
    return size.value


def workspace(device: Device, size: int) -> Tensor:
    """`size` aligned bytes that are no number: what is read before it is written shows."""
    memory = torch.full((size + ALIGNMENT,), 255, dtype=torch.uint8, device=device.memory)
    start = -memory.data_ptr() % ALIGNMENT
    return memory[start : start + size]


def call(
    device: Device, args: interface.Args, memory: Tensor | None, *, path: str | None = None, seed: int | None = None
) -> tuple[int, str]:
    """Status and message of modes_cuda_skip_experts, after the device is done."""
    message = interface.Message()
    stream, pointer, size = None, None, 0
    if memory is not None:
        pointer, size = memory.data_ptr(), memory.numel()
    if not device.emulated:
        stream = torch.cuda.current_stream().cuda_stream
    skip_experts = load(device.library).modes_cuda_skip_experts
    with settings(device, path, seed):
        status = skip_experts(ctypes.byref(args), stream, pointer, size, ctypes.byref(message))
    if not device.emulated:
        torch.cuda.synchronize()
    return status, str(message)


def run(device: Device, case: Case, *, path: str | None = None, seed: int | None = None, kept: Tensor | None = None) -> Tensor:
    """The layer's output, in host memory as `case` is. `path` is one of hopper, decode, mma, float, plain, or what the
    library chooses. `kept` ([G] int64) receives the kept pairs of each group."""
    own = on_device(device, case)
    out = torch.full_like(own.x, 12345.0)
    counts = None if kept is None else torch.full_like(kept, -1, device=device.memory)
    args = arguments(own, out, kept=None if counts is None else counts.data_ptr())
    status, message = call(device, args, workspace(device, workspace_size(device, args)), path=path, seed=seed)
    assert status == OK, f"status {status}: {message}"
    if kept is not None and counts is not None:
        kept.copy_(counts)
    return out.to(case.x.device)


def chosen_path(device: Device, case: Case, *, path: str | None = None) -> str:
    """The path that would compute this case, or what the library says against it."""
    own = on_device(device, case)
    name, message = ctypes.c_char_p(), interface.Message()
    args = arguments(own, torch.empty_like(own.x))
    with settings(device, path, None):
        status = load(device.library).modes_cuda_path(ctypes.byref(args), ctypes.byref(name), ctypes.byref(message))
    return name.value.decode() if status == OK and name.value else str(message)


def launchable(device: Device, case: Case, path: str) -> bool:
    """Whether this path computes this case on this device."""
    return chosen_path(device, case, path=path) == path
