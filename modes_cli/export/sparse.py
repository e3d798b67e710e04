"""Holes: ranges of a file that were never written and read as zeros. A checkpoint's holes become the bundle's.

Such checkpoints have a model's every shape and take no space, so that what depends on shapes alone can be tried at full size.
"""

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from modes_cli.errors import BadArtifact
from modes_cli.safetensors_header import ITEM_SIZE, Entry

PIECE = 16 << 20
LEAST = 1 << 16  # bytes; a shorter hole is not worth leaving the reading for
_ZEROS = memoryview(bytes(4 << 20))


@dataclass(frozen=True)
class Hole:
    """So many zeros that are in no file."""

    bytes: int

    def __len__(self) -> int:
        return self.bytes

    def views(self) -> Iterator[memoryview]:
        """The zeros, piece by piece."""
        left = self.bytes
        while left:
            view = _ZEROS[: min(left, len(_ZEROS))]
            left -= len(view)
            yield view


def pieces(entry: Entry, size: int = PIECE) -> Iterator[bytes | Hole]:
    """The bytes of a tensor, in pieces of whole items; plain reads, so that nothing stays mapped.

    Raises:
        BadArtifact: the file became shorter.
    """
    with entry.file.open("rb", buffering=0) as file:
        place, end = entry.start, entry.start + entry.length
        while place < end:
            hole = _hole(file, place, end, entry)
            hole -= hole % ITEM_SIZE[entry.dtype]
            if hole:
                yield Hole(hole)
                place += hole
                continue
            file.seek(place)
            piece = _read(file, min(end - place, size), entry)
            yield piece
            place += len(piece)


def is_hole(entry: Entry) -> bool:
    """Whether not one byte of a tensor was ever written."""
    with entry.file.open("rb", buffering=0) as file:
        return entry.length > 0 and _hole(file, entry.start, entry.start + entry.length, entry) == entry.length


def _hole(file: BinaryIO, place: int, end: int, entry: Entry) -> int:
    """How many bytes from `place` on, up to `end`, are a hole; 0 where the file system does not say."""
    status = os.fstat(file.fileno())
    if status.st_size < end:
        raise _shorter(entry)
    if status.st_blocks * 512 >= status.st_size or not hasattr(os, "SEEK_DATA"):
        return 0
    try:
        data = os.lseek(file.fileno(), place, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:  # that one: nothing but a hole up to the end of the file
            return 0
        data = status.st_size
    hole = min(data, end) - place
    return hole if hole >= LEAST or place + hole == end else 0


def _read(file: BinaryIO, length: int, entry: Entry) -> bytes:
    parts = []
    while length:
        part = file.read(length)
        if not part:
            raise _shorter(entry)
        parts.append(part)
        length -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _shorter(entry: Entry) -> BadArtifact:
    return BadArtifact(str(entry.file), f"tensor `{entry.name}`", "the file became shorter while it was read")
