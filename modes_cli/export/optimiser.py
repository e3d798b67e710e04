"""onnxscript's optimiser, without what makes it slow on graphs of thousands of nodes."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import onnx_ir as ir
from onnxscript import optimizer, rewriter
from onnxscript.rewriter import onnx_fusions


def optimise(model: ir.Model) -> None:
    """What torch.onnx.export(optimize=True) does, and the fusions of the graph's opset."""
    with _matched_from_their_first_node():
        optimizer.optimize_ir(model)
        onnx_fusions.fuse(model)


@contextlib.contextmanager
def _matched_from_their_first_node() -> Iterator[None]:
    """Rules whose pattern ends in several nodes are tried on every node of the graph, together with all nodes that could be
    the others: time that grows with the square of the graph. Here they are only tried on nodes that the first one can be,
    which are the only ones they match.
    """
    slow = [rule for rule in rewriter._DEFAULT_REWRITE_RULES if not rule._target_pattern.has_single_output_node]
    for rule in slow:
        guarded = _guarded(rule.try_rewrite, rule._target_pattern.output_nodes[0].op_identifier())
        rule.try_rewrite = guarded  # type: ignore[method-assign]
    try:
        yield
    finally:
        for rule in slow:
            del rule.try_rewrite  # the class's own shows again


def _guarded(try_rewrite: Callable[..., Any], first: object) -> Callable[..., Any]:
    def guarded(model: ir.Model, graph: Any, node: ir.Node, **options: Any) -> Any:
        return try_rewrite(model, graph, node, **options) if first in (None, node.op_identifier()) else None

    return guarded
