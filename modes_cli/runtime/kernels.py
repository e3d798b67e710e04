"""The operator library from Python: a ctypes binding, and the PyTorch operator `modes::skip_experts` on top of it.

The library is found and loaded when it is first needed. Its contract is `kernels/include/modes.h`; what is kept follows
MoDES (arXiv:2511.15690, eq. 3 and 5): `score_scale[group] * pi >= tau[group]` with `pi = w / sum(w)`.

Importing this module defines `torch.ops.modes.skip_experts`, for the CPU and for fake tensors, so that `torch.export`,
`torch.compile` and the ONNX exporter see one operator.
"""

import ctypes
import functools
import weakref
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import modes_cli
from modes_cli.errors import KernelError

LIBRARY = "libmodes_cpu.so"
REBUILD = "install the package again: `pip install modes`, or `pip install -e . --no-deps --no-build-isolation` in a checkout"

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "swiglu_oai": 2}
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_ID_DTYPES = {torch.int64: 0, torch.int32: 1}
_INT32, _FLOAT32 = (torch.int32,), (torch.float32,)
_NO_MEMORY = 6  # modes_status


class _Args(ctypes.Structure):
    """`modes_args` of modes.h, field by field."""

    _fields_ = (
        ("struct_size", ctypes.c_uint64),
        *((name, ctypes.c_int64) for name in ("tokens", "hidden", "intermediate", "experts", "top_k", "groups")),
        *((name, ctypes.c_int32) for name in ("activation_dtype", "weight_dtype", "id_dtype", "activation")),
        ("alpha", ctypes.c_float),
        ("limit", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("transposed", "interleaved", "score_scale_per_expert", "threads")),
        *((name, ctypes.c_void_p) for name in ("x", "expert_ids", "expert_weights", "group", "tau", "score_scale", "score")),
        *((name, ctypes.c_void_p) for name in ("gate_up", "down", "gate_up_bias", "down_bias", "out", "kept")),
    )


class _Message(ctypes.Structure):
    _fields_ = (("text", ctypes.c_char * 256),)


def library_path() -> Path | None:
    """Where the operator library lies, or None when this installation has none. ONNX Runtime is given this path."""
    # An editable install has two places: the checkout, and site-packages with what CMake built.
    for folder in modes_cli.__path__:
        path = Path(folder) / "lib" / LIBRARY
        if path.is_file():
            return path
    return None


@functools.cache
def load() -> ctypes.CDLL:
    """The loaded library. Raises KernelError when it is missing or cannot be loaded."""
    path = library_path()
    if path is None:
        raise KernelError(f"the operator library `{LIBRARY}` is not installed", hint=REBUILD)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelError(f"the operator library `{path}` does not load: {error}", hint=REBUILD) from error
    library.modes_version.restype = ctypes.c_char_p
    library.modes_cpu_isa.restype = ctypes.c_char_p
    library.modes_cpu_threads.restype = ctypes.c_int32
    library.modes_cpu_set_threads.argtypes = [ctypes.c_int32]
    library.modes_cpu_set_threads.restype = None
    library.modes_cpu_skip_experts.argtypes = [
        ctypes.POINTER(_Args),
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.POINTER(_Message),
    ]
    library.modes_cpu_skip_experts.restype = ctypes.c_int
    return library


def available() -> bool:
    """Whether the operator library is there and loads."""
    try:
        load()
    except KernelError:
        return False
    return True


def version() -> str:
    """The version the operator library was built as."""
    return str(load().modes_version().decode())


def isa() -> str:
    """The instruction set its CPU kernels were chosen for: `avx512`, `avx2` or `baseline`."""
    return str(load().modes_cpu_isa().decode())


def _refuse(name: str, tensor: Tensor, shape: tuple[int, ...], names: str, dtypes: Container[torch.dtype]) -> None:
    """Raise what is wrong with a tensor."""
    if tuple(tensor.shape) != shape:
        raise KernelError(f"{name} has shape `{list(tensor.shape)}`, expected {names} = {list(shape)}")
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in (*_DTYPES, *_ID_DTYPES) if dtype in dtypes)
        raise KernelError(f"{name} is `{str(tensor.dtype).removeprefix('torch.')}`, expected {expected}")
    if tensor.device.type != "cpu":
        raise KernelError(f"{name} is on `{tensor.device}`, expected the CPU")
    # A silent copy of an expert stack would cost more than the layer.
    raise KernelError(f"{name} is not contiguous (strides `{list(tensor.stride())}`)", hint="store it contiguous, once")


