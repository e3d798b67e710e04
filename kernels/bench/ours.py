"""What can be timed, and our operator as the first of it."""

import ctypes
import os
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from kernels.bench.cases import Layer, Routed
from kernels.bench.names import OURS
from modes_cli.runtime import interface, libraries
from modes_cli.runtime.kernels import Experts

PATH = "MODES_CUDA_PATH"
FEW_TOKENS = 8  # batched_mm copies the weights of every pair: only of use, and only fits, for as few as these


class Runtime(Protocol):
    """One way to compute the layer.

    Attributes:
        name: as in the tables. dtype: of activations and weights.
        weight_bytes: per parameter.
    """

    name: str
    dtype: str
    weight_bytes: int

    def takes(self, tokens: int, ratio: float) -> bool:
        """Whether this case is worth a row."""
        ...

    def work(self, routed: Routed, ratio: float, threads: int) -> Callable[[], Any]:
        """The call that is timed; it returns [T, H], a tensor or an array. What models do once is done before."""
        ...


class Ours:
    """`modes_cli.runtime.kernels.Experts`, as the engine calls it. `path`: the CUDA kernels that must compute it."""

    def __init__(self, layers: list[Layer], path: str | None = None) -> None:
        self.name = OURS if path is None else f"{OURS}-{path}"
        self._path, self._layers = path, layers
        self._experts = [Experts(layer.gate_up, layer.down) for layer in layers]
        self.dtype = str(layers[0].down.dtype).removeprefix("torch.")
        self.weight_bytes = layers[0].down.itemsize

    def takes(self, _tokens: int, _ratio: float) -> bool:
        return True

    def work(self, routed: Routed, ratio: float, threads: int) -> Callable[[], Tensor]:
        inputs = (routed.x, routed.ids, routed.weights, routed.group, routed.tau[ratio], routed.scale)
        call = partial(self._experts[routed.layer], *inputs, threads=threads)
        return call if self._path is None else partial(_forced, self._path, call)

    def path(self, routed: Routed) -> str:
        """The CUDA kernels that are chosen for these inputs. Raises RuntimeError where there are none."""
        layer, (tokens, top_k), G = self._layers[routed.layer], routed.ids.shape, 1
        experts, hidden, intermediate = layer.down.shape
        kind = interface.DTYPES[routed.x.dtype]
        args = interface.Args(
            struct_size=interface.SIZE, tokens=tokens, hidden=hidden, intermediate=intermediate, experts=experts, top_k=top_k,
            groups=G, activation_dtype=kind, weight_dtype=kind, id_dtype=interface.ID_DTYPES[routed.ids.dtype],
            x=routed.x.data_ptr(), expert_ids=routed.ids.data_ptr(), expert_weights=routed.weights.data_ptr(),
            group=routed.group.data_ptr(), tau=next(iter(routed.tau.values())).data_ptr(), score_scale=routed.scale.data_ptr(),
            gate_up=layer.gate_up.data_ptr(), down=layer.down.data_ptr(), out=routed.x.data_ptr(),
        )  # fmt: skip
        name, message = ctypes.c_char_p(), interface.Message()
        if libraries.load(libraries.CUDA).modes_cuda_path(ctypes.byref(args), ctypes.byref(name), ctypes.byref(message)):
            raise RuntimeError(str(message))
        return (name.value or b"").decode()


def _forced(path: str, call: Callable[[], Tensor]) -> Tensor:
    before = os.environ.get(PATH)
    os.environ[PATH] = path
    try:
        return call()
    finally:
        os.environ.pop(PATH) if before is None else os.environ.__setitem__(PATH, before)
