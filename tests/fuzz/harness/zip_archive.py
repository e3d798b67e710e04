"""Zip archives of a data set: the list of members, and every member."""

import io
import zipfile

from fsspec.implementations.local import LocalFileSystem

from modes_cli.data.archives import Archives
from modes_cli.data.images import Unusable
from modes_cli.errors import BadData
from tests.fuzz.mutate import any_bytes as mutate
from tests.fuzz.places import scratch

__all__ = ["mutate", "one", "seeds"]


def seeds() -> list[bytes]:
    found = []
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", method) as archive:
            archive.writestr("videos/one.mp4", b"abcd" * 64)
            archive.writestr("two.mp4", bytes(range(256)))
        found.append(buffer.getvalue())
    return found


def one(data: bytes) -> None:
    path = scratch("zip") / "part.zip"
    path.write_bytes(data)
    archives = Archives(LocalFileSystem(), str(path.parent), ".mp4")
    refused = None
    for name in list(archives._members):
        try:
            with archives.open(name) as file:
                file.read(16)
        except Unusable as error:  # of one sample; whoever catches it names the sample
            refused = error
    if refused is not None:
        raise BadData(str(refused))
