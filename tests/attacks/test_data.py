"""Data sets that are small on disk and large in memory, or that reach for files elsewhere."""

import io
import json
import os
import resource
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from modes_cli.data import open_source, rows, tables
from modes_cli.data.archives import Archives
from modes_cli.data.images import Unusable, decode_image
from modes_cli.data.sample import DataSpec
from modes_cli.errors import BadData


def png(width: int, height: int, data: bytes = b"", more: bytes = b"") -> bytes:
    """A PNG file of any size, whatever its pixels are. `more`: chunks before them."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + more + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def text_chunk(size: int) -> bytes:
    """A zTXt chunk of zeros that unfolds to `size` bytes."""
    body = b"Comment\0\0" + zlib.compress(bytes(size), 9)
    return struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))


def small() -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()


def refused(path: Path, word: str) -> None:
    with pytest.raises(BadData, match=word):
        open_source(DataSpec(str(path), None, None, 0), text_only=False)


# -- images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (png(65_000, 65_000), "too large"),
        (png((1 << 31) - 1, (1 << 31) - 1), "too large|cannot be decoded|is not an image"),
        (png(0, 0), "cannot be decoded|is not an image"),
        (png(8, 8, more=text_chunk(256 << 20)), "cannot be decoded"),
        (
            b"BM" + struct.pack("<IIIIiiHHI", 100, 0, 54, 40, 1 << 30, 1 << 30, 1, 24, 0) + bytes(20),
            "too large|cannot be decoded",
        ),
        (b"P6 99999999 99999999 255\n", "too large"),
        (b"P6 " + b"9" * 5000 + b" 1 255\n", "cannot be decoded|is not an image"),
        (
            b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b"\x2c" + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0),
            "too large|is not an image",
        ),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n(/etc/passwd) (r) file\n", "is not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>", "is not an image"),
    ],
    ids=["png", "png of 2^62", "empty png", "text in a png", "bmp", "ppm", "ppm of 5,000 digits", "gif", "postscript", "svg"],
)
def test_image_bombs(data: bytes, word: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Unusable, match=word):
        decode_image(data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB


def test_many_images_in_one_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is allowed; together they would fill the memory."""
    monkeypatch.setattr(rows, "MAX_PIXELS", 200)
    with pytest.raises(Unusable, match="the first 4 of 9 images have 256 pixels, the limit is 200"):
        rows.RawSample("a", (small(),) * 9, "q", "a", "t").decode()
    assert len(rows.RawSample("a", (small(),) * 3, "q", "a", "t").decode().images) == 3


# -- tables ---------------------------------------------------------------------------------------------------------

BOMB = """
import re, sys
from pathlib import Path
from modes_cli.data.tables import Parquet
table = Parquet(Path(sys.argv[1]))
kinds = [type(row).__name__ for _, row in table.rows(range(3), table.columns())]
print(kinds[0], re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])  # of this process alone
"""


def repeated(value: pa.Array, count: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), value)


def test_a_parquet_value_that_stands_in_every_row(tmp_path: Path) -> None:
    """2 KB on disk. Each of 64 rows has the same 40 MB, which are in memory once, not 16 times."""
    path = tmp_path / "bomb.parquet"
    big = repeated(pa.array([bytes(40 << 20)], pa.binary()), 64)
    pq.write_table(
        pa.table({"image": big, "question": ["q"] * 64, "answer": ["a"] * 64}), path, compression="zstd", store_schema=False
    )
    assert path.stat().st_size < 4096
    ended = subprocess.run([sys.executable, "-c", BOMB, str(path)], capture_output=True, text=True, check=True)
    kind, peak = ended.stdout.split()
    assert kind == "dict"
    assert int(peak) < 600 << 10  # KiB; 16 rows unfolded are 640 MB more than what is imported


def test_a_parquet_row_that_unfolds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row that lists the same image many times, as a list of structs."""
    path = tmp_path / "bomb.parquet"
    row = [{"bytes": bytes(1 << 20), "path": None}] * 200
    pq.write_table(pa.table({"images": [row], "question": ["q"], "answer": ["a"]}), path, compression="zstd")
    monkeypatch.setattr(tables, "MAX_ROW_BYTES", 100 << 20)
    refused(path, "the row has 2097[0-9]* bytes, the limit is 104857600")


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ('{"image": "../../etc/passwd", "question": "q", "answer": "a"}', "leads out of the data folder"),
        ('{"image": "/etc/passwd", "question": "q", "answer": "a"}', "absolute"),
        ('{"image": "link/passwd", "question": "q", "answer": "a"}', "leads out of the data folder"),
        ('{"image": "C:\\\\\\\\passwd", "question": "q", "answer": "a"}', "absolute"),
        ('{"image": "file:///etc/passwd", "question": "q", "answer": "a"}', "does not exist"),
        ('{"image": "pipe", "question": "q", "answer": "a"}', "not a regular file"),
        ('{"image": "a\\u0000b", "question": "q", "answer": "a"}', "not a usable path"),
        ('{"image": ' + "[" * 100_000 + "]" * 100_000 + "}", "not JSON"),
        ('{"image": ' + "9" * 5000 + ', "question": "q", "answer": "a"}', "not JSON"),
        ('{"image": "a.png", "question": {"$ref": "file:///etc/passwd"}, "answer": "a"}', "not text"),
    ],
    ids=["parent", "absolute", "link", "windows", "url", "pipe", "null", "deep", "number", "object"],
)
def test_lines_of_a_table(tmp_path: Path, line: str, word: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.png").write_bytes(small())
    (data / "link").symlink_to("/etc")
    os.mkfifo(data / "pipe")
    good = json.dumps({"image": "a.png", "question": "q", "answer": "a"})
    (data / "table.jsonl").write_text(f"{good}\n{line}\n")
    refused(data / "table.jsonl", word)


# -- archives -------------------------------------------------------------------------------------------------------


def packed(folder: Path, name: str, data: bytes) -> Path:
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    return folder / "a.zip"


def opened(folder: Path, name: str) -> Any:
    with Archives(LocalFileSystem(), str(folder), ".mp4").open(name) as file:
        return file.read()


def sized(path: Path, size: int) -> None:
    """Let the list of members say another size."""
    raw = bytearray(path.read_bytes())
    at = raw.index(b"PK\x01\x02")
    raw[at + 24 : at + 28] = struct.pack("<I", size)
    path.write_bytes(raw)


ZIPS: dict[str, tuple[Callable[[Path], object], str]] = {
    "zeros": (lambda path: None, "unfolds from"),
    "more than it says": (lambda path: sized(path, 4096), "damaged"),
    "less than it says": (lambda path: sized(path, 33 << 20), "unfolds from"),
    "4 GB": (lambda path: sized(path, (1 << 32) - 2), "the limit is"),
}


@pytest.mark.parametrize("kind", ZIPS)
def test_zip_bombs(tmp_path: Path, kind: str) -> None:
    damage, word = ZIPS[kind]
    damage(packed(tmp_path, "a.mp4", bytes(32 << 20)))
    with pytest.raises(Unusable, match=word):
        opened(tmp_path, "a.mp4")


def test_a_member_with_a_path(tmp_path: Path) -> None:
    """Its last part is a name to find it by; nothing is ever written there."""
    packed(tmp_path, "../../../../tmp/out.mp4", b"film")
    assert opened(tmp_path, "out.mp4") == b"film"
    with pytest.raises(Unusable, match="in none of the archives"):
        opened(tmp_path, "../../../../tmp/out.mp4")
