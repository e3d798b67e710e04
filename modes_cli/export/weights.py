"""A checkpoint's weights, rewritten so that every runtime can use them in place.

Experts are stacked per layer in the layout the model has in memory, names are the model's own, and every tensor is
aligned. The format forbids holes, and padding tensors would make `from_pretrained` complain about unknown weights, so
alignment comes from order alone: data starts at a multiple of 4096, and the tensors of a shard are sorted by the largest
power of two that divides their size, largest first. Each then begins at a multiple of its own power (at most 4096).

Everything is streamed: a bundle of 60 GB is written in a few hundred megabytes of memory.
"""

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from modes_cli.artifacts.bundle import BundleFile
from modes_cli.errors import UnknownLayout
from modes_cli.export import sparse
from modes_cli.export.beside import Check
from modes_cli.export.sparse import Hole
from modes_cli.safetensors_header import ITEM_SIZE, Entry, chunks

PAGE = 4096
SHARD_BYTES = 4 << 30
INDEX = "model.safetensors.index.json"
_NARROW = {"BF16": torch.bfloat16, "F16": torch.float16}
_EXPERTS = re.compile(r"^(?P<experts>.+\.experts)\.(?P<part>gate_up_proj|down_proj)$")


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Segment:
    """A source tensor, one matrix of it (`rows` x `cols` at `offset` bytes, written transposed if `cols` > 0), or some of its
    rows: those that `order` numbers, in that order.
    """

    entry: Entry
    offset: int = 0
    rows: int = 0
    cols: int = 0
    order: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        if self.cols:
            return (self.cols, self.rows)
        return (len(self.order), *self.entry.shape[1:]) if self.order else self.entry.shape


@dataclass(frozen=True)
class Target:
    """A tensor of the bundle: the bytes of its segments, one after the other, or what is made of those."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    segments: tuple[Segment, ...]
    recoded: "Recoded | None" = None

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]


@dataclass(frozen=True)
class Recoded:
    """The bytes of a tensor as `recode` makes them of another one's (packing.py)."""

    source: Target
    recode: Callable[[Iterator["bytes | Hole"]], Iterator["bytes | Hole"]]


def plan(
    wanted: Mapping[str, tuple[int, ...]],
    source: Mapping[str, Entry],
    dtype: str,
    optional: frozenset[str] = frozenset(),
    parts: Mapping[str, Segment] | None = None,
) -> list[Target]:
    """How each tensor of the model is made from the checkpoint's.

    Args:
        wanted: shape of every tensor of the model in memory, by name.
        source: the checkpoint's tensors, under the names the model has in memory.
        dtype: float32, bfloat16 or float16: float32 matrices are narrowed to it; nothing is ever widened.
        optional: names that may be absent because they are tied to another tensor.
        parts: tensors that are rows of one of the checkpoint's.

    Raises:
        UnknownLayout: a tensor is absent, or has a shape that is neither the model's nor its transpose.
    """
    narrow = {"bfloat16": "BF16", "float16": "F16"}.get(dtype)
    targets = []
    for name, shape in wanted.items():
        part = (parts or {}).get(name)
        segments = _find(name, shape, source) if part is None or part.shape != shape else (part,)
        if segments is None:
            if name in optional:
                continue
            raise UnknownLayout(
                f"the checkpoint has no tensor `{name}` of shape {shape}", hint="this checkpoint's layout is not supported yet"
            )
        found = {segment.entry.dtype for segment in segments}
        if len(found) != 1 or not found <= {"F32", "F16", "BF16"}:
            raise UnknownLayout(
                f"the checkpoint stores `{name}` as {', '.join(sorted(found))}; float32, bfloat16 and float16 are supported"
            )
        stored = found.pop()
        # Vectors stay float32: they are small, and norms and router biases are where rounding hurts.
        kept = stored if stored != "F32" or narrow is None or len(shape) < 2 else narrow
        targets.append(Target(name, kept, shape, segments))
    return targets


