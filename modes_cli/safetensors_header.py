"""A strict reader of safetensors headers. It trusts nothing: a hostile file gives BadArtifact with its name and offset.

The format: 8 bytes header length (little-endian), that many bytes of JSON, then the tensors without holes or overlaps.
"""

import json
import math
import re
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from modes_cli.errors import BadArtifact

HEADER_LIMIT = 100 << 20  # bytes; what the safetensors library itself accepts
ITEM_SIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
MAX_RANK = 8
_HALF_A_CHARACTER = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Entry:
    """One tensor of a file. `start` is counted from the beginning of the file, in bytes."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    length: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself, checked against the file's size."""

    path: Path
    data_start: int
    metadata: dict[str, str]
    tensors: dict[str, Entry]


def read_header(path: Path) -> Header:
    """Read and check the header of one file; no tensor is read.

    Raises:
        BadArtifact: not a regular file, or anything that the format forbids.
    """
    try:
        status = path.lstat()
    except OSError as error:
        raise BadArtifact(str(path), "file", error.strerror or "cannot be read") from error
    if not stat.S_ISREG(status.st_mode):
        raise BadArtifact(str(path), "file", "not a regular file")
    return parse_header(path, status.st_size)


def parse_header(path: Path, size: int) -> Header:
    """As read_header, for a path that may be a link (a hub checkpoint's files are links into its cache)."""

    def refuse(where: str, problem: str) -> NoReturn:
        raise BadArtifact(str(path), where, problem)

    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            refuse("offset 0", f"`{size}` bytes are too short for a safetensors file")
        (length,) = struct.unpack("<Q", start)
        if length > HEADER_LIMIT or 8 + length > size:
            refuse("offset 0", f"header of `{length}` bytes in a file of {size}")
        raw = file.read(length)
    if len(raw) != length:
        refuse("offset 8", f"the header ends after `{len(raw)}` of {length} bytes")
    tree = _parse(path, raw)
    metadata = tree.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        refuse("`__metadata__`", "not an object of strings")
    data_start = 8 + length
    tensors = {name: _entry(path, name, value, data_start) for name, value in tree.items()}
    _check_places(path, tensors, data_start, size)
    return Header(path, data_start, metadata, tensors)


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            raise ValueError("a key occurs twice")
        return found

    def constant(name: str) -> NoReturn:
        raise ValueError(f"`{name}` is not JSON")

    if not raw.startswith(b"{"):
        raise BadArtifact(str(path), "offset 8", "the header does not begin with `{`")
    try:
        tree = json.loads(raw.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
    except UnicodeDecodeError as error:
        raise BadArtifact(str(path), f"offset {8 + error.start}", "the header is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise BadArtifact(str(path), f"offset {8 + error.pos}", f"the header is not JSON: {error.msg}") from error
    except RecursionError as error:
        raise BadArtifact(str(path), "offset 8", "the header is nested too deeply") from error
    except ValueError as error:
        raise BadArtifact(str(path), "offset 8", f"the header is not valid: {error}") from error
    if b"\\u" in raw and _HALF_A_CHARACTER.search(json.dumps(tree, ensure_ascii=False)):
        raise BadArtifact(str(path), "offset 8", "the header has half a character, which the safetensors library refuses")
    return dict(tree)


def _natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _entry(path: Path, name: str, value: Any, data_start: int) -> Entry:
    def refuse(problem: str) -> NoReturn:
        raise BadArtifact(str(path), f"tensor `{name[:200]}`", problem)

    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        refuse("needs dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE:
        refuse(f"unknown dtype `{str(dtype)[:40]}`")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(_natural(n) for n in shape):
        refuse(f"shape `{str(shape)[:80]}` is no list of at most {MAX_RANK} sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_natural(n) for n in offsets):
        refuse(f"data_offsets `{str(offsets)[:80]}` are no two offsets")
    begin, end = offsets
    expected = math.prod(shape) * ITEM_SIZE[dtype]
    if end - begin != expected:
        refuse(f"data_offsets [{begin}, {end}] hold {end - begin} bytes; {dtype} {shape} needs {expected}")
    return Entry(path, name, dtype, tuple(shape), data_start + begin, expected)


def _check_places(path: Path, tensors: dict[str, Entry], data_start: int, size: int) -> None:
    """Tensors must follow each other without holes or overlaps and end where the file ends."""
    for entry in tensors.values():
        end = entry.start + entry.length
        if end > size:
            problem = f"ends at offset {end}, past the end of the file at {size}"
            raise BadArtifact(str(path), f"tensor `{entry.name[:200]}`", problem)
    expected = data_start
    for entry in sorted(tensors.values(), key=lambda entry: (entry.start, entry.length)):
        if entry.start != expected:
            problem = "overlaps the tensor before it" if entry.start < expected else "leaves a hole before it"
            raise BadArtifact(
                str(path),
                f"tensor `{entry.name[:200]}`",
                f"begins at offset {entry.start}, which {problem} (expected {expected})",
            )
        expected = entry.start + entry.length
    if expected != size:
        raise BadArtifact(str(path), f"offset {expected}", f"{size - expected} bytes that belong to no tensor")


def merged(headers: list[Header]) -> dict[str, Entry]:
    """All tensors of several files by name.

    Raises:
        BadArtifact: two files hold a tensor of the same name.
    """
    found: dict[str, Entry] = {}
    for name, entry in ((name, entry) for header in headers for name, entry in header.tensors.items()):
        if name in found:
            raise BadArtifact(str(entry.file), f"tensor `{name[:200]}`", f"is also in `{found[name].file.name}`")
        found[name] = entry
    return found


def chunks(entry: Entry, size: int = 16 << 20) -> Iterator[bytes]:
    """The bytes of a tensor, in pieces; plain reads, so that nothing stays mapped."""
    with entry.file.open("rb") as file:
        file.seek(entry.start)
        left = entry.length
        while left:
            piece = file.read(min(left, size))
            if not piece:
                raise BadArtifact(str(entry.file), f"tensor `{entry.name}`", "the file became shorter while it was read")
            left -= len(piece)
            yield piece
