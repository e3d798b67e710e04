"""The operator from Python: a layer's experts, checked once, and the PyTorch operator `modes::skip_experts` on top of them.

Its contract is `kernels/include/modes.h`; what is kept follows MoDES (arXiv:2511.15690, eq. 3 and 5):
`score_scale[group] * pi >= tau[group]` with `pi = w / sum(w)`. The library is loaded when it is first needed, and
`modes_cli.runtime.devices` says how a call runs on each kind of device.

Importing this module defines `torch.ops.modes.skip_experts`, for the CPU, for CUDA and for fake tensors, so that
`torch.export`, `torch.compile` and the ONNX exporter see one operator.
"""

import ctypes
import threading
import weakref
from collections.abc import Container

import torch
from torch import Tensor

from modes_cli.errors import KernelError
from modes_cli.runtime import devices
from modes_cli.runtime.interface import ACTIVATIONS, DTYPES, ID_DTYPES, NO_MEMORY, PACKED, QUANTISED, SIZE, Message
from modes_cli.runtime.libraries import CPU, CUDA, REBUILD, available, isa, library_path, load, version

_INT32, _INT64, _FLOAT16, _FLOAT32 = (torch.int32,), (torch.int64,), (torch.float16,), (torch.float32,)
_GROUP = 32  # elements of quantised weights that are stored together


class _Said(threading.local):
    """Where a thread's calls leave their messages."""

    def __init__(self) -> None:
        self.message = Message()
        self.reference = ctypes.byref(self.message)


_SAID = _Said()


def _refuse(
    name: str, tensor: Tensor, shape: tuple[int, ...], names: str, dtypes: Container[torch.dtype], device: torch.device
) -> None:
    """Raise what is wrong with a tensor."""
    if tuple(tensor.shape) != shape:
        raise KernelError(f"{name} has shape `{list(tensor.shape)}`, expected {names} = {list(shape)}")
    if tensor.dtype not in dtypes:
        known = (*DTYPES, *ID_DTYPES, *QUANTISED)
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in known if dtype in dtypes)
        raise KernelError(f"{name} is `{str(tensor.dtype).removeprefix('torch.')}`, expected {expected}")
    if tensor.device != device:
        raise KernelError(f"{name} is on `{tensor.device}`, expected `{device}`, where the experts' weights are")
    # A silent copy of an expert stack would cost more than the layer.
    raise KernelError(f"{name} is not contiguous (strides `{list(tensor.stride())}`)", hint="store it contiguous, once")