def _find(name: str, shape: tuple[int, ...], source: Mapping[str, Entry]) -> tuple[Segment, ...] | None:
    entry = source.get(name)
    if entry is not None and entry.shape == shape:
        return (Segment(entry),)
    if entry is not None:
        experts, rows, cols = (*entry.shape, 0, 0, 0)[:3]
        if _EXPERTS.match(name) is None or len(entry.shape) != 3 or (experts, cols, rows) != shape:
            raise UnknownLayout(
                f"the checkpoint stores `{name}` as {entry.shape}, the model has {shape}",
                hint="this checkpoint's layout is not supported yet",
            )
        size = rows * cols * ITEM_SIZE[entry.dtype]
        return tuple(Segment(entry, expert * size, rows, cols) for expert in range(experts))
    match = _EXPERTS.match(name)
    return _one_by_one(match["experts"], match["part"], shape, source) if match else None


def _one_by_one(experts: str, part: str, shape: tuple[int, ...], source: Mapping[str, Entry]) -> tuple[Segment, ...] | None:
    """Checkpoints with `experts.N.gate_proj.weight` [I, H] and so on: rows of gate, then of up, then the next expert's."""
    parts = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
    names = [f"{experts}.{expert}.{p}.weight" for expert in range(shape[0]) for p in parts]
    if not all(n in source for n in names) or f"{experts}.{shape[0]}.{parts[0]}.weight" in source:
        return None
    each = (shape[1] // len(parts), shape[2])
    for n in names:
        if source[n].shape != each:
            raise UnknownLayout(
                f"the checkpoint stores `{n}` as {source[n].shape}; {each} was expected",
                hint="this checkpoint's layout is not supported yet",
            )
    return tuple(Segment(source[n]) for n in names)


def _bytes(target: Target) -> Iterator[bytes | Hole]:
    if target.recoded is not None:
        yield from target.recoded.recode(_bytes(target.recoded.source))
        return
    for segment in target.segments:
        for piece in _pieces(segment):
            if segment.entry.dtype == target.dtype:
                yield piece
            elif isinstance(piece, Hole):
                yield Hole(len(piece) // ITEM_SIZE[segment.entry.dtype] * ITEM_SIZE[target.dtype])
            else:
                yield _narrowed(piece, target.dtype)


def _pieces(segment: Segment) -> Iterator[bytes | Hole]:
    if segment.cols:
        return _transposed(segment)
    return _reordered(segment) if segment.order else sparse.pieces(segment.entry)


def stored_bytes(targets: list[Target]) -> int:
    """What the weights take on a disk: all their bytes but those that only holes go into."""
    return sum(target.bytes for target in targets if not all(sparse.is_hole(_range(segment)) for segment in target.segments))


def _range(segment: Segment) -> Entry:
    """The bytes that a segment is read from, as an entry of their own."""
    if not segment.cols:
        return segment.entry
    length = segment.rows * segment.cols * ITEM_SIZE[segment.entry.dtype]
    return replace(segment.entry, shape=(), start=segment.entry.start + segment.offset, length=length)


def _transposed(segment: Segment) -> Iterator[bytes | Hole]:
    one = _range(segment)
    if sparse.is_hole(one):
        yield Hole(one.length)
        return
    matrix = np.frombuffer(b"".join(chunks(one)), dtype=f"u{ITEM_SIZE[one.dtype]}").reshape(segment.rows, segment.cols)
    yield np.ascontiguousarray(matrix.T).tobytes()


def _reordered(segment: Segment) -> Iterator[bytes]:
    rows = np.frombuffer(b"".join(chunks(segment.entry)), dtype=np.uint8).reshape(segment.entry.shape[0], -1)
    yield rows[list(segment.order)].tobytes()


def _narrowed(piece: bytes, dtype: str) -> bytes:
    wide = torch.frombuffer(bytearray(piece), dtype=torch.float32)
    return wide.to(_NARROW[dtype]).view(torch.int16).numpy().tobytes()


def alignment(size: int) -> int:
    """The largest power of two, at most 4096, that divides a size."""
    return min(size & -size, PAGE) if size else PAGE


def shards(targets: list[Target], limit: int = SHARD_BYTES) -> list[list[Target]]:
    """Tensors grouped into files in the model's order, so that a layer stays together; aligned order within a file."""
    groups: list[list[Target]] = [[]]
    size = 0
    for target in targets:
        if groups[-1] and size + target.bytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(target)
        size += target.bytes
    return [sorted(group, key=lambda target: -alignment(target.bytes)) for group in groups]


def header_bytes(targets: list[Target], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON of a header, filled up with spaces so that data begins at a multiple of 4096."""
    tree: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for target in targets:
        tree[target.name] = {
            "dtype": target.dtype,
            "shape": list(target.shape),
            "data_offsets": [offset, offset + target.bytes],
        }
        offset += target.bytes
    text = json.dumps(tree, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    return struct.pack("<Q", len(text)) + text


def _files(targets: list[Target], limit: int) -> Iterator[tuple[str, bytes, list[Target]]]:
    """Name, header and tensors of each shard."""
    groups = shards(targets, limit)
    for number, group in enumerate(groups, 1):
        head = header_bytes(group, {"format": "pt"})  # transformers refuses files without this mark
        yield f"model-{number:05d}-of-{len(groups):05d}.safetensors", head, group


def places(folder: Path, targets: list[Target], limit: int = SHARD_BYTES) -> dict[str, Entry]:
    """Where `write_weights` puts each tensor: known before the first byte is written."""
    found = {}
    for name, head, group in _files(targets, limit):
        offset = len(head)
        for target in group:
            found[target.name] = Entry(folder / name, target.name, target.dtype, target.shape, offset, target.bytes)
            offset += target.bytes
    return found


def write_weights(
    folder: Path,
    targets: list[Target],
    advance: Check = _nothing,
    check: Check = _nothing,
    limit: int = SHARD_BYTES,
    kept: Mapping[str, BundleFile] | None = None,
    finished: Callable[[BundleFile], None] | None = None,
) -> list[BundleFile]:
    """Write all shards and their index into `folder`; digests are taken on the way.

    Args:
        advance: called after each tensor.
        check: called before each piece; what it raises ends the writing.
        kept: shards that are there already, by name.
        finished: called after each shard.

    Raises:
        BadArtifact: a source file became shorter while it was read.
        OSError: no space, no permission.
    """
    written: list[BundleFile] = []
    weight_map: dict[str, str] = {}
    for name, head, group in _files(targets, limit):
        weight_map |= {target.name: name for target in group}
        if kept is not None and name in kept:
            check()
            written.append(kept[name])
            for _ in group:
                advance()
            continue
        digest, size = hashlib.sha256(), 0
        with (folder / name).open("wb") as file:
            file.write(head)
            digest.update(head)
            size += len(head)
            for target in group:
                for piece in _bytes(target):
                    check()
                    if isinstance(piece, Hole):
                        file.seek(len(piece), os.SEEK_CUR)
                        for zeros in piece.views():
                            digest.update(zeros)
                    else:
                        file.write(piece)
                        digest.update(piece)
                    size += len(piece)
                advance()
            file.truncate(size)  # it may end with a hole
        written.append(BundleFile(path=name, bytes=size, sha256=digest.hexdigest()))
        if finished is not None:
            finished(written[-1])
    index = {
        "metadata": {"total_size": sum(target.bytes for target in targets)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    text = (json.dumps(index, indent=2) + "\n").encode()
    (folder / INDEX).write_bytes(text)
    written.append(BundleFile(path=INDEX, bytes=len(text), sha256=hashlib.sha256(text).hexdigest()))
    return written
