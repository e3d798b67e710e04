"""One SkipExperts node as an ONNX model, and sessions of it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper
from torch import Tensor

from modes_cli.runtime import kernels
from tests.kernels.reference import Case

ELEMENT = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
}
FED = ("x", "expert_ids", "expert_weights", "group", "tau", "score_scale", "score")
NAMES = ("x", "expert_ids", "expert_weights", "group", "tau", "score_scale", "gate_up", "down", "gate_up_bias", "down_bias",
         "score")  # fmt: skip
SCALES = ("gate_up_scales", "down_scales")


def initializer(name: str, value: Tensor) -> TensorProto:
    data = value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
    return helper.make_tensor(name, ELEMENT[value.dtype], value.shape, data, raw=True)


def model(case: Case, *, outputs: Sequence[str] = ("out",), **attributes: object) -> onnx.ModelProto:
    """One SkipExperts node; activations are graph inputs with dynamic shapes, weights initializers. A bfloat16 input or
    output is cast at the border of the graph, since numpy has none."""
    nodes, inputs, initializers, names = [], [], [], []
    for name in (*NAMES, *SCALES):
        value = getattr(case, name)
        names.append("" if value is None else name)
        if value is None:
            continue
        if name not in FED:
            initializers.append(initializer(name, value))
            continue
        bfloat16 = value.dtype == torch.bfloat16
        shape = [f"{name}_{i}" for i in range(value.dim())]
        fed = TensorProto.FLOAT if bfloat16 else ELEMENT[value.dtype]
        inputs.append(helper.make_tensor_value_info(f"{name}_float" if bfloat16 else name, fed, shape))
        if bfloat16:
            nodes.append(helper.make_node("Cast", [f"{name}_float"], [name], to=TensorProto.BFLOAT16))
    while not names[-1]:
        names.pop()
    values: dict[str, object] = {"block": case.block} if case.block else {}
    values |= {"activation": case.activation, "transposed": int(case.transposed), "interleaved": int(case.interleaved)}
    nodes.append(helper.make_node("SkipExperts", names, list(outputs), domain="modes", **{**values, **attributes}))
    results = []
    for name in filter(None, outputs):
        if name == "kept":
            results.append(helper.make_tensor_value_info("kept", TensorProto.INT64, None))
        elif case.x.dtype == torch.bfloat16:
            nodes.append(helper.make_node("Cast", ["out"], ["out_float"], to=TensorProto.FLOAT))
            results.append(helper.make_tensor_value_info("out_float", TensorProto.FLOAT, None))
        else:
            results.append(helper.make_tensor_value_info("out", ELEMENT[case.x.dtype], None))
    graph = helper.make_graph(nodes, "layer", inputs, results, initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("modes", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def session(
    proto: onnx.ModelProto,
    *,
    threads: int = 1,
    library: Path | None = None,
    providers: Sequence[str] = ("CPUExecutionProvider",),
) -> ort.InferenceSession:
    """With the operators of `library`, or of the installed one."""
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library or kernels.library_path()))
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # mistakes are tested for: their errors need not be logged as well
    return ort.InferenceSession(proto.SerializeToString(), options, providers=list(providers), enable_fallback=0)


def feeds(case: Case) -> dict[str, np.ndarray]:
    values = {name: getattr(case, name) for name in FED if getattr(case, name) is not None}
    return {
        f"{name}_float" if value.dtype == torch.bfloat16 else name: (
            value.float() if value.dtype == torch.bfloat16 else value
        ).numpy()
        for name, value in values.items()
    }


def run(case: Case, *, threads: int = 1, library: Path | None = None, **attributes: object) -> Tensor:
    (out,) = session(model(case, **attributes), threads=threads, library=library).run(None, feeds(case))
    return torch.from_numpy(out).to(case.x.dtype)
