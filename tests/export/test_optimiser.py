"""The optimiser gives onnxscript's own bytes, and tries rules of several nodes on fewer nodes than onnxscript does."""

from typing import Any

import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnxscript import optimizer, rewriter
from onnxscript.rewriter import onnx_fusions

from modes_cli.export.optimiser import optimise

LAYERS = 6


def graph() -> ir.Model:
    """Layers that rotate half of a vector, with nodes around that no rule of several nodes can begin with."""
    body = "\n".join(
        f"""
        high{n} = Slice(x{n}, half, whole, last)
        low{n} = Slice(x{n}, zero, half, last)
        minus{n} = Neg(high{n})
        turned{n} = Concat <axis = -1> (minus{n}, low{n})
        scaled{n} = Mul(turned{n}, factor)
        x{n + 1} = Add(scaled{n}, x{n})
        """
        for n in range(LAYERS)
    )
    return ir.from_proto(
        onnx.parser.parse_model(
            f"""
            <ir_version: 10, opset_import: ["" : 23]>
            agraph (float[2, 8] x0) => (float[2, 8] x{LAYERS})
            <int64[1] zero = {{0}}, int64[1] half = {{4}}, int64[1] whole = {{8}}, int64[1] last = {{-1}},
             float factor = {{0.5}}>
            {{ {body} }}
            """
        )
    )


def of_several_nodes() -> list[Any]:
    return [rule for rule in rewriter._DEFAULT_REWRITE_RULES if not rule._target_pattern.has_single_output_node]


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Operators of the nodes that rules of several nodes are matched against."""
    found: list[str] = []
    assert of_several_nodes()
    for rule in of_several_nodes():

        def match(model: Any, graph: Any, node: ir.Node, own: Any = rule._matcher.match, **options: Any) -> Any:
            found.append(node.op_type)
            return own(model, graph, node, **options)

        monkeypatch.setattr(rule._matcher, "match", match)
    return found


def test_same_bytes_for_less_work(tried: list[str]) -> None:
    theirs, ours = graph(), graph()
    optimizer.optimize_ir(theirs)
    onnx_fusions.fuse(theirs)
    assert {"Slice", "Mul", "Add"} <= set(tried)
    usual = len(tried)
    tried.clear()
    optimise(ours)
    assert set(tried) == {"Slice"}
    assert len(tried) < usual / 2
    bytes_of = [ir.to_proto(model).SerializeToString(deterministic=True) for model in (theirs, ours)]
    assert bytes_of[0] == bytes_of[1]
    assert "Split" in {node.op_type for node in ours.graph}  # such a rule did apply


def test_rules_are_as_before_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(optimizer, "optimize_ir", fail)
    with pytest.raises(RuntimeError, match="broken"):
        optimise(graph())
    assert not any("try_rewrite" in vars(rule) for rule in of_several_nodes())
