"""A bundle's model exported with ONNX Runtime's own operators, in a temporary folder: what skipping is measured against."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from modes_cli import files
from modes_cli.benchmark.stock_graph import HINT, StockGraph, stock_graph
from modes_cli.data.sample import Sample
from modes_cli.errors import KernelError, UnknownLayout, WriteFailed, first_line
from modes_cli.runtime.ort_model import OrtModel
from modes_cli.runtime.providers import CPU
from modes_cli.runtime.session import DECODER, quiet_options

WEIGHTS = "weights.bin"
TOLERANCE = 1e-3  # of the largest logit
STEPS = 4  # of decoding, while the two are compared
_ALIGNED, _PIECE, _SLACK = 4096, 16 << 20, 16 << 20  # bytes


@dataclass(frozen=True)
class Stock:
    """Attributes:
    model: the bundle's vision and embedding graphs, with the stock decoder between them.
    notes: what was changed for the stock operator.
    """

    model: OrtModel
    notes: list[str]


@contextlib.contextmanager
def stock_export(bundle: OrtModel, threads: int) -> Iterator[Stock]:
    """The same model with com.microsoft.MoE; its files live as long as the block.

    Args:
        bundle: checked and open; its sessions of vision and embedding are shared.
        threads: as many as the bundle's own sessions have.

    Raises:
        UnknownLayout: the stock operator cannot express the bundle's experts.
        WriteFailed: not enough space for the temporary folder (`TMPDIR` says where it is).
        KernelError: this ONNX Runtime has no such operator.
    """
    graph = stock_graph(ir.load(bundle.folder / DECODER), bundle.bundle.top_k)
    with tempfile.TemporaryDirectory(prefix="modes-stock-") as name:
        folder = Path(name)
        _require_space(folder, graph)
        with files.failing_clearly(folder):
            with (folder / WEIGHTS).open("wb") as file:
                _store_weights(file, graph, folder)
            (folder / DECODER).write_bytes(ir.to_proto(graph.model).SerializeToString(deterministic=True))
        try:
            session = ort.InferenceSession(str(folder / DECODER), quiet_options(threads), providers=[CPU])
        except Exception as error:  # ONNX Runtime's classes are not public and have no common base
            raise KernelError(
                f"ONNX Runtime refuses the decoder with stock operators: {first_line(error)}", hint=HINT
            ) from error
        yield Stock(bundle.with_decoder(session), _notes(graph))


def require_equal(bundle: OrtModel, stock: OrtModel, samples: list[Sample]) -> float:
    """The largest difference between the logits of both with nothing skipped, relative to the largest logit.

    Compared are the logits after a batch of prompts and those of some steps, both fed with the bundle's tokens.

    Raises:
        UnknownLayout: they compute something else; nothing should be measured.
    """
    prompts = bundle.prompts([sample.images for sample in samples], [sample.question for sample in samples])
    nothing = bundle.tau({})
    states = bundle.prefilled(prompts, nothing), stock.prefilled(prompts, nothing)
    running = np.ones_like(states[0].deltas)
    worst = 0.0
    for step in range(STEPS + 1):
        if step:
            ids = states[0].logits[:, -1].argmax(-1).astype(np.int64)[:, None]
            for model, state in zip((bundle, stock), states, strict=True):
                model.next_token(state, ids, running, nothing)
        ours, theirs = (state.logits[:, -1] for state in states)
        difference = float(np.abs(ours - theirs).max() / np.abs(ours).max())
        if not difference <= TOLERANCE:  # NaN compares false
            raise UnknownLayout(
                f"with stock operators the logits differ by `{difference:.2g}` of the largest one, more than {TOLERANCE:g}: "
                f"`{bundle.bundle.family}` does not route or compute as com.microsoft.MoE does",
                hint=HINT,
            )
        worst = max(worst, difference)
    return worst


def _notes(graph: StockGraph) -> list[str]:
    notes = []
    if "weights" in graph.routing:
        layers = graph.routing.count("weights")
        notes.append(
            f"stock operators: the routing of {layers} of {len(graph.routing)} layers is no softmax with top-k; the family's "
            "own nodes stay, and com.microsoft.MoE gets the logarithms of their weights"
        )
    return notes


def _require_space(folder: Path, graph: StockGraph) -> None:
    kept = sum(tensor.nbytes + _ALIGNED for _, tensor in _external(graph.model))
    needed = kept + sum(4 * int(np.prod(part.shape)) + _ALIGNED for part in graph.rewritten.values()) + _SLACK
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise WriteFailed(
            f"the model with stock operators needs `{needed}` bytes in `{folder.parent}`, `{free}` are free",
            hint=f"name a folder with more space in `TMPDIR`; {HINT}",
        )


def _external(model: ir.Model) -> list[tuple[ir.Value, Any]]:
    found = []
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            found.append((value, value.const_value))
    return found


def _store_weights(file: IO[bytes], graph: StockGraph, folder: Path) -> None:
    """All weights in one file; nothing larger than one expert is ever in memory."""
    for value, tensor in _external(graph.model):
        start = _aligned(file)
        with Path(tensor.path).open("rb") as source:
            source.seek(tensor.offset or 0)
            left = tensor.nbytes
            while left:
                piece = source.read(min(left, _PIECE))
                if not piece:
                    raise WriteFailed(f"`{tensor.path}` became shorter while it was read")
                left -= len(piece)
                file.write(piece)
        _link(value, start, tensor.nbytes, tensor.dtype, tuple(int(size) for size in tensor.shape), folder)
    for name, part in graph.rewritten.items():
        start = _aligned(file)
        for expert in range(part.shape[0]):
            file.write(part.load(expert).tobytes())
        value = graph.model.graph.initializers[name]
        _link(value, start, file.tell() - start, ir.DataType.FLOAT, part.shape, folder)


def _aligned(file: IO[bytes]) -> int:
    file.write(bytes(-file.tell() % _ALIGNED))
    return file.tell()


def _link(value: ir.Value, start: int, length: int, dtype: ir.DataType, shape: tuple[int, ...], folder: Path) -> None:
    assert value.name is not None
    value.const_value = ir.ExternalTensor(
        WEIGHTS, start, length, dtype, shape=ir.Shape(shape), name=value.name, base_dir=folder
    )
