"""ONNX Runtime's stock operators com.microsoft.MoE (float32) and QMoE (float16 activations, 8-bit weights).

They run top_k experts for every token, but on the CPU leave out an expert whose weight is 0. Their best way of skipping,
found by trying: MoE gets only the tokens that keep a pair, the logarithms of the kept weights as logits and -1e4 elsewhere,
and its output, whose weights it normalised, is multiplied by the sum of the kept weights. QMoE takes the weights as an
input of their own, with zeros. Logits are made before the clock starts, which favours both.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import helper
from torch import Tensor

from kernels.bench.cases import Layer, Routed, Shape
from kernels.bench.names import MOE, QMOE

NEVER = -1e4  # a logit that softmax turns into 0; fits float16
Array = NDArray[Any]


class Moe:
    """float32; expects the rows of gate and up in turn."""

    name, dtype, weight_bytes = MOE, "float32", 4

    def __init__(self, shape: Shape, layers: list[Layer], threads: list[int]) -> None:
        self._shape = shape
        self._weights: list[dict[str, Array]] = []  # sessions read this memory without owning it
        self._sessions: dict[tuple[int, int], ort.InferenceSession] = {}
        for i, layer in enumerate(layers):
            weights = {"fc1": in_turn(layer.gate_up).numpy(), "fc2": layer.down.numpy()}
            self._weights.append(weights)
            for n in threads:
                inputs = ["x", "logits", "fc1", "", "fc2"]
                self._sessions[i, n] = _session("MoE", shape, inputs, weights, n, normalize_routing_weights=1)

    def takes(self, _tokens: int, _ratio: float) -> bool:
        return True

    def work(self, routed: Routed, ratio: float, threads: int) -> Callable[[], Array]:
        session, x, keep = self._sessions[routed.layer, threads], routed.x.numpy(), routed.keep[ratio]
        logits = spread(routed, torch.where(keep, routed.weights.log(), NEVER), self._shape, NEVER)
        if keep.all():
            return lambda: session.run(None, {"x": x, "logits": logits})[0]
        rows = keep.any(-1).nonzero()[:, 0].numpy()
        some, total = logits[rows], (routed.weights * keep).sum(-1, keepdim=True).numpy()[rows]

        def skipping() -> Array:
            out = np.zeros_like(x)
            out[rows] = session.run(None, {"x": x[rows], "logits": some})[0] * total
            return out

        return skipping


class QMoe:
    """8-bit weights, one float16 scale for each row of a weight matrix."""

    name, dtype, weight_bytes = QMOE, "float16/int8", 1

    def __init__(self, shape: Shape, layers: list[Layer], threads: list[int]) -> None:
        self._shape = shape
        self._weights: list[dict[str, Array]] = []  # sessions read this memory without owning it
        self._sessions: dict[tuple[int, int], ort.InferenceSession] = {}
        for i, layer in enumerate(layers):
            (fc1, scale1), (fc2, scale2) = eight_bits(in_turn(layer.gate_up)), eight_bits(layer.down)
            weights = {"fc1": fc1, "scale1": scale1, "fc2": fc2, "scale2": scale2}
            self._weights.append(weights)
            # inputs 7 to 13 are biases, a third weight and zero points
            inputs = ["x", "logits", "fc1", "scale1", "", "fc2", "scale2", *[""] * 7, "weights"]
            for n in threads:
                self._sessions[i, n] = _session("QMoE", shape, inputs, weights, n, expert_weight_bits=8)

    def takes(self, _tokens: int, _ratio: float) -> bool:
        return True

    def work(self, routed: Routed, ratio: float, threads: int) -> Callable[[], Array]:
        session = self._sessions[routed.layer, threads]
        feeds = {
            "x": routed.x.half().numpy(),
            "logits": spread(routed, routed.weights.float().log(), self._shape, NEVER).astype(np.float16),
            "weights": spread(routed, routed.weights.float() * routed.keep[ratio], self._shape, 0.0).astype(np.float16),
        }
        return lambda: session.run(None, feeds)[0]


def in_turn(gate_up: Tensor) -> Tensor:
    """[E, 2I, H] with rows gate 0, up 0, gate 1, up 1, ..."""
    gate, up = gate_up.chunk(2, dim=1)
    return torch.stack([gate, up], dim=2).flatten(1, 2)


def eight_bits(weight: Tensor) -> tuple[Array, Array]:
    """[E, N, K] uint8 around 128, and the scales [E, N] float16. One expert at a time, to save memory."""
    codes, scales = torch.empty(weight.shape, dtype=torch.uint8), torch.empty(weight.shape[:2], dtype=torch.float16)
    for e, matrix in enumerate(weight):
        scales[e] = matrix.float().abs().amax(-1) / 127
        codes[e] = ((matrix.float() / scales[e].float()[:, None]).round() + 128).clamp(0, 255).to(torch.uint8)
    return codes.numpy(), scales.numpy()


def spread(routed: Routed, values: Tensor, shape: Shape, elsewhere: float) -> Array:
    """[T, E]: `values` [T, k] at the routed experts."""
    full = torch.full((len(routed.ids), shape.experts), elsewhere)
    array: Array = full.scatter(1, routed.ids, values).numpy()
    return array


def _session(
    operator: str, shape: Shape, inputs: list[str], weights: dict[str, Array], threads: int, **attributes: Any
) -> ort.InferenceSession:
    """One of ONNX Runtime's own, SwiGLU as silu(gate) * up."""
    kind = onnx.TensorProto.FLOAT16 if weights["fc2"].dtype != np.float32 else onnx.TensorProto.FLOAT
    fed = {name: (kind, "tokens", width) for name, width in stock_widths(shape).items() if name in inputs}
    return node_session("com.microsoft", operator, inputs, fed, weights, threads, **stock_attributes(shape), **attributes)


