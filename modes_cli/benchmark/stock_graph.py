"""A bundle's decoder graph with ONNX Runtime's own MoE operator in the place of every SkipExperts node, else the same.

com.microsoft.MoE takes a logit per expert and does softmax and top-k itself, always with the same k, so it cannot skip. On the
CPU it has float32 experts with rows of gate and up in turn, and SwiGLU as `gate * sigmoid(alpha * gate) * (up + beta)`.

What routes before it depends on the family:

    logits    softmax and top-k in either order: the operator gets the router's own logits, as an exporter would give it
    weights   anything else (sigmoid, groups of experts, a scaling factor): the family's own nodes stay, the operator gets the
              logarithms of their weights and -1e4 elsewhere, and its output is multiplied by the sum of the weights
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from modes_cli.errors import UnknownLayout
from modes_cli.export.operator import DOMAIN, NAME
from modes_cli.export.routing import router_logits

STOCK_DOMAIN = "com.microsoft"
NEVER = -1e4  # a logit that softmax turns into 0
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
HINT = "`--no-stock` leaves the stock operators out"
# Inputs of SkipExperts by place.
_HIDDEN, _IDS, _WEIGHTS, _GATE_UP, _DOWN, _GATE_UP_BIAS, _DOWN_BIAS = 0, 1, 2, 6, 7, 8, 9

Load = Callable[[int], Any]  # one expert's part of a tensor, as the operator wants it, float32


@dataclass(frozen=True)
class Rewritten:
    """A tensor that the stock operator wants in another form: `shape` [E, ...], read one expert at a time."""

    shape: tuple[int, ...]
    load: Load


@dataclass(frozen=True)
class StockGraph:
    """Attributes:
    model: without `kept_pairs`, and without inputs that nothing is left to use. Initializers in `rewritten` have no values.
    rewritten: by name.
    routing: `logits` or `weights`, by MoE layer.
    """

    model: ir.Model
    rewritten: dict[str, Rewritten]
    routing: list[str]


def stock_graph(model: ir.Model, top_k: int) -> StockGraph:
    """Replace every SkipExperts node of a decoder; `model` is changed.

    Raises:
        UnknownLayout: the stock operator has no such activation, or no such weights.
    """
    rewritten: dict[str, Rewritten] = {}
    routing = []
    for node in [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, NAME)]:
        routing.append(_replace(model, node, top_k, rewritten))
    if not routing:
        raise UnknownLayout(f"the decoder has no `{DOMAIN}::{NAME}` node to replace", hint=HINT)
    _remove_what_skipping_needed(model)
    model.opset_imports[STOCK_DOMAIN] = 1
    model.opset_imports.pop(DOMAIN, None)
    return StockGraph(model, rewritten, routing)


def _replace(model: ir.Model, node: ir.Node, top_k: int, rewritten: dict[str, Rewritten]) -> str:
    inputs = [*node.inputs, *[None] * 11]
    hidden, ids, weights = (_present(inputs[place]) for place in (_HIDDEN, _IDS, _WEIGHTS))
    activation = _activation(node)
    transposed, interleaved = (bool(node.attributes[name].as_int()) for name in ("transposed", "interleaved"))
    experts = [
        _rewritten(model, inputs[place], rewritten, transposed, in_turn and not interleaved)
        for place, in_turn in ((_GATE_UP, True), (_GATE_UP_BIAS, True), (_DOWN, False), (_DOWN_BIAS, False))
    ]
    found = router_logits(weights, ids)
    tape = ir.tape.Tape()
    if found is not None:
        out = _moe(tape, hidden, found.logits, experts, activation, top_k, found.normalised)
    else:
        total = tape.op("ReduceSum", [weights, _ints(tape, [-1])], {"keepdims": 1})
        tiny = tape.op("Constant", [], {"value": ir.tensor(np.array(1e-37, np.float32))})
        logarithms = tape.op("Log", [tape.op("Max", [weights, tiny])])
        count = _shape_of(experts[0])[0]
        rows = tape.op("Shape", [weights], {"start": 0, "end": 1})
        size = tape.op("Concat", [rows, _ints(tape, [count])], {"axis": 0})
        elsewhere = tape.op("ConstantOfShape", [size], {"value": ir.tensor(np.array([NEVER], np.float32))})
        logits = tape.op("ScatterElements", [elsewhere, ids, logarithms], {"axis": 1})
        out = tape.op("Mul", [_moe(tape, hidden, logits, experts, activation, top_k, True), total])
    model.graph.insert_before(node, list(tape.nodes))
    node.outputs[0].replace_all_uses_with(out, replace_graph_outputs=True)
    return "weights" if found is None else "logits"


def _moe(
    tape: ir.tape.Tape, hidden: ir.Value, logits: ir.Value, experts: list[Any], activation: dict[str, Any], k: int, norm: bool
) -> ir.Value:
    while experts[-1] is None:
        experts = experts[:-1]
    attributes = {**activation, "k": k, "normalize_routing_weights": int(norm)}
    return tape.op("MoE", [hidden, logits, *experts], attributes, domain=STOCK_DOMAIN)


def _activation(node: ir.Node) -> dict[str, Any]:
    """Raises UnknownLayout."""
    kind = node.attributes["activation"].as_string()
    if kind == "silu":
        return {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}
    if kind == "swiglu_oai":
        alpha, limit = (node.attributes[name].as_float() for name in ("alpha", "limit"))
        swiglu = {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": alpha, "activation_beta": 1.0}
        return {**swiglu, "swiglu_limit": limit}
    raise UnknownLayout(f"{STOCK_DOMAIN}.MoE has no gated activation `{kind}` on the CPU", hint=HINT)


# -- weights --------------------------------------------------------------------------------------------------------------


def _rewritten(
    model: ir.Model, value: ir.Value | None, rewritten: dict[str, Rewritten], transposed: bool, take_turns: bool
) -> ir.Value | None:
    """The operator's form of one of the experts' tensors, as an initializer; the very same where that is its form already.

    Raises:
        UnknownLayout: the tensor has elements that the stock operator does not take.
    """
    if value is None:
        return None
    tensor = value.const_value
    if tensor is None or tensor.dtype not in FLOATS:
        kind = "no constant" if tensor is None else f"of type `{tensor.dtype.name}`"
        raise UnknownLayout(f"`{value.name}` is {kind}; {STOCK_DOMAIN}.MoE takes float32 experts on the CPU", hint=HINT)
    turned = transposed and len(tensor.shape) == 3
    if tensor.dtype == ir.DataType.FLOAT and not turned and not take_turns:
        return value
    shape = _sizes(tensor.shape)
    shape = (shape[0], shape[2], shape[1]) if turned else shape
    name = f"{value.name}.stock"
    if name not in rewritten:
        rewritten[name] = Rewritten(shape, _loader(tensor, turned, take_turns))
        made = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        made.const_value = ir.tensor(np.zeros(0, np.float32), name=name)  # until it is written
        model.graph.register_initializer(made)
    return model.graph.initializers[name]


def _loader(tensor: Any, turned: bool, take_turns: bool) -> Load:
    def load(expert: int) -> Any:
        part = np.asarray(tensor.numpy()[expert], dtype=np.float32)
        part = part.T if turned else part
        if take_turns:  # rows gate 0, up 0, gate 1, up 1, ...
            part = np.stack(np.split(part, 2), axis=1).reshape(part.shape)
        return np.ascontiguousarray(part)

    return load


# -- the rest of the graph ------------------------------------------------------------------------------------------------


def _remove_what_skipping_needed(model: ir.Model) -> None:
    """The counts of kept pairs, groups and thresholds, and what only they used."""
    outputs = model.graph.outputs
    for output in [output for output in outputs if output.name == "kept_pairs"]:
        outputs.remove(output)
    RemoveUnusedNodesPass()(model)
    for value in [value for value in model.graph.inputs if not value.uses()]:
        model.graph.inputs.remove(value)
        model.graph.initializers.pop(value.name or "", None)


def _present(value: ir.Value | None) -> ir.Value:
    assert value is not None
    return value


def _shape_of(value: ir.Value | None) -> tuple[int, ...]:
    shape = _present(value).shape
    assert shape is not None
    return _sizes(shape)


def _sizes(shape: Any) -> tuple[int, ...]:
    """Of a constant: no symbols."""
    return tuple(int(size) for size in shape)


def _ints(tape: ir.tape.Tape, values: list[int]) -> ir.Value:
    return tape.op("Constant", [], {"value_ints": values})