def _input(name: str, tensor: Tensor, shape: tuple[int, ...], names: str, dtypes: Container[torch.dtype]) -> Tensor:
    """The tensor, contiguous, if it is as expected. A call checks seven: nothing slow before something is wrong."""
    if tensor.shape != shape or tensor.dtype not in dtypes or not tensor.is_cpu:
        _refuse(name, tensor, shape, names, dtypes)
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _in_place(name: str, tensor: Tensor, shape: tuple[int, ...], names: str, dtypes: Container[torch.dtype]) -> None:
    """Refuse a tensor that is not as expected, or not contiguous."""
    if tensor.shape != shape or tensor.dtype not in dtypes or not tensor.is_cpu or not tensor.is_contiguous():
        _refuse(name, tensor, shape, names, dtypes)


class Experts:
    """The experts of one layer, checked once; a call checks what varies. For the arguments see `skip_experts`.

    The weights are not kept alive, nor are they copied: whoever made them may free or replace them at any time.
    `stands_for` says whether this object is still about the given tensors, and a call refuses when it is not.
    """

    def __init__(
        self,
        gate_up: Tensor,
        down: Tensor,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        activation: str = "silu",
        alpha: float = 1.702,
        limit: float = 7.0,
        transposed: bool = False,
        interleaved: bool = False,
    ) -> None:
        if down.dim() != 3:
            raise KernelError(f"down has shape `{list(down.shape)}`, expected three dimensions")
        if activation not in ACTIVATIONS:
            raise KernelError(f"activation is `{activation}`, expected one of {', '.join(ACTIVATIONS)}")
        E, H, I = down.shape[0], down.shape[2 if transposed else 1], down.shape[1 if transposed else 2]  # noqa: E741
        names = "[E, H, 2I]" if transposed else "[E, 2I, H]"
        _in_place("gate_up", gate_up, (E, H, 2 * I) if transposed else (E, 2 * I, H), names, _DTYPES)
        dtypes = (gate_up.dtype,)
        _in_place("down", down, tuple(down.shape), "[E, I, H]" if transposed else "[E, H, I]", dtypes)
        if gate_up_bias is not None:
            _in_place("gate_up_bias", gate_up_bias, (E, 2 * I), "[E, 2I]", dtypes)
        if down_bias is not None:
            _in_place("down_bias", down_bias, (E, H), "[E, H]", dtypes)
        self.hidden, self.num_experts, self.dtype = H, E, gate_up.dtype
        given = (gate_up, down, gate_up_bias, down_bias)
        self._weights = tuple(None if t is None else (weakref.ref(t), t.data_ptr(), t.shape, t.dtype) for t in given)
        self._prepared = _Args(
            struct_size=ctypes.sizeof(_Args),
            hidden=H,
            intermediate=I,
            experts=E,
            weight_dtype=_DTYPES[gate_up.dtype],
            activation=ACTIVATIONS[activation],
            alpha=alpha,
            limit=limit,
            transposed=transposed,
            interleaved=interleaved,
            gate_up=gate_up.data_ptr(),
            down=down.data_ptr(),
            gate_up_bias=None if gate_up_bias is None else gate_up_bias.data_ptr(),
            down_bias=None if down_bias is None else down_bias.data_ptr(),
        )
        self._run = load().modes_cpu_skip_experts

    def stands_for(self, *given: Tensor | None) -> bool:
        """Whether these are the tensors that were checked: the same objects, with the same memory."""
        return len(given) == len(self._weights) and all(map(_unchanged, self._weights, given))

    def __call__(
        self,
        x: Tensor,
        expert_ids: Tensor,
        expert_weights: Tensor,
        group: Tensor,
        tau: Tensor,
        score_scale: Tensor,
        *,
        score: Tensor | None = None,
        kept: Tensor | None = None,
        threads: int | None = None,
    ) -> Tensor:
        weights = [None if known is None else known[0]() for known in self._weights]  # held until the call returns
        if not self.stands_for(*weights):
            raise KernelError("the experts' weights were freed or replaced since they were checked")
        if x.dim() != 2 or expert_ids.dim() != 2 or tau.dim() != 1:
            shapes = ", ".join(f"`{list(tensor.shape)}`" for tensor in (x, expert_ids, tau))
            raise KernelError(f"x, expert_ids, tau have shapes {shapes}, expected [T, H], [T, k] and [G]")
        T, k = x.shape[0], expert_ids.shape[1]
        G, E, dtype = tau.shape[0], self.num_experts, x.dtype
        per_expert = score_scale.dim() == 2
        # Bound to names, so that copies live until the call returns.
        x = _input("x", x, (T, self.hidden), "[T, H]", _DTYPES)
        expert_ids = _input("expert_ids", expert_ids, (T, k), "[T, k]", _ID_DTYPES)
        expert_weights = _input("expert_weights", expert_weights, (T, k), "[T, k]", (dtype,))
        group = _input("group", group, (T,), "[T]", _INT32)
        tau = _input("tau", tau, (G,), "[G]", _FLOAT32)
        names = "[G, E]" if per_expert else "[G]"
        score_scale = _input("score_scale", score_scale, (G, E) if per_expert else (G,), names, _FLOAT32)
        if score is not None:
            score = _input("score", score, (T, k), "[T, k]", _FLOAT32)
        if kept is not None:
            _in_place("kept", kept, (G,), "[G]", (torch.int64,))
        out = torch.empty_like(x)

        args: Any = _Args.from_buffer_copy(self._prepared)  # a struct of its own: calls may run at the same time
        args.tokens, args.top_k, args.groups = T, k, G
        args.activation_dtype, args.id_dtype = _DTYPES[dtype], _ID_DTYPES[expert_ids.dtype]
        args.score_scale_per_expert = per_expert
        args.threads = torch.get_num_threads() if threads is None else threads
        args.x, args.expert_ids, args.expert_weights = x.data_ptr(), expert_ids.data_ptr(), expert_weights.data_ptr()
        args.group, args.tau, args.score_scale = group.data_ptr(), tau.data_ptr(), score_scale.data_ptr()
        args.score = None if score is None else score.data_ptr()
        args.kept = None if kept is None else kept.data_ptr()
        args.out = out.data_ptr()
        message = _Message()
        if status := self._run(ctypes.byref(args), None, None, 0, ctypes.byref(message)):
            said = message.text.decode(errors="replace")
            raise MemoryError(said) if status == _NO_MEMORY else KernelError(said)
        return out


