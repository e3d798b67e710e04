"""Routing in a decoder graph: where an expert's weights come from, and one `modes::Route` node in the place of many.

A layer's softmax, top-k and normalisation are four nodes, and a formula's score (`modes_cli.export.scores`) is another. In a
decode step a node costs microseconds, whatever it computes. Only graphs that compute in float32 on the CPU have such nodes.
"""

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from modes_cli.export.operator import DOMAIN, NAME, ROUTE

IDS, WEIGHTS, SCORE = 1, 2, 10  # inputs of SkipExperts by place
_LOGITS = 0  # inputs of Route by place; its ids and weights have the places that they have in SkipExperts


@dataclass(frozen=True)
class Routing:
    """Weights [T, k] and ids that softmax and top-k give.

    Attributes:
        logits: [T, E].
        normalised: whether the weights' sum is 1.
        softmax_first: whether the softmax is of all logits, not of the chosen ones.
    """

    logits: ir.Value
    normalised: bool
    softmax_first: bool


def fuse(model: ir.Model, top_k: int) -> None:
    """One Route node before every SkipExperts node, where what is there before can be one. `model` is changed."""
    for node in [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, NAME)]:
        ids, weights = (_present(node.inputs[place]) for place in (IDS, WEIGHTS))
        found = router_logits(weights, ids)
        if found is None:
            continue
        score = node.inputs[SCORE] if len(node.inputs) > SCORE else None
        scored = None if score is None else score.producer()
        if scored is not None and (scored.domain, scored.op_type) != (DOMAIN, ROUTE):
            scored = None  # plain nodes, which go on from the new ids and weights
        score_inputs: list[ir.Value | None] = [] if scored is None else list(scored.inputs[WEIGHTS + 1 :])
        attributes: dict[str, Any] = {} if scored is None else {"power": scored.attributes["power"].as_float()}
        attributes |= {"top_k": top_k, "softmax_first": int(found.softmax_first), "normalise": int(found.normalised)}
        inputs = [found.logits, *((None, None, *score_inputs) if scored is not None else ())]
        made = ir.node(ROUTE, inputs, attributes, domain=DOMAIN, num_outputs=2 if scored is None else 3)
        for value, kind in zip(made.outputs, ("ids", "weights", "score"), strict=False):
            value.name = f"{node.outputs[0].name}.{kind}"
        model.graph.insert_before(_first_user(model, node, ids, weights), made)
        for old, new in zip((ids, weights), made.outputs, strict=False):
            old.replace_all_uses_with(new)
        if scored is not None:
            scored.outputs[2].replace_all_uses_with(made.outputs[2])
    RemoveUnusedNodesPass()(model)


def _first_user(model: ir.Model, node: ir.Node, *values: ir.Value) -> ir.Node:
    """The node before which what takes the place of `values` must stand: their first user, or `node` with all its inputs."""
    users = {id(user) for value in values for user, _ in value.uses()}
    return next((other for other in model.graph if id(other) in users), node)


def router_logits(weights: ir.Value, ids: ir.Value) -> Routing | None:
    """The logits whose softmax and top-k give these weights [T, k] and ids; None where they come about in another way."""
    weights, ids = _plain(weights), _plain(ids)
    if (route := _made_by(weights, ROUTE, DOMAIN)) is not None:
        logits = route.inputs[_LOGITS]
        if logits is None or list(route.outputs[:2]) != [ids, weights]:
            return None
        flags = (bool(route.attributes[name].as_int()) for name in ("normalise", "softmax_first"))
        return Routing(_plain(logits), *flags)
    if (softmax := _made_by(weights, "Softmax")) is not None:  # of the chosen logits
        values = _plain(_present(softmax.inputs[0]))
        chosen = _top_k(values, ids)
        return None if chosen is None or not _last_axis(softmax) else Routing(_plain(chosen), True, False)
    normalised = False
    if (division := _made_by(weights, "Div")) is not None:
        weights, total = (_plain(_present(value)) for value in division.inputs)
        summed = _made_by(total, "ReduceSum")
        if summed is None or _plain(_present(summed.inputs[0])) is not weights:
            return None
        normalised = True
    chosen = _top_k(weights, ids)
    softmax = None if chosen is None else _made_by(_plain(chosen), "Softmax")
    if softmax is None or not _last_axis(softmax):
        return None
    return Routing(_plain(_present(softmax.inputs[0])), normalised, True)


def _top_k(values: ir.Value, ids: ir.Value) -> ir.Value | None:
    """What the largest were chosen of, if both come from one TopK over the last axis."""
    node = _made_by(values, "TopK")
    if node is None or node.outputs[0] is not values or node.outputs[1] is not ids or not _last_axis(node):
        return None
    largest = node.attributes.get("largest")
    return _present(node.inputs[0]) if largest is None or largest.as_int() == 1 else None


def _made_by(value: ir.Value, operator: str, domain: str = "") -> ir.Node | None:
    node = value.producer()
    return node if node is not None and (node.domain, node.op_type) == (domain, operator) else None


def _plain(value: ir.Value) -> ir.Value:
    """Before casts, which a graph in float32 does not need."""
    while (node := value.producer()) is not None and node.domain == "" and node.op_type in ("Cast", "Identity"):
        value = _present(node.inputs[0])
    return value


def _last_axis(node: ir.Node) -> bool:
    axis = node.attributes.get("axis")
    return axis is None or axis.as_int() in (-1, 1)  # of two


def _present(value: ir.Value | None) -> ir.Value:
    assert value is not None
    return value
