"""A stand-in for ONNX Runtime, written in Python: the operator's callbacks are called as ONNX Runtime calls them, with a
GPU's stream and memory that keeps account of itself. What a session on this machine cannot show, this can.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ELEMENT = {
    torch.float32: 1, torch.uint8: 2, torch.int8: 3, torch.int32: 6, torch.int64: 7, torch.float16: 10, torch.bfloat16: 16
}  # fmt: skip
P, SIZE, I64, INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, ctypes.c_int
TABLE = 279
STREAM = 0x5000
WORDS = 26  # of OrtCustomOp
NAME, PROVIDER, INPUT_TYPE, DESTROY, CREATE, COMPUTE = 2, 3, 4, 9, 17, 18  # words of it


@dataclass
class Overload:
    """One OrtCustomOp that a library added to its domain."""

    address: int

    def function(self, word: int, result: Any, *arguments: Any) -> Callable[..., Any]:
        address = (P * WORDS).from_address(self.address)[word]
        return ctypes.CFUNCTYPE(result, *arguments)(address)

    @property
    def name(self) -> str:
        return str(self.function(NAME, ctypes.c_char_p, P)(self.address).decode())

    @property
    def provider(self) -> str:
        return str(self.function(PROVIDER, ctypes.c_char_p, P)(self.address).decode())

    @property
    def dtypes(self) -> tuple[int, int, int]:
        """Element types of activations, weights and expert ids."""
        of = self.function(INPUT_TYPE, INT, P, SIZE)
        return of(self.address, 0), of(self.address, 6), of(self.address, 1)


@dataclass
class FakeOrt:
    """The functions of OrtApi that the operator uses. `fail` names those that answer with an error."""

    stream: int = STREAM
    fail: set[str] = field(default_factory=set)
    log: list[str] = field(default_factory=list)  # what was asked for memory, in order
    overloads: list[Overload] = field(default_factory=list)  # of SkipExperts
    others: list[Overload] = field(default_factory=list)
    statuses: dict[int, tuple[int, str]] = field(default_factory=dict)  # not released yet
    memory: dict[int, Any] = field(default_factory=dict)  # not freed yet
    infos: dict[int, Tensor] = field(default_factory=dict)  # type infos not released yet
    lent: int = 0  # allocators not released yet

    def __post_init__(self) -> None:
        self._handles = 0x1000
        self._tensors: dict[int, Tensor] = {}
        self._inputs: list[int] = []
        self._outputs: dict[int, Tensor] = {}
        self._keep: list[Any] = []
        self.table = (P * TABLE)()
        functions: dict[int, tuple[Any, tuple[Any, ...], Callable[..., Any]]] = {
            0: (P, (INT, ctypes.c_char_p), self._create_status),
            93: (None, (P,), lambda status: self.statuses.pop(status) and None),
            26: (P, (ctypes.c_char_p, ctypes.POINTER(P)), lambda name, out: self._give(out, 0x10)),
            27: (P, (P, P), lambda domain, op: self._add(Overload(op))),
            28: (P, (P, P), lambda options, domain: None),
            85: (P, (P, ctypes.c_char_p, P), lambda *_: self._status(1, "no attribute")),
            86: (P, (P, ctypes.c_char_p, P), lambda *_: self._status(1, "no attribute")),
            87: (P, (P, ctypes.c_char_p, P, P), lambda *_: self._status(1, "no attribute")),
            88: (P, (P, ctypes.POINTER(SIZE)), lambda context, out: self._give(out, len(self._inputs))),
            89: (P, (P, ctypes.POINTER(SIZE)), lambda context, out: self._give(out, 2)),
            90: (P, (P, SIZE, ctypes.POINTER(P)), lambda context, i, out: self._give(out, self._inputs[i] or None)),
            91: (P, (P, SIZE, ctypes.POINTER(I64), SIZE, ctypes.POINTER(P)), self._output),
            51: (P, (P, ctypes.POINTER(P)), lambda value, out: self._give(out, self._tensors[value].data_ptr())),
            65: (P, (P, ctypes.POINTER(P)), self._type_info),
            60: (P, (P, ctypes.POINTER(INT)), lambda info, out: self._give(out, ELEMENT[self.infos[info].dtype])),
            61: (P, (P, ctypes.POINTER(SIZE)), lambda info, out: self._give(out, self.infos[info].dim())),
            62: (P, (P, ctypes.POINTER(I64), SIZE), self._dimensions),
            99: (None, (P,), lambda info: self.infos.pop(info) is None or None),
            193: (P, (P, ctypes.POINTER(P)), lambda context, out: self._give(out, self.stream or None)),
            194: (P, (P, ctypes.POINTER(P)), lambda value, out: self._logged("memory info") or self._give(out, 0x20)),
            253: (P, (P, P, ctypes.POINTER(P)), self._allocator),
            277: (P, (P, P, SIZE, ctypes.POINTER(P)), lambda context, info, size, out: self._take("scratch", size, out)),
            75: (P, (P, SIZE, ctypes.POINTER(P)), lambda allocator, size, out: self._take("alloc", size, out)),
            76: (P, (P, P), self._free),
            132: (None, (P,), self._return_allocator),
        }
        for index, (result, arguments, function) in functions.items():
            callback = ctypes.CFUNCTYPE(result, *arguments)(function)
            self._keep.append(callback)
            self.table[index] = ctypes.cast(callback, P)
        get_api = ctypes.CFUNCTYPE(P, ctypes.c_uint32)(lambda version: ctypes.addressof(self.table))
        self._keep.append(get_api)
        self.base = (P * 2)(ctypes.cast(get_api, P), None)

    # -- what a test does -------------------------------------------------------------------------------------------

    def register(self, library: Path) -> None:
        """Load the library, which must be a copy of its own: a domain is made once in the life of a library."""
        self._library = ctypes.CDLL(str(library))
        self._library.RegisterCustomOps.argtypes = [P, P]
        self._library.RegisterCustomOps.restype = P
        assert self._library.RegisterCustomOps(None, ctypes.addressof(self.base)) is None

    def run(self, overload: Overload, inputs: list[Tensor | None]) -> tuple[Tensor, Tensor]:
        """Create a kernel, run it, destroy it: its two outputs. Raises RuntimeError with the text of a status."""
        self._inputs = [0 if tensor is None else self._value(tensor) for tensor in inputs]
        kernel = P()
        create = overload.function(CREATE, P, P, P, P, P)
        self._check(create(overload.address, ctypes.addressof(self.table), None, ctypes.byref(kernel)))
        try:
            self._check(overload.function(COMPUTE, P, P, P)(kernel, 0x30))
        finally:
            overload.function(DESTROY, None, P)(kernel)
        return self._outputs[0], self._outputs[1]

    def nothing_left(self) -> bool:
        """Whether all memory, allocators, type infos and statuses went back."""
        return not (self.memory or self.lent or self.infos or self.statuses)

    # -- the functions ----------------------------------------------------------------------------------------------

    def _add(self, overload: Overload) -> None:
        (self.overloads if overload.name == "SkipExperts" else self.others).append(overload)

    def _handle(self) -> int:
        self._handles += 16
        return self._handles

    def _value(self, tensor: Tensor) -> int:
        handle = self._handle()
        self._tensors[handle] = tensor
        return handle

    def _check(self, status: int | None) -> None:
        if status is not None:
            code, text = self.statuses.pop(status)
            raise RuntimeError(f"{code}: {text}")

    def _status(self, code: int, text: str) -> int:
        handle = self._handle()
        self.statuses[handle] = (code, text)
        return handle

    def _create_status(self, code: int, text: bytes) -> int:
        return self._status(code, text.decode())

    def _logged(self, what: str) -> int | None:
        self.log.append(what)
        return self._status(1, f"{what} failed") if what in self.fail else None

    @staticmethod
    def _give(out: Any, value: Any) -> None:
        out[0] = value

    def _type_info(self, value: int, out: Any) -> None:
        handle = self._handle()
        self.infos[handle] = self._tensors[value]
        out[0] = handle

    def _dimensions(self, info: int, out: Any, rank: int) -> None:
        for i in range(rank):
            out[i] = self.infos[info].shape[i]

    def _output(self, _context: int, index: int, shape: Any, rank: int, out: Any) -> None:
        dtype = torch.int64 if index else self._tensors[self._inputs[0]].dtype
        self._outputs[index] = torch.zeros([shape[i] for i in range(rank)], dtype=dtype)
        out[0] = self._value(self._outputs[index])

    def _allocator(self, _context: int, _info: int, out: Any) -> int | None:
        if failed := self._logged("allocator"):
            return failed
        self.lent += 1
        out[0] = 0x40
        return None

    def _take(self, how: str, size: int, out: Any) -> int | None:
        if failed := self._logged(how):
            return failed
        block = ctypes.create_string_buffer(b"\xff" * (size + 1), size + 1)
        address = ctypes.addressof(block) + (ctypes.addressof(block) % 2 == 0)  # never aligned
        self.memory[address] = block
        out[0] = address
        return None

    def _free(self, _allocator: int, memory: int) -> int | None:
        assert self.lent == 1
        del self.memory[memory]
        return self._logged("free")

    def _return_allocator(self, _allocator: int) -> None:
        self.log.append("return allocator")
        self.lent -= 1
