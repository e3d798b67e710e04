"""`kernels/include/modes.h` as ctypes: the structure of a call, the enumerators, and the functions of the libraries."""

import ctypes
import struct
from typing import Any

import torch

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "swiglu_oai": 2}
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
QUANTISED = {torch.int8: 3, torch.uint8: 4}  # of weights: int8, and two 4-bit numbers in a byte
ID_DTYPES = {torch.int64: 0, torch.int32: 1}
NO_MEMORY = 6  # modes_status

# `modes_args`, field by field, with struct's letters.
FIELDS = (
    ("struct_size", "Q"),
    *((name, "q") for name in ("tokens", "hidden", "intermediate", "experts", "top_k", "groups")),
    *((name, "i") for name in ("activation_dtype", "weight_dtype", "id_dtype", "activation")),
    *((name, "f") for name in ("alpha", "limit")),
    *((name, "i") for name in ("transposed", "interleaved", "score_scale_per_expert", "threads")),
    *((name, "P") for name in ("x", "expert_ids", "expert_weights", "group", "tau", "score_scale", "score")),
    *((name, "P") for name in ("gate_up", "down", "gate_up_bias", "down_bias", "out", "kept")),
    *((name, "P") for name in ("gate_up_scales", "down_scales")),
    ("block", "q"),
)
_CTYPES: dict[str, Any] = {
    "Q": ctypes.c_uint64,
    "q": ctypes.c_int64,
    "i": ctypes.c_int32,
    "f": ctypes.c_float,
    "P": ctypes.c_void_p,
}


class Args(ctypes.Structure):
    """`modes_args`."""

    _fields_ = tuple((name, _CTYPES[letter]) for name, letter in FIELDS)


class Message(ctypes.Structure):
    """`modes_message`."""

    _fields_ = (("text", ctypes.c_char * 256),)

    def __str__(self) -> str:
        return str(self.text.decode(errors="replace"))


SIZE = ctypes.sizeof(Args)
# The same structure as bytes, which ctypes passes as a pointer: one packing instead of thirty attributes written.
PACKED = struct.Struct("@" + "".join(letter for _, letter in FIELDS))

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int  # pointers to structures take bytes, byref(...) and None


def declare_cpu(library: ctypes.CDLL) -> None:
    """The types of the CPU functions, which every library has."""
    library.modes_version.restype = ctypes.c_char_p
    library.modes_cpu_isa.restype = ctypes.c_char_p
    library.modes_cpu_threads.restype = ctypes.c_int32
    library.modes_cpu_set_threads.argtypes = [ctypes.c_int32]
    library.modes_cpu_set_threads.restype = None
    library.modes_cpu_workspace_size.argtypes = [_POINTER, _POINTER, _POINTER]
    library.modes_cpu_workspace_size.restype = _INT
    library.modes_cpu_skip_experts.argtypes = [_POINTER, _POINTER, _POINTER, ctypes.c_size_t, _POINTER]
    library.modes_cpu_skip_experts.restype = _INT


def declare_cuda(library: ctypes.CDLL) -> None:
    """The types of the CUDA functions."""
    library.modes_cuda_devices.argtypes = [_POINTER, _POINTER]
    library.modes_cuda_devices.restype = _INT
    library.modes_cuda_workspace_size.argtypes = [_POINTER, _POINTER, _POINTER]
    library.modes_cuda_workspace_size.restype = _INT
    library.modes_cuda_path.argtypes = [_POINTER, ctypes.POINTER(ctypes.c_char_p), _POINTER]
    library.modes_cuda_path.restype = _INT
    library.modes_cuda_skip_experts.argtypes = [_POINTER, _POINTER, _POINTER, ctypes.c_size_t, _POINTER]
    library.modes_cuda_skip_experts.restype = _INT
