"""Decoders with com.microsoft.MoE: the bundle's logits for every kind of routing; what cannot be expressed is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper

from modes_cli.benchmark import stock as stock_module
from modes_cli.benchmark.stock import WEIGHTS, require_equal, stock_export
from modes_cli.benchmark.stock_graph import stock_graph
from modes_cli.calibration import calibrate
from modes_cli.errors import UnknownLayout, WriteFailed
from modes_cli.export import export_bundle
from modes_cli.export.operator import DOMAIN
from modes_cli.export.routing import fuse, router_logits
from modes_cli.requests import ExportRequest
from modes_cli.runtime.ort_model import OrtModel
from modes_cli.search import find_thresholds
from tests.checkpoint_internvl import write_internvl
from tests.checkpoint_kimi_vl import write_kimi_vl
from tests.checkpoints import small_samples
from tests.pipeline import prepared_run
from tests.runs import calibration_request, search_request

# How each routes.
ROUTING = {"qwen3_vl_moe": "logits", "internvl+gpt_oss": "logits", "kimi_vl": "weights"}


def bundle_of(name: str, base: Path) -> Path:
    if name == "qwen3_vl_moe":
        return prepared_run(base)[1] / "bundle"
    run = base / f"stock-{name}"
    if name == "kimi_vl":  # sigmoid, a bias for the choice only, a scaling factor
        checkpoint = write_kimi_vl(base / "stock-kimi")
    else:  # biases, transposed, top-k before softmax
        checkpoint = write_internvl(base / "stock-internvl", "gpt_oss", torch.bfloat16)
    calibrate(calibration_request(checkpoint, run, samples=2, batch_size=2))
    find_thresholds(search_request(run, 0.3, policy="dmt", passes=4))
    export_bundle(ExportRequest(run))
    return run / "bundle"


@pytest.fixture(scope="module", params=list(ROUTING))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> tuple[str, OrtModel]:
    return request.param, OrtModel(bundle_of(request.param, tmp_path_factory.getbasetemp()), threads=1)


def test_the_same_logits_from_a_folder_that_is_gone_afterwards(
    made: tuple[str, OrtModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, bundle = made
    monkeypatch.setattr(stock_module.tempfile, "tempdir", str(tmp_path))
    with stock_export(bundle, 1) as stock:
        (folder,) = tmp_path.iterdir()
        assert {path.name for path in folder.iterdir()} == {WEIGHTS, "decoder.onnx"}
        written = onnx.load_model(folder / "decoder.onnx", load_external_data=False)
        kinds = [(node.domain, node.op_type) for node in written.graph.node]
        assert kinds.count(("com.microsoft", "MoE")) == len(bundle.bundle.moe_layers)
        assert not any(domain == DOMAIN for domain, _ in kinds)
        routed = ROUTING[name] == "logits"
        assert ("", "TopK") not in kinds if routed else ("", "ScatterElements") in kinds  # the operator's own, or the family's
        assert bool(stock.notes) != routed
        assert {"tau", "input_ids"}.isdisjoint(value.name for value in written.graph.input)
        worst = require_equal(bundle, stock.model, small_samples(3))
        assert worst < 2e-5
        counts = stock.model.decode_steps(_prefilled(stock.model), 2, None)
        assert counts.skip_ratio() == 0
        assert int(counts.total.sum()) > 0
    assert list(tmp_path.iterdir()) == []


def _prefilled(model: OrtModel) -> Any:
    samples = small_samples(1)
    return model.prefilled(model.prompts([s.images for s in samples], [s.question for s in samples]), None)


def test_other_weights_are_noticed(made: tuple[str, OrtModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """The check that stands before every measurement fails where one expert's gate and up are exchanged."""
    _, bundle = made
    original = stock_module.stock_graph

    def exchanged(model: ir.Model, top_k: int) -> Any:
        found = original(model, top_k)
        name, part = next(iter(found.rewritten.items()))
        wrong = dataclasses.replace(part, load=lambda expert: np.ascontiguousarray(part.load(expert)[::-1]))
        return dataclasses.replace(found, rewritten=found.rewritten | {name: wrong})

    monkeypatch.setattr(stock_module, "stock_graph", exchanged)
    with stock_export(bundle, 1) as stock, pytest.raises(UnknownLayout, match="logits differ") as refused:
        require_equal(bundle, stock.model, small_samples(2))
    assert "--no-stock" in str(refused.value.hint)