def _input(
    name: str, tensor: Tensor, shape: tuple[int, ...], names: str, dtypes: Container[torch.dtype], device: torch.device
) -> Tensor:
    """The tensor, contiguous, if it is as expected. A call checks six or more: nothing slow before something is wrong."""
    if tensor.shape != shape or tensor.dtype not in dtypes or tensor.device != device:
        _refuse(name, tensor, shape, names, dtypes, device)
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _in_place(
    name: str, tensor: Tensor, shape: tuple[int, ...], names: str, dtypes: Container[torch.dtype], device: torch.device
) -> None:
    """Refuse a tensor that is not as expected, or not contiguous."""
    if tensor.shape != shape or tensor.dtype not in dtypes or tensor.device != device or not tensor.is_contiguous():
        _refuse(name, tensor, shape, names, dtypes, device)


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
        *,
        gate_up_scales: Tensor | None = None,
        down_scales: Tensor | None = None,
        block: int = 0,
    ) -> None:
        if down.dim() != 3 or gate_up.dim() != 3:
            raise KernelError(f"gate_up and down have shapes `{list(gate_up.shape)}` and `{list(down.shape)}`, expected three "
                              "dimensions")  # fmt: skip
        if activation not in ACTIVATIONS:
            raise KernelError(f"activation is `{activation}`, expected one of {', '.join(ACTIVATIONS)}")
        E, H, I = down.shape[0], down.shape[2 if transposed else 1], down.shape[1 if transposed else 2]  # noqa: E741
        names, dtypes, device = "[E, H, 2I]" if transposed else "[E, 2I, H]", (gate_up.dtype,), gate_up.device
        if gate_up_scales is not None or down_scales is not None:
            I = gate_up.shape[1] // 2  # noqa: E741
            _check_quantised(gate_up, down, gate_up_scales, down_scales, block, transposed)
            dtypes = _FLOAT32  # of the biases
        else:
            _in_place("gate_up", gate_up, (E, H, 2 * I) if transposed else (E, 2 * I, H), names, DTYPES, device)
            _in_place("down", down, tuple(down.shape), "[E, I, H]" if transposed else "[E, H, I]", dtypes, device)
        if gate_up_bias is not None:
            _in_place("gate_up_bias", gate_up_bias, (E, 2 * I), "[E, 2I]", dtypes, device)
        if down_bias is not None:
            _in_place("down_bias", down_bias, (E, H), "[E, H]", dtypes, device)
        self.hidden, self.num_experts, self.dtype, self.device = H, E, gate_up.dtype, device
        given, scales = (gate_up, down, gate_up_bias, down_bias), (gate_up_scales, down_scales)
        self._given = tuple(tensor is not None for tensor in given)
        self._weights = tuple((weakref.ref(t), t.data_ptr(), t.shape, t.dtype) for t in (*given, *scales) if t is not None)
        # Of modes_args, what every call has: sizes, what the experts are, and where their weights lie.
        self._intermediate, self._layout = I, (transposed, interleaved)
        self._weight_dtype = DTYPES[self.dtype] if gate_up_scales is None else QUANTISED[self.dtype]
        self._scales = (*(0 if t is None else t.data_ptr() for t in scales), block)
        self._activation = ACTIVATIONS[activation], alpha, limit
        self._pointers = tuple(0 if t is None else t.data_ptr() for t in given)
        self._run = devices.kind_of(device).prepare(device)

    def stands_for(self, *given: Tensor | None) -> bool:
        """Whether these are the tensors that were checked: the same objects, with the same memory."""
        if tuple(tensor is not None for tensor in given) != self._given:
            return False
        there = [tensor for tensor in given if tensor is not None]
        return len(there) == len(self._weights) and all(map(_unchanged, self._weights, there))

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
        weights = []  # held until the call returns
        for known in self._weights:
            tensor = known[0]()
            if tensor is None or not _unchanged(known, tensor):
                raise KernelError("the experts' weights were freed or replaced since they were checked")
            weights.append(tensor)
        if x.dim() != 2 or expert_ids.dim() != 2 or tau.dim() != 1:
            shapes = ", ".join(f"`{list(tensor.shape)}`" for tensor in (x, expert_ids, tau))
            raise KernelError(f"x, expert_ids, tau have shapes {shapes}, expected [T, H], [T, k] and [G]")
        T, k = x.shape[0], expert_ids.shape[1]
        G, H, E, dtype, device = tau.shape[0], self.hidden, self.num_experts, x.dtype, self.device
        per_expert = score_scale.dim() == 2
        # Bound to names, so that copies live until the call returns.
        x = _input("x", x, (T, H), "[T, H]", DTYPES, device)
        expert_ids = _input("expert_ids", expert_ids, (T, k), "[T, k]", ID_DTYPES, device)
        expert_weights = _input("expert_weights", expert_weights, (T, k), "[T, k]", (dtype,), device)
        group = _input("group", group, (T,), "[T]", _INT32, device)
        tau = _input("tau", tau, (G,), "[G]", _FLOAT32, device)
        if per_expert:
            score_scale = _input("score_scale", score_scale, (G, E), "[G, E]", _FLOAT32, device)
        else:
            score_scale = _input("score_scale", score_scale, (G,), "[G]", _FLOAT32, device)
        if score is not None:
            score = _input("score", score, (T, k), "[T, k]", _FLOAT32, device)
        if kept is not None:
            _in_place("kept", kept, (G,), "[G]", _INT64, device)
        out = torch.empty_like(x)

        args = PACKED.pack(  # of its own: calls may run at the same time
            SIZE, T, H, self._intermediate, E, k, G,
            DTYPES[dtype], self._weight_dtype, ID_DTYPES[expert_ids.dtype], *self._activation, *self._layout, per_expert,
            torch.get_num_threads() if threads is None else threads,
            x.data_ptr(), expert_ids.data_ptr(), expert_weights.data_ptr(), group.data_ptr(), tau.data_ptr(),
            score_scale.data_ptr(), 0 if score is None else score.data_ptr(), *self._pointers,
            out.data_ptr(), 0 if kept is None else kept.data_ptr(), *self._scales,
        )  # fmt: skip
        if status := self._run(args, _SAID.reference):
            said = str(_SAID.message)
            raise MemoryError(said) if status == NO_MEMORY else KernelError(said)
        return out