def stock_widths(shape: Shape) -> dict[str, int]:
    """Inputs that are fed, by name."""
    return {"x": shape.hidden, "logits": shape.experts, "weights": shape.experts}


def stock_attributes(shape: Shape) -> dict[str, Any]:
    """Of MoE and QMoE alike."""
    swiglu = {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}
    return {"k": shape.top_k, **swiglu}


def node_session(
    domain: str,
    operator: str,
    inputs: list[str],
    fed: dict[str, tuple[Any, ...]],
    weights: dict[str, Array],
    threads: int,
    providers: tuple[str, ...] = ("CPUExecutionProvider",),
    library: str | None = None,
    **attributes: Any,
) -> ort.InferenceSession:
    """A graph of one operator with the output `out`. The weights stay where they are, outside the model's file.

    Args:
        inputs: of the node, in its order; "" for one that is left out.
        fed: element type and dimensions of those that come with a call; `x` is one, and the output is like it.
        library: of custom operators.
    """
    node = helper.make_node(operator, inputs, ["out"], domain=domain, **attributes)
    values = [helper.make_tensor_value_info(name, kind, list(sizes)) for name, (kind, *sizes) in fed.items()]
    kind, *sizes = fed["x"]
    graph = helper.make_graph([node], operator, values, [helper.make_tensor_value_info("out", kind, sizes)])
    for name, array in weights.items():
        place = onnx.StringStringEntryProto(key="location", value="given to the session")
        dtype = helper.np_dtype_to_tensor_dtype(array.dtype)
        graph.initializer.append(
            onnx.TensorProto(
                name=name, dims=array.shape, data_type=dtype, data_location=onnx.TensorProto.EXTERNAL, external_data=[place]
            )
        )
    domains = [helper.make_opsetid("", 21), helper.make_opsetid(domain, 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Threads that spin after their work is done would slow down whoever is timed next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_external_initializers(list(weights), [ort.OrtValue.ortvalue_from_numpy(array) for array in weights.values()])
    if library is not None:
        options.register_custom_ops_library(library)
    return ort.InferenceSession(model.SerializeToString(), options, providers=list(providers))