def test_no_space_is_said_before_anything_is_written(
    made: tuple[str, OrtModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, bundle = made
    monkeypatch.setattr(stock_module.tempfile, "tempdir", str(tmp_path))
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(stock_module.shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(WriteFailed, match="`1000` are free") as refused, stock_export(bundle, 1):
        pass
    assert "TMPDIR" in str(refused.value.hint)
    assert list(tmp_path.iterdir()) == []


# -- small graphs of one layer --------------------------------------------------------------------------------------------


def layer(activation: str = "silu", *nodes: Any, kind: int = TensorProto.FLOAT) -> ir.Model:
    """A SkipExperts node of 3 experts, top-2, behind `nodes` that make weights and ids of `logits`."""
    attributes: dict[str, Any] = {"activation": activation, "alpha": 0.0, "limit": 0.0, "transposed": 0, "interleaved": 0}
    inputs = ["x", "ids", "weights", "group", "tau", "scale", "gate_up", "down"]
    node = helper.make_node("SkipExperts", inputs, ["out", "kept_pairs"], domain=DOMAIN, **attributes)
    floats = {"x": ["T", 4], "logits": ["T", 3], "tau": [5], "scale": [5]}
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in floats.items()]
    values.append(helper.make_tensor_value_info("group", TensorProto.INT32, ["T"]))
    outputs = [
        helper.make_tensor_value_info("out", TensorProto.FLOAT, ["T", 4]),
        helper.make_tensor_value_info("kept_pairs", TensorProto.INT64, [5]),
    ]
    weights = [
        helper.make_tensor(name, kind, shape, np.zeros(int(np.prod(shape))).astype(int if kind == TensorProto.INT8 else float))
        for name, shape in (("gate_up", (3, 4, 4)), ("down", (3, 4, 2)))
    ]
    k = helper.make_tensor("k", TensorProto.INT64, [1], [2])
    graph = helper.make_graph([*nodes, node], "layer", values, outputs, [*weights, k])
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1)]))


SOFTMAX = helper.make_node("Softmax", ["logits"], ["p"], axis=-1)
TOP = helper.make_node("TopK", ["p", "k"], ["weights", "ids"], axis=-1)
SIGMOID = helper.make_node("Sigmoid", ["logits"], ["p"])
SMALLEST = helper.make_node("TopK", ["p", "k"], ["weights", "ids"], axis=-1, largest=0)
TOP_FIRST = (
    helper.make_node("TopK", ["logits", "k"], ["chosen", "ids"], axis=-1),
    helper.make_node("Softmax", ["chosen"], ["weights"], axis=-1),
)
NORMALISED = (
    SOFTMAX,
    helper.make_node("TopK", ["p", "k"], ["v", "ids"], axis=-1),
    helper.make_node("Constant", [], ["last"], value_ints=[-1]),
    helper.make_node("ReduceSum", ["v", "last"], ["s"], keepdims=1),
    helper.make_node("Div", ["v", "s"], ["weights"]),
)


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ((SOFTMAX, TOP), ("logits", False, True)),
        (NORMALISED, ("logits", True, True)),
        (TOP_FIRST, ("logits", True, False)),
        ((SIGMOID, TOP), None),
        ((SOFTMAX, SMALLEST), None),
    ],
)
def test_which_routing_the_operator_can_do_itself(nodes: tuple[Any, ...], expected: tuple[str, bool, bool] | None) -> None:
    model = layer("silu", *nodes)
    node = next(node for node in model.graph if node.domain == DOMAIN)
    found = router_logits(node.inputs[2], node.inputs[1])  # type: ignore[arg-type]
    assert (None if found is None else (found.logits.name, found.normalised, found.softmax_first)) == expected
    fuse(model, 2)  # the same of the node that takes its place
    kinds = [other.op_type for other in model.graph if other.op_type in ("Route", "TopK")]
    assert kinds == (["TopK"] if expected is None else ["Route"])
    again = router_logits(node.inputs[2], node.inputs[1])  # type: ignore[arg-type]
    assert (None if again is None else (again.logits.name, again.normalised, again.softmax_first)) == expected


def test_what_the_stock_operator_lacks_is_refused() -> None:
    with pytest.raises(UnknownLayout, match="no gated activation `gelu_tanh`"):
        stock_graph(layer("gelu_tanh", SOFTMAX, TOP), 2)
    with pytest.raises(UnknownLayout, match="`gate_up` is of type `INT8`"):
        stock_graph(layer("silu", SOFTMAX, TOP, kind=TensorProto.INT8), 2)
    plain = layer("silu", SOFTMAX, TOP)
    stock_graph(plain, 2)
    with pytest.raises(UnknownLayout, match="no `modes::SkipExperts` node"):
        stock_graph(plain, 2)
