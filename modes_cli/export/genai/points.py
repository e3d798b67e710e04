"""A decoder graph for each measured operating point, and one that skips nothing. They differ from decoder.onnx in `tau` alone.

onnxruntime-genai (0.18) feeds no input that it does not know, so it moves along the frontier by the graph that it loads. The
weights stay where they are: a graph is some hundred kilobytes.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from modes_cli.artifacts.bundle import Bundle, OperatingPoint
from modes_cli.errors import BadArtifact
from modes_cli.skipping.policy import tau_vector

DECODER, NOTHING_SKIPPED = "decoder.onnx", "decoder-0.onnx"


def graph_name(point: OperatingPoint) -> str:
    """`decoder-0.75.onnx`, with a target for decoded tokens `decoder-0.75-0.5.onnx`."""
    targets = (point.target, *(() if point.decode_target is None else (point.decode_target,)))
    return f"decoder-{'-'.join(repr(target).removesuffix('.0') for target in targets)}.onnx"


def thresholds(points: Iterable[OperatingPoint]) -> dict[str, dict[str, float]]:
    """File name of each graph -> its thresholds by token group."""
    return {graph_name(point): point.tau for point in points} | {NOTHING_SKIPPED: {}}


def write_graphs(folder: Path, points: Iterable[OperatingPoint]) -> None:
    """The graphs beside decoder.onnx."""
    model = onnx.load_model(folder / DECODER, load_external_data=False)
    for name, tau in thresholds(points).items():
        _set_tau(model, tau)
        (folder / name).write_bytes(model.SerializeToString(deterministic=True))


def check_graphs(folder: Path, bundle: Bundle) -> list[str]:
    """Names of the graphs that were found to be what `write_graphs` makes of decoder.onnx.

    Raises:
        BadArtifact: one is missing, or differs in more than its thresholds.
    """
    expected = thresholds(bundle.points)
    listed = {file.path for file in bundle.files}
    model = onnx.load_model(folder / DECODER, load_external_data=False)
    for name, tau in expected.items():
        if name not in listed:
            raise BadArtifact(str(folder / name), "file", "bundle.json does not list this operating point's graph")
        _set_tau(model, tau)
        if onnx.load_model(folder / name, load_external_data=False) != model:
            raise BadArtifact(str(folder / name), "graph", "is not decoder.onnx with this operating point's `tau`")
    return sorted(expected)


def _set_tau(model: onnx.ModelProto, tau: Mapping[str, float]) -> None:
    values = tau_vector(tau).numpy().astype(np.float32)
    default = next((tensor for tensor in model.graph.initializer if tensor.name == "tau"), None)
    if default is None:
        raise BadArtifact(DECODER, "initializer `tau`", "missing")
    default.CopyFrom(numpy_helper.from_array(values, "tau"))
