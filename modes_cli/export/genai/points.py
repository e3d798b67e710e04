"""A decoder graph for each measured operating point, and one that skips nothing, made from decoder.onnx; the same again of
decoder-cuda.onnx, where the bundle has it.

onnxruntime-genai (0.18) feeds no input that it does not know, so it moves along the frontier by the graph that it loads. In
these graphs `tau` and `logits_to_keep` are constants, and only the last row of logits is computed: from the shape [B, 1, V] it
knows that it needs no more. The weights stay where they are; a graph is some hundred kilobytes.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from modes_cli.artifacts.bundle import Bundle, OperatingPoint
from modes_cli.errors import BadArtifact
from modes_cli.export.integrity import HALF_DECODER
from modes_cli.skipping.policy import tau_vector

DECODER = "decoder.onnx"


def graph_name(point: OperatingPoint | Bundle, base: str = DECODER) -> str:
    """`decoder-0.75.onnx`, with a target for decoded tokens `decoder-0.75-0.5.onnx`; a bundle's is that of its own point."""
    targets = (point.target, *(() if point.decode_target is None else (point.decode_target,)))
    return _named(base, "-".join(repr(target).removesuffix(".0") for target in targets))


def _named(base: str, point: str) -> str:
    return f"{base.removesuffix('.onnx')}-{point}.onnx"


def thresholds(points: Iterable[OperatingPoint], base: str = DECODER) -> dict[str, dict[str, float]]:
    """File name of each graph -> its thresholds by token group."""
    return {graph_name(point, base): point.tau for point in points} | {_named(base, "0"): {}}


def write_graphs(folder: Path, points: Sequence[OperatingPoint]) -> None:
    """The graphs beside decoder.onnx, and those beside decoder-cuda.onnx if that is there."""
    for base in (name for name in (DECODER, HALF_DECODER) if (folder / name).exists()):
        model = _fixed(folder / base)
        for name, tau in thresholds(points, base).items():
            _set(model, "tau", _vector(tau))
            (folder / name).write_bytes(model.SerializeToString(deterministic=True))


def check_graphs(folder: Path, bundle: Bundle) -> list[str]:
    """Names of the graphs that were found to be what `write_graphs` makes.

    Raises:
        BadArtifact: one is missing, or is something else.
    """
    listed = {file.path for file in bundle.files}
    found = []
    for base in (DECODER, *({HALF_DECODER} & listed)):
        model = _fixed(folder / base)
        for name, tau in thresholds(bundle.points, base).items():
            if name not in listed:
                raise BadArtifact(str(folder / name), "file", "bundle.json does not list this operating point's graph")
            _set(model, "tau", _vector(tau))
            if onnx.load_model(folder / name, load_external_data=False) != model:
                raise BadArtifact(str(folder / name), "graph", f"is not {base} with this operating point's `tau`")
            found.append(name)
    return sorted(found)


def _fixed(path: Path) -> onnx.ModelProto:
    """decoder.onnx without the inputs and outputs that onnxruntime-genai does not know."""
    model = onnx.load_model(path, load_external_data=False)
    _set(model, "logits_to_keep", np.ones(1, np.int64))
    inputs = [value for value in model.graph.input if value.name not in ("tau", "logits_to_keep")]
    outputs = [value for value in model.graph.output if value.name != "kept_pairs"]
    for values, kept in ((model.graph.input, inputs), (model.graph.output, outputs)):
        copies = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in kept]
        del values[:]
        values.extend(copies)
    for value in model.graph.output:
        if value.name == "logits":
            value.type.tensor_type.shape.dim[1].dim_value = 1
    return model


def _vector(tau: Mapping[str, float]) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.array(tau_vector(tau).tolist(), np.float32)


def _set(model: onnx.ModelProto, name: str, values: np.ndarray[tuple[int], np.dtype[np.float32 | np.int64]]) -> None:
    default = next((tensor for tensor in model.graph.initializer if tensor.name == name), None)
    if default is None:
        raise BadArtifact(DECODER, f"initializer `{name}`", "missing")
    default.CopyFrom(numpy_helper.from_array(values, name))