_Checked = tuple["weakref.ref[Tensor]", int, torch.Size, torch.dtype]


def _unchanged(known: _Checked | None, tensor: Tensor | None) -> bool:
    if known is None or tensor is None:
        return known is None and tensor is None
    reference, pointer, shape, dtype = known
    # `module.to(...)` gives a parameter other memory, which may even lie at the old address.
    return reference() is tensor and tensor.data_ptr() == pointer and tensor.dtype is dtype and tensor.shape == shape


def skip_experts(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    group: Tensor,
    tau: Tensor,
    score_scale: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    alpha: float = 1.702,
    limit: float = 7.0,
    transposed: bool = False,
    interleaved: bool = False,
    *,
    score: Tensor | None = None,
    kept: Tensor | None = None,
    threads: int | None = None,
) -> Tensor:
    """The MoE layer of the kept (token, expert) pairs, on the CPU. Sizes: T tokens, H hidden, I intermediate, E experts.

    x: [T, H] float32, float16 or bfloat16 (A). expert_ids: [T, k] int64 or int32. expert_weights: [T, k] A.
    group: [T] int32, 0 <= group < G. tau: [G] float32. score_scale: [G] or [G, E] float32.
    gate_up: [E, 2I, H] and down: [E, H, I], or with `transposed` [E, H, 2I] and [E, I, H]; float32, float16 or bfloat16,
    not necessarily A. gate_up_bias: [E, 2I] and down_bias: [E, H] of the weights' dtype. `interleaved`: gate and up in
    turn instead of gate first. activation: `silu`, `gelu_tanh`, or `swiglu_oai` with alpha and limit (gpt-oss).
    score: [T, k] float32, compared with tau instead of score_scale * pi. kept: [G] int64, receives the kept pairs of each
    group. threads: torch.get_num_threads() unless given; the result has the same bits for any number.

    Returns [T, H] A. Raises KernelError on shapes, dtypes, an expert id or a group that is out of range, MemoryError when
    there is none for scratch space.
    """
    experts = Experts(gate_up, down, gate_up_bias, down_bias, activation, alpha, limit, transposed, interleaved)
    return experts(x, expert_ids, expert_weights, group, tau, score_scale, score=score, kept=kept, threads=threads)


def _fake(x: Tensor, *_others: object, **_score: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# A fragment, because other modules may define operators of the same namespace. Kept: it unregisters when collected.
_OPERATORS = torch.library.Library("modes", "FRAGMENT")
_OPERATORS.define(
    "skip_experts(Tensor x, Tensor expert_ids, Tensor expert_weights, Tensor group, Tensor tau, Tensor score_scale, "
    "Tensor gate_up, Tensor down, Tensor? gate_up_bias, Tensor? down_bias, str activation, float alpha, float limit, "
    "bool transposed, bool interleaved, *, Tensor? score=None) -> Tensor"
)
_OPERATORS.impl("skip_experts", skip_experts, "CPU")
torch.library.register_fake("modes::skip_experts", _fake, lib=_OPERATORS)