def _check_quantised(
    gate_up: Tensor, down: Tensor, gate_up_scales: Tensor | None, down_scales: Tensor | None, block: int, transposed: bool
) -> None:
    """Refuse quantised weights that are not as expected: kernels/include/modes.h has the layout."""
    if gate_up_scales is None or down_scales is None:
        raise KernelError(f"{'gate_up' if gate_up_scales is None else 'down'}_scales is missing, the other one is given")
    if transposed:
        raise KernelError("quantised weights cannot be transposed")
    if block < _GROUP or block % _GROUP:
        raise KernelError(f"block is `{block}`, must be a multiple of {_GROUP}")
    E, H, I, device = down.shape[0], down.shape[1], gate_up.shape[1] // 2, gate_up.device  # noqa: E741
    each = 1 if gate_up.dtype == torch.int8 else 2  # weights of a byte

    def stored(depth: int) -> int:
        return -(-depth // _GROUP) * _GROUP // each

    _in_place("gate_up", gate_up, (E, 2 * I, stored(H)), "[E, 2I, stored H]", QUANTISED, device)
    _in_place("down", down, (E, H, stored(I)), "[E, H, stored I]", (gate_up.dtype,), device)
    names = "[E, 2I, blocks of H]", "[E, H, blocks of I]"
    _in_place("gate_up_scales", gate_up_scales, (E, 2 * I, -(-H // block)), names[0], _FLOAT16, device)
    _in_place("down_scales", down_scales, (E, H, -(-I // block)), names[1], _FLOAT16, device)


_Checked = tuple["weakref.ref[Tensor]", int, torch.Size, torch.dtype]


def _unchanged(known: _Checked, tensor: Tensor) -> bool:
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
    gate_up_scales: Tensor | None = None,
    down_scales: Tensor | None = None,
    block: int = 0,
    kept: Tensor | None = None,
    threads: int | None = None,
) -> Tensor:
    """The MoE layer of the kept (token, expert) pairs. Sizes: T tokens, H hidden, I intermediate, E experts.

    x: [T, H] float32, float16 or bfloat16 (A). expert_ids: [T, k] int64 or int32. expert_weights: [T, k] A.
    group: [T] int32, 0 <= group < G. tau: [G] float32. score_scale: [G] or [G, E] float32.
    gate_up: [E, 2I, H] and down: [E, H, I], or with `transposed` [E, H, 2I] and [E, I, H]; float32, float16 or bfloat16,
    not necessarily A. gate_up_bias: [E, 2I] and down_bias: [E, H] of the weights' dtype. `interleaved`: gate and up in
    turn instead of gate first. activation: `silu`, `gelu_tanh`, or `swiglu_oai` with alpha and limit (gpt-oss).
    score: [T, k] float32, compared with tau instead of score_scale * pi. kept: [G] int64, receives the kept pairs of each
    group. gate_up_scales, down_scales: float16, of quantised weights: these are int8, or uint8 for two 4-bit numbers a byte,
    `block` to a scale (modes_cli/models/quantization.py makes them), and biases float32. Not on a GPU yet.
    threads: torch.get_num_threads() unless given; the result has the same bits for any number; no effect on a GPU.

    All tensors are on one device, the CPU or a CUDA device; there the call is queued on torch's current stream.

    Returns [T, H] A. Raises KernelError on shapes, dtypes, devices, and on the CPU an expert id or a group that is out of
    range; MemoryError when there is none for scratch space.
    """
    experts = Experts(
        gate_up, down, gate_up_bias, down_bias, activation, alpha, limit, transposed, interleaved,
        gate_up_scales=gate_up_scales, down_scales=down_scales, block=block,
    )  # fmt: skip
    return experts(x, expert_ids, expert_weights, group, tau, score_scale, score=score, kept=kept, threads=threads)


def _fake(x: Tensor, *_others: object, **_score: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# A fragment, because other modules may define operators of the same namespace. Kept: it unregisters when collected.
_OPERATORS = torch.library.Library("modes", "FRAGMENT")
_OPERATORS.define(
    "skip_experts(Tensor x, Tensor expert_ids, Tensor expert_weights, Tensor group, Tensor tau, Tensor score_scale, "
    "Tensor gate_up, Tensor down, Tensor? gate_up_bias, Tensor? down_bias, str activation, float alpha, float limit, "
    "bool transposed, bool interleaved, *, Tensor? score=None, Tensor? gate_up_scales=None, Tensor? down_scales=None, "
    "int block=0) -> Tensor"
)
_OPERATORS.impl("skip_experts", skip_experts, "CPU")
_OPERATORS.impl("skip_experts", skip_experts, "CUDA")
torch.library.register_fake("modes::skip_experts", _fake, lib=_OPERATORS)

__all__ = [
    "CPU", "CUDA", "REBUILD", "Experts", "available", "isa", "library_path", "load", "skip_experts", "version",
]  # fmt: skip
