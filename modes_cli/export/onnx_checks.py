"""What an exported graph may contain. A graph from elsewhere is parsed, never run, before this has passed."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from modes_cli.errors import BadArtifact
from modes_cli.export.integrity import require_file
from modes_cli.safetensors_header import Entry

GRAPH_LIMIT = 256 << 20  # bytes; graphs hold no weights
INLINE_LIMIT = 1 << 20
DOMAINS = {"": range(13, 27), "modes": range(1, 2), "com.microsoft": range(1, 2)}
# Of ai.onnx, any.
OPERATORS = {"modes": {"SkipExperts", "Route"}, "com.microsoft": {"GroupQueryAttention", "MRotaryEmbedding"}}
_DTYPES = {
    "F32": onnx.TensorProto.FLOAT, "F16": onnx.TensorProto.FLOAT16, "BF16": onnx.TensorProto.BFLOAT16,
    "I8": onnx.TensorProto.INT8, "U8": onnx.TensorProto.UINT8,
}  # fmt: skip


def check_graph(path: Path, weights: Mapping[str, Entry]) -> str:
    """Check one graph against the weights of its bundle; what was found, in words.

    Raises:
        BadArtifact: not ONNX, unknown operators, or external data that is not exactly one tensor of the bundle.
    """
    size = require_file(path)
    if size > GRAPH_LIMIT:
        raise BadArtifact(str(path), f"size {size} bytes", f"more than the {GRAPH_LIMIT} a graph without weights can have")
    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except (DecodeError, ValueError, RecursionError) as error:
        raise BadArtifact(str(path), "content", "not an ONNX model") from error
    if model.functions:
        raise BadArtifact(
            str(path), "functions", f"`{model.functions[0].name[:80]}` is defined in the file; no functions are expected"
        )
    if model.training_info:
        raise BadArtifact(str(path), "training_info", "a graph that answers has none")
    for opset in model.opset_import:
        if opset.version not in DOMAINS.get(opset.domain, ()):
            raise BadArtifact(
                str(path), "opset_import", f"domain `{opset.domain[:80]}` version {opset.version} is not expected"
            )
    nodes = skips = 0
    for graph in _graphs(model.graph):
        for node in graph.node:
            nodes += 1
            skips += (node.domain, node.op_type) == ("modes", "SkipExperts")
            if node.domain not in DOMAINS or (node.domain and node.op_type not in OPERATORS[node.domain]):
                raise BadArtifact(
                    str(path), f"node `{node.name[:80]}`", f"operator `{node.domain[:40]}::{node.op_type[:40]}` is not expected"
                )
            if inner := next((a.name for a in node.attribute if a.HasField("g") or a.graphs), None):
                problem = f"operator `{node.op_type[:40]}` runs a graph of its own (`{inner[:40]}`): it may never end"
                raise BadArtifact(str(path), f"node `{node.name[:80]}`", problem)
    places = {(entry.file.name, str(entry.start), str(entry.length)): entry for entry in weights.values()}
    linked = sum(_check_tensor(path, tensor, places) for tensor in _tensors(model.graph))
    try:
        onnx.checker.check_model(str(path))
    except UnicodeDecodeError as error:  # what it says names something in the graph that is not UTF-8
        raise BadArtifact(str(path), "graph", "names that are not UTF-8") from error
    except onnx.checker.ValidationError as error:
        # It knows our operator only where the exporter has registered it; everything else it says counts.
        message = str(error).strip().splitlines()[0]
        if "modes" not in message:
            raise BadArtifact(str(path), "graph", message[:300]) from error
    return f"{nodes} nodes, {skips} of them SkipExperts, {linked} weights by reference"


def _graphs(graph: onnx.GraphProto, depth: int = 0) -> Iterator[onnx.GraphProto]:
    """A graph and those inside its nodes. protobuf refuses deeper nesting than this while parsing."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else ())):
                yield from _graphs(inner, depth + 1)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every tensor that a model file can hold, attributes included: they can be external as well."""
    for inner in _graphs(graph):
        yield from inner.initializer
        for sparse in inner.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        for attribute in (attribute for node in inner.node for attribute in node.attribute):
            yield from attribute.tensors
            if attribute.HasField("t"):
                yield attribute.t
            for sparse in (
                *attribute.sparse_tensors,
                *([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else ()),
            ):
                yield from (sparse.values, sparse.indices)


def _check_tensor(path: Path, tensor: onnx.TensorProto, places: Mapping[tuple[str, str, str], Entry]) -> int:
    """1 if a tensor is by reference and 0 if it is inline."""
    where = f"tensor `{tensor.name[:200]}`"
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        if tensor.ByteSize() > INLINE_LIMIT:
            problem = f"{tensor.ByteSize()} bytes inside the graph; weights belong into safetensors files"
            raise BadArtifact(str(path), where, problem)
        return 0
    fields = {entry.key: entry.value for entry in tensor.external_data}
    # Text that is not UTF-8 comes as bytes; of a key that is there twice, readers take different ones.
    if len(fields) != len(tensor.external_data) or not all(isinstance(text, str) for pair in fields.items() for text in pair):
        raise BadArtifact(str(path), where, "external_data names a key twice, or is not UTF-8")
    location, offset, length = fields.get("location", ""), fields.get("offset", "0"), fields.get("length", "")
    if Path(location).name != location or location in ("", ".", ".."):
        raise BadArtifact(str(path), where, f"location `{location[:200]}` is outside the bundle")
    entry = places.get((location, offset, length))
    if entry is None:
        problem = f"`{location[:80]}` offset {offset[:20]} length {length[:20]} is no tensor of the bundle"
        raise BadArtifact(str(path), where, problem)
    if tuple(tensor.dims) != entry.shape or tensor.data_type != _DTYPES[entry.dtype]:
        stored = f"those of `{entry.name[:200]}`: {entry.dtype} {list(entry.shape)}"
        problem = f"shape {list(tensor.dims)} and type {tensor.data_type} are not {stored}"
        raise BadArtifact(str(path), where, problem)
    return 1
