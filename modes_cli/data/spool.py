"""Samples from elsewhere, kept on disk while the process lives: downloaded once, read as often as needed."""

import hashlib
import json
import os
import tempfile
import weakref
from array import array
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from modes_cli.data.checked import Candidate
from modes_cli.data.rows import RawSample
from modes_cli.files import failing_clearly

Span = tuple[int, int]  # offset, bytes


class Spool:
    """A nameless temporary file (in $TMPDIR) of blobs and samples. Memory holds a few numbers per sample."""

    def __init__(self) -> None:
        """Raises WriteFailed when there is nowhere to write."""
        with failing_clearly(Path(tempfile.gettempdir())):
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - it lives as long as the spool
        weakref.finalize(self, self._file.close)
        self._end = 0
        self._spans = array("Q")
        self._known: dict[bytes, Span] = {}

    def put(self, data: bytes) -> Span:
        """Raises WriteFailed when the disk is full."""
        span = self._end, len(data)
        with failing_clearly(Path(tempfile.gettempdir())):
            view = memoryview(data)
            while view:
                view = view[os.pwrite(self._file.fileno(), view, self._end) :]
                self._end = span[0] + len(data) - len(view)
        return span

    def get(self, span: Span) -> bytes:
        offset, size = span
        pieces = []
        while size:
            piece = os.pread(self._file.fileno(), size, offset)
            if not piece:
                raise EOFError(f"the temporary file ends at {offset}")
            pieces.append(piece)
            offset, size = offset + len(piece), size - len(piece)
        return b"".join(pieces)

    def put_once(self, data: bytes) -> Span:
        """As `put`, but bytes that are there already are not written again: many questions share an image."""
        key = hashlib.sha256(data).digest()
        if key not in self._known:
            self._known[key] = self.put(data)
        return self._known[key]

    def add(self, raw: RawSample) -> None:
        """Keep one sample."""
        record = json.dumps([raw.id, [self.put_once(image) for image in raw.images], raw.question, raw.answer, raw.task])
        self._spans.extend(self.put(record.encode()))

    def candidates(self) -> Iterator[Candidate]:
        """The samples that were added, in that order."""
        for at in range(0, len(self._spans), 2):
            name, where, question, answer, task = json.loads(self.get((self._spans[at], self._spans[at + 1])))
            yield Candidate(name, partial(self._load, name, where, question, answer, task))

    def _load(self, name: str, where: list[Span], question: str, answer: str, task: str) -> RawSample:
        return RawSample(name, tuple(self.get((offset, size)) for offset, size in where), question, answer, task)
