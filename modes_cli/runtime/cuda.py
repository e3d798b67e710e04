"""How a call of the operator runs on a CUDA device: queued on torch's current stream, with scratch memory of torch's.

Nothing here waits for the device, reads from it, or allocates outside torch's caching allocator, so a call can be recorded
in a CUDA graph. The allocator hands memory out in the order of the stream: scratch may be given back right after the call
was queued.
"""

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from modes_cli.errors import KernelError
from modes_cli.runtime import libraries
from modes_cli.runtime.interface import DTYPES, FIELDS, SIZE, Args, Message

ALIGNMENT = 256  # MODES_CUDA_ALIGNMENT


class Cuda:
    """CUDA devices, through `libmodes_cuda.so`."""

    asynchronous = True

    def library(self) -> ctypes.CDLL:
        """Raises KernelError when it is missing or cannot be loaded."""
        return libraries.load(libraries.CUDA)

    def guard(self, device: torch.device) -> AbstractContextManager[object]:
        """The device is the current one inside."""
        return torch.cuda.device(device)

    def stream(self, device: torch.device) -> int | None:
        """The handle of the stream that work on the device is queued on."""
        return torch.cuda.current_stream(device).cuda_stream

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def capability(self, device: torch.device) -> str:
        """Its compute capability: "9.0"."""
        return ".".join(map(str, torch.cuda.get_device_capability(device)))

    def count(self) -> int:
        """Devices that the library may use; 0 where there is none, or no driver. Raises KernelError."""
        count, message = ctypes.c_int32(), Message()
        if self.library().modes_cuda_devices(ctypes.byref(count), ctypes.byref(message)):
            raise KernelError(str(message))
        return count.value

    def path(self, device: torch.device, tokens: int) -> str:
        """Which kernels compute this many bfloat16 tokens on a device, in a layer of Qwen3-VL-30B-A3B's sizes.

        Raises KernelError where none do, or others than $MODES_CUDA_PATH asks for.
        """
        pointers = dict.fromkeys((name for name, letter in FIELDS if letter == "P"), ALIGNMENT)  # only their alignment counts
        bfloat16 = DTYPES[torch.bfloat16]
        args = Args(
            struct_size=SIZE, tokens=tokens, hidden=2048, intermediate=768, experts=128, top_k=8, groups=3,
            activation_dtype=bfloat16, weight_dtype=bfloat16, **pointers,
        )  # fmt: skip
        name, message = ctypes.c_char_p(), Message()
        with self.guard(device):
            if self.library().modes_cuda_path(ctypes.byref(args), ctypes.byref(name), ctypes.byref(message)):
                raise KernelError(str(message))
        return (name.value or b"").decode()

    def prepare(self, device: torch.device) -> Callable[[bytes, Any], int]:
        library = self.library()
        workspace_size, run = library.modes_cuda_workspace_size, library.modes_cuda_skip_experts

        def call(args: bytes, message: Any) -> int:
            size = ctypes.c_size_t()
            with self.guard(device):
                if status := workspace_size(args, ctypes.byref(size), message):
                    return int(status)
                workspace = torch.empty(size.value + ALIGNMENT, dtype=torch.uint8, device=device)
                start = -(-workspace.data_ptr() // ALIGNMENT) * ALIGNMENT
                return int(run(args, self.stream(device), start, size.value, message))

        return call
