"""Graphs of a bundle, checked before anything runs them."""

import onnx
from onnx import TensorProto, helper

from modes_cli.export.integrity import graph_weights, read_bundle
from modes_cli.export.onnx_checks import check_graph
from modes_cli.safetensors_header import Entry
from tests.fuzz.mutate import as_onnx as mutate
from tests.fuzz.places import real, scratch

__all__ = ["mutate", "one", "seeds"]

_weights: dict[str, Entry] = {}


def weights() -> dict[str, Entry]:
    if not _weights:
        folder = real("bundle")
        _weights.update(graph_weights(folder, read_bundle(folder)))
    return _weights


def small(*, branches: bool) -> bytes:
    """One layer with a weight by reference and an inline one; with `branches` a node that has graphs of its own."""
    entry = next(entry for entry in weights().values() if len(entry.shape) == 3)
    weight = TensorProto(name="w", dims=entry.shape, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": entry.file.name, "offset": entry.start, "length": entry.length}.items():
        weight.external_data.add(key=key, value=str(value))
    inputs = ["x", "ids", "p", "group", "tau", "scale", "w", "w"]
    branch = helper.make_graph([helper.make_node("Identity", ["y"], ["z1"])], "branch", [], [
        helper.make_tensor_value_info("z1", TensorProto.FLOAT, None)
    ])  # fmt: skip
    nodes = [
        helper.make_node("SkipExperts", inputs, ["y"], domain="modes", activation="silu"),
        helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch)
        if branches
        else helper.make_node("Identity", ["y"], ["z"]),
    ]
    kinds = {"x": TensorProto.FLOAT, "ids": TensorProto.INT64, "p": TensorProto.FLOAT, "group": TensorProto.INT32,
             "scale": TensorProto.FLOAT, "c": TensorProto.BOOL}  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info(name, kind, ["n", "m"]) for name, kind in kinds.items()],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
        [weight, helper.make_tensor("tau", TensorProto.FLOAT, [4], [0.0] * 4)],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("modes", 1)], ir_version=10
    )
    return bytes(model.SerializeToString())


def seeds() -> list[bytes]:
    embedding = onnx.load_model(real("bundle", "embedding.onnx"), load_external_data=False)
    return [small(branches=False), small(branches=True), bytes(embedding.SerializeToString())]


def one(data: bytes) -> None:
    folder = scratch("graph")
    if not any(folder.iterdir()):  # the checker looks whether external files are there
        for path in real("bundle").glob("*.safetensors"):
            (folder / path.name).write_bytes(path.read_bytes())
    path = folder / "decoder.onnx"
    path.write_bytes(data)
    check_graph(path, weights())
