"""Initializers that point into the bundle's safetensors files instead of holding weights."""

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from modes_cli.errors import UnknownLayout
from modes_cli.export.operator import DOMAIN, NAME
from modes_cli.safetensors_header import Entry

INLINE_LIMIT = 1 << 20  # bytes; rotary tables and score scales are far below
DTYPES = {
    "F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16,
    "I8": ir.DataType.INT8, "U8": ir.DataType.UINT8,
}  # fmt: skip
_NAMES = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}
_BIASES, _SCALES = (8, 9), 11  # of the operator's inputs


def link(model: ir.Model, tensors: Mapping[str, Entry], folder: Path, aliases: Mapping[str, str]) -> None:
    """Give every weight of a graph its place in a file.

    The files hold what they hold, and graphs of several types share them. Where a graph wants a weight in another type than it
    is stored in, it gets a Cast behind it, behind the Gather for embeddings; weights of SkipExperts go in as they are, since
    the operator reads them so; beside quantised ones it takes float32 biases.

    Args:
        tensors: what the files hold, by name.
        folder: where the graph will lie; locations are file names inside it.
        aliases: names of tied tensors -> the name under which the file holds them.

    Raises:
        UnknownLayout: a weight is in no file, has another shape there, or is too large to be stored in the graph.
    """
    for name in list(model.graph.initializers):
        value = model.graph.initializers[name]
        entry = tensors.get(aliases.get(name, name))
        if entry is None:
            _check_inline(name, value)
            continue
        shape = () if value.shape is None else tuple(value.shape.dims)
        if shape != entry.shape:
            raise UnknownLayout(f"the graph wants `{name}` with shape {shape}, the checkpoint has {entry.shape}")
        _replace(model, value, entry, folder)


def _check_inline(name: str, value: ir.Value) -> None:
    if value.const_value is None:
        raise UnknownLayout(f"the graph needs `{name}`, which the checkpoint does not hold")
    if value.const_value.nbytes > INLINE_LIMIT:
        raise UnknownLayout(
            f"the graph would hold `{name}` with {value.const_value.nbytes} bytes; weights belong into safetensors files"
        )


def _replace(model: ir.Model, value: ir.Value, entry: Entry, folder: Path) -> None:
    dtype, wanted = DTYPES[entry.dtype], value.dtype
    assert value.name is not None
    value.const_value = ir.ExternalTensor(
        entry.file.name, entry.start, entry.length, dtype, shape=ir.Shape(entry.shape), name=value.name, base_dir=folder
    )
    value.type = ir.TensorType(dtype)
    if dtype == wanted:
        return
    assert wanted is not None
    cast: ir.Value | None = None
    for node, index in value.uses():
        if (node.domain, node.op_type) == (DOMAIN, NAME) and not (index in _BIASES and len(node.inputs) > _SCALES):
            continue
        if node.op_type == "Gather" and index == 0:
            _cast_behind(model, node, wanted)
            continue
        if cast is None:
            cast = _cast(value, wanted)
            model.graph.insert_before(model.graph[0], _producer(cast))
        node.replace_input_with(index, cast)


def _cast(value: ir.Value, wanted: ir.DataType) -> ir.Value:
    node = ir.node("Cast", [value], {"to": wanted})
    node.outputs[0].name = f"{value.name}.{_NAMES[wanted]}"
    return node.outputs[0]


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node


def _cast_behind(model: ir.Model, gather: ir.Node, wanted: ir.DataType) -> None:
    """Only the rows that were looked up are cast, not the whole table."""
    out = gather.outputs[0]
    users = list(out.uses())
    cast = _cast(out, wanted)
    model.graph.insert_after(gather, _producer(cast))
    for node, index in users:
        node.replace_input_with(index, cast)
