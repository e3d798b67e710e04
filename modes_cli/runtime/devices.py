"""The kinds of devices that the operator runs on. One class each; a new one is one more entry."""

from collections.abc import Callable
from typing import Any, Protocol

import torch

from modes_cli.errors import KernelError
from modes_cli.runtime import libraries
from modes_cli.runtime.cuda import Cuda

Run = Callable[[bytes, Any], int]  # (packed modes_args, reference to a modes_message) -> modes_status


class Kind(Protocol):
    """One kind of device.

    Attributes:
        asynchronous: work is only queued when a call returns, so that reading a result makes the host wait.
    """

    asynchronous: bool

    def prepare(self, device: torch.device) -> Run:
        """The function that runs a call on this device. Raises KernelError where there is none."""
        ...

    def capturing(self) -> bool:
        """Whether calls are being recorded, so that the host can neither read nor wait."""
        ...


class Cpu:
    """The host's own memory and threads."""

    asynchronous = False

    def prepare(self, _device: torch.device) -> Run:
        run = libraries.load().modes_cpu_skip_experts
        return lambda args, message: run(args, None, None, 0, message)

    def capturing(self) -> bool:
        return False


KINDS: dict[str, Kind] = {"cpu": Cpu(), "cuda": Cuda()}


def kind_of(device: torch.device) -> Kind:
    """The kind of a device. Raises KernelError for one that the operator has no kernels for."""
    if (kind := KINDS.get(device.type)) is None:
        raise KernelError(f"there are no kernels for the device `{device}`, only for {' and '.join(KINDS)}")
    return kind


def asynchronous(device: torch.device) -> bool:
    """Whether reading a result of this device makes the host wait."""
    kind = KINDS.get(device.type)
    return kind is not None and kind.asynchronous


def refuse_while_capturing(device: torch.device, what: str, hint: str = "run the model once before capturing") -> None:
    """Raise KernelError if `what`, which a graph cannot record, is to happen while one is being captured."""
    kind = KINDS.get(device.type)
    if kind is not None and kind.asynchronous and kind.capturing():
        raise KernelError(f"{what}, while a CUDA graph is being captured on `{device}`", hint=hint)
