"""Graphs that name other files, hold what runs elsewhere, or are none."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from modes_cli.errors import BadArtifact
from modes_cli.runtime.ort_model import OrtModel
from modes_cli.runtime.session import session
from tests.attacks.bundles import NORM, SHARD, assert_verify_fails
from tests.export.bundles import relist


def external(model: onnx.ModelProto, **fields: str) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == NORM)
    for entry in tensor.external_data:
        entry.value = fields.get(entry.key, entry.value)


def big(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(1 << 19, np.float32), "big"))


def foreign_node(model: onnx.ModelProto) -> None:
    model.graph.node.append(onnx.helper.make_node("Run", ["logits"], ["x"], domain="evil"))


def other_operator(model: onnx.ModelProto) -> None:
    model.graph.node.append(onnx.helper.make_node("SkipEverything", ["logits"], ["x"], domain="modes"))


def function(model: onnx.ModelProto) -> None:
    model.functions.append(
        onnx.helper.make_function("modes", "SkipExperts", ["a"], ["b"], [], [onnx.helper.make_opsetid("", 23)])
    )


def external_constant(model: onnx.ModelProto) -> None:
    """Not an initializer: hidden in an attribute, where a careless check does not look."""
    tensor = onnx.TensorProto(
        name="hidden", dims=[1], data_type=onnx.TensorProto.FLOAT, data_location=onnx.TensorProto.EXTERNAL
    )
    tensor.external_data.add(key="location", value="../../etc/passwd")
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["x"], value=tensor))


def hidden_in(operator: str, attribute: str) -> Callable[[onnx.ModelProto], None]:
    """A node that runs a graph of its own, as control flow does."""

    def change(model: onnx.ModelProto) -> None:
        inner = onnx.helper.make_graph([onnx.helper.make_node("Run", ["a"], ["b"], domain="evil")], "inner", [], [])
        model.graph.node.append(onnx.helper.make_node(operator, ["logits"], ["x"], **{attribute: inner}))

    return change


def endless(model: onnx.ModelProto) -> None:
    """2^62 turns of nothing, in operators that ONNX Runtime has."""
    info = onnx.helper.make_tensor_value_info
    inner = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["go_in"], ["go_out"])],
        "turn",
        [info("turn", onnx.TensorProto.INT64, []), info("go_in", onnx.TensorProto.BOOL, [])],
        [info("go_out", onnx.TensorProto.BOOL, [])],
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(1 << 62), "turns"))
    model.graph.node.append(onnx.helper.make_node("Loop", ["turns", ""], [], body=inner))


def training(model: onnx.ModelProto) -> None:
    model.training_info.add().algorithm.CopyFrom(onnx.helper.make_graph([], "train", [], []))


def external_tensor(name: str) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name=name, dims=[1], data_type=onnx.TensorProto.FLOAT, data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../../etc/passwd")
    return tensor


def sparse(model: onnx.ModelProto) -> None:
    """Not among the initializers either."""
    indices = onnx.numpy_helper.from_array(np.zeros(1, np.int64), "indices")
    model.graph.sparse_initializer.append(onnx.SparseTensorProto(values=external_tensor("hidden"), indices=indices, dims=[4]))


def sparse_attribute(model: onnx.ModelProto) -> None:
    node = onnx.helper.make_node("Constant", [], ["x"])
    indices = onnx.numpy_helper.from_array(np.zeros(1, np.int64), "indices")
    tensor = onnx.SparseTensorProto(values=external_tensor("hidden"), indices=indices, dims=[4])
    node.attribute.add(name="sparse_value", type=onnx.AttributeProto.SPARSE_TENSOR, sparse_tensor=tensor)
    model.graph.node.append(node)


def list_attribute(model: onnx.ModelProto) -> None:
    node = onnx.helper.make_node("Constant", [], ["x"])
    node.attribute.add(name="value", type=onnx.AttributeProto.TENSORS, tensors=[external_tensor("hidden")])
    model.graph.node.append(node)


def domain(name: str, version: int = 1) -> Callable[[onnx.ModelProto], None]:
    return lambda model: model.opset_import.append(onnx.helper.make_opsetid(name, version))


def stock_moe(model: onnx.ModelProto) -> None:
    """Of a domain from which graphs have other operators."""
    domain("com.microsoft")(model)
    model.graph.node.append(onnx.helper.make_node("MoE", ["inputs_embeds"], ["moe"], domain="com.microsoft"))


GRAPHS: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "parent folder": (lambda m: external(m, location="../" + SHARD), "outside"),
    "absolute path": (lambda m: external(m, location="/etc/passwd"), "outside"),
    "a file that holds no weights": (lambda m: external(m, location="tokenizer.json"), "no tensor"),
    "offset past the end": (lambda m: external(m, offset=str(1 << 50)), "no tensor"),
    "negative offset": (lambda m: external(m, offset="-1"), "no tensor"),
    "another length": (lambda m: external(m, length="1"), "no tensor"),
    "another tensor": (lambda m: external(m, offset="4096", length=str(16 * 64 * 64 * 4)), "decoder"),
    "foreign operator": (foreign_node, "evil"),
    "another operator of ours": (other_operator, "SkipEverything"),
    "foreign opset": (lambda m: m.opset_import.append(onnx.helper.make_opsetid("evil", 1)), "evil"),
    "function": (function, "SkipExperts"),
    "a loop without end": (endless, "Loop"),
    "a loop that hides an operator": (hidden_in("Loop", "body"), "Loop"),
    "a branch that hides an operator": (hidden_in("If", "then_branch"), "If"),
    "a scan that hides an operator": (hidden_in("Scan", "body"), "Scan"),
    "a graph of an operator that has none": (hidden_in("Relu", "body"), "Relu"),
    "training": (training, "training_info"),
    "operators of ONNX Runtime's own": (stock_moe, "com.microsoft::MoE"),
    "another version of ONNX Runtime's own": (domain("com.microsoft", 2), "com.microsoft"),
    "operators of machine learning before networks": (domain("ai.onnx.ml", 3), "ai.onnx.ml"),
    "another version of our operators": (domain("modes", 2), "modes"),
    "operators of the future": (domain("", 99), "99"),
    "external sparse initializer": (sparse, "hidden"),
    "external sparse attribute": (sparse_attribute, "hidden"),
    "external list attribute": (list_attribute, "hidden"),
    "a folder in the location": (lambda m: external(m, location="./" + SHARD), "outside"),
    "a Windows path": (lambda m: external(m, location="..\\..\\weights"), "no tensor"),
    "an offset that is no number": (lambda m: external(m, offset="0x1000"), "no tensor"),
    "an offset of 5,000 digits": (lambda m: external(m, offset="9" * 5000), "no tensor"),
    "weights inside": (big, "big"),
    "external attribute": (external_constant, "hidden"),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs(bundle: Path, name: str) -> None:
    change, word = GRAPHS[name]
    model = onnx.load(bundle / "decoder.onnx", load_external_data=False)
    change(model)
    (bundle / "decoder.onnx").write_bytes(model.SerializeToString())
    relist(bundle, "decoder.onnx")
    assert_verify_fails(bundle, "decoder.onnx", word)
    with pytest.raises(BadArtifact, match=word):
        session(bundle)


@pytest.mark.parametrize("raw", [b"", b"\xff" * 1000, b"not a graph"])
def test_graphs_that_are_none(bundle: Path, raw: bytes) -> None:
    (bundle / "decoder.onnx").write_bytes(raw)
    relist(bundle, "decoder.onnx")
    assert_verify_fails(bundle, "decoder.onnx")
    with pytest.raises(BadArtifact, match="decoder"):
        OrtModel(bundle)
