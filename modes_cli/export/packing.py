"""Quantised expert weights in a bundle: what is written, what the graph sees of them, and what a reader checks.

Beside each stack of expert weights `NAME` lies `NAME_scales`. Whatever the checkpoint's layout, rows lie along the input
dimension: [E, 2I, H] and [E, H, I], filled up as `Scheme.stored` says.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from modes_cli.artifacts.bundle import Bundle
from modes_cli.errors import BadArtifact, BadModel, UnknownLayout
from modes_cli.export.sparse import Hole
from modes_cli.export.weights import Recoded, Target
from modes_cli.models.blocks import MoEBlock
from modes_cli.models.quantization import BLOCK, SUFFIX, WEIGHTS, Scheme, blocks_of, quantise
from modes_cli.safetensors_header import Entry, chunks

_CODES = {"int8": "I8", "int4": "U8"}  # the stored dtype, as safetensors names it
_READ = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
Pieces = Iterator["bytes | Hole"]


def packed(targets: list[Target], blocks: list[MoEBlock], scheme: Scheme) -> list[Target]:
    """The bundle's tensors with the experts' weights quantised, each followed by its scales."""
    transposed = {f"{one.name}.{name}": one.transposed for block in blocks for one in block.sets for name in WEIGHTS}
    if absent := sorted(transposed.keys() - {target.name for target in targets}):
        raise UnknownLayout(f"expert weights `{absent[0]}` are tied to another tensor, and cannot be quantised")
    found = []
    for target in targets:
        found += _pair(target, scheme, transposed[target.name]) if target.name in transposed else [target]
    return found


def _pair(target: Target, scheme: Scheme, transposed: bool) -> list[Target]:
    experts, rows, depth = target.shape
    if transposed:
        rows, depth = depth, rows
    shapes = ((target.name, _CODES[scheme.name], scheme.stored(depth)), (target.name + SUFFIX, "F16", blocks_of(depth)))
    recode = partial(_recoded, target, scheme, transposed)
    return [
        Target(name, dtype, (experts, rows, width), target.segments, Recoded(target, partial(recode, part)))
        for part, (name, dtype, width) in enumerate(shapes)
    ]


def _recoded(source: Target, scheme: Scheme, transposed: bool, part: int, pieces: Pieces) -> Pieces:
    """One expert after another: its stored numbers (part 0) or its scales (part 1). What is only a hole stays one."""
    for number, matrix in enumerate(_matrices(pieces, source.bytes // source.shape[0])):
        hole = isinstance(matrix, Hole)
        weights = torch.zeros(source.shape[1:]) if hole else torch.frombuffer(matrix, dtype=_READ[source.dtype])
        weights = weights.reshape(source.shape[1:])
        try:
            found = quantise(weights.T if transposed else weights, scheme)[part].contiguous()
        except ValueError as error:
            raise BadModel(f"expert `{number}` of `{source.name}` cannot be quantised: {error}") from error
        yield Hole(found.nbytes) if hole else found.view(torch.uint8).numpy().tobytes()


def _matrices(pieces: Pieces, size: int) -> Iterator["bytearray | Hole"]:
    """The same bytes, `size` at a time."""
    held, hollow = bytearray(), True
    for piece in pieces:
        place = 0
        while place < len(piece):
            taken = min(len(piece) - place, size - len(held))
            held += bytes(taken) if isinstance(piece, Hole) else piece[place : place + taken]
            hollow, place = hollow and isinstance(piece, Hole), place + taken
            if len(held) == size:
                yield Hole(size) if hollow else held
                held, hollow = bytearray(), True


def pack_shapes(block: MoEBlock, mode: FakeTensorMode, scheme: Scheme) -> MoEBlock:
    """Give a fake block the shapes and dtypes of what is stored, so that its graph has them."""
    sets = []
    for one in block.sets:
        experts: Any = one.experts
        depths = (one.hidden_size, one.intermediate_size)
        rows = (2 * one.intermediate_size, one.hidden_size)
        with mode:
            for name, count, depth in zip(WEIGHTS, rows, depths, strict=True):
                stored = torch.empty(one.num_experts, count, scheme.stored(depth), dtype=scheme.dtype)
                setattr(experts, name, nn.Parameter(stored, requires_grad=False))
                scales = torch.empty(one.num_experts, count, blocks_of(depth), dtype=torch.float16)
                experts.register_buffer(name + SUFFIX, scales)
        sets.append(replace(one, transposed=False))
    return replace(sets[0], further=tuple(sets[1:]))


def scales_of(experts: Any) -> tuple[Tensor | None, Tensor | None, int]:
    """The last arguments of the operator for a block of a traced model: scales of both weights, and their block."""
    gate_up, down = (getattr(experts, name + SUFFIX, None) for name in WEIGHTS)
    return gate_up, down, 0 if gate_up is None else BLOCK


def check_packed(tensors: Mapping[str, Entry], bundle: Bundle, folder: Path) -> set[str]:
    """The names of a bundle's quantised tensors.

    Raises:
        BadArtifact: it should have none, or has none; or scales are missing, or do not fit.
    """
    if bundle.quantization is None:
        return set()
    code, block = _CODES[bundle.quantization.scheme], bundle.quantization.block
    each = 1 if bundle.quantization.scheme == "int8" else 2  # weights of a byte
    if block != BLOCK:
        raise BadArtifact(str(folder / "bundle.json"), "field `quantization.block`", f"is `{block}`, known is {BLOCK}")
    found = {name for name in tensors if name.endswith(WEIGHTS) and name + SUFFIX in tensors}
    if not found:
        raise BadArtifact(str(folder / "bundle.json"), "field `quantization`", "no weights of the bundle have scales")
    for name in sorted(found):
        entry, scales = tensors[name], tensors[name + SUFFIX]
        where = f"tensor `{name[:200]}`"
        if entry.dtype != code or len(entry.shape) != 3:
            raise BadArtifact(
                str(entry.file), where, f"is {entry.dtype} {list(entry.shape)}, expected {code} and three dimensions"
            )
        expected = (*entry.shape[:2], entry.shape[2] * each // block)
        if scales.dtype != "F16" or scales.shape != expected:
            raise BadArtifact(
                str(entry.file), where, f"has scales {scales.dtype} {list(scales.shape)}, expected F16 {list(expected)}"
            )
    return found


def check_scales(tensors: Mapping[str, Entry]) -> None:
    """Raises BadArtifact for a scale that is negative, infinite or NaN. Reads them all."""
    for name, entry in tensors.items():
        if not name.endswith(SUFFIX) or name.removesuffix(SUFFIX) not in tensors:
            continue
        place = entry.start
        for piece in chunks(entry):
            values = np.frombuffer(piece, dtype=np.float16)
            wrong = ~(np.isfinite(values) & ~np.signbit(values))
            if wrong.any():
                at = place + int(wrong.argmax()) * 2
                raise BadArtifact(str(entry.file), f"tensor `{name[:200]}`", f"a scale is `{values[wrong][0]}` at offset {at}")
            place += len(piece)
