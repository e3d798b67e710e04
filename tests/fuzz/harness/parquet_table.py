""".parquet data with images."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from modes_cli.data.local import open_samples
from modes_cli.data.sample import DataSpec
from tests.fuzz.mutate import any_bytes as mutate
from tests.fuzz.places import scratch

__all__ = ["mutate", "one", "seeds"]


def seeds() -> list[bytes]:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), "red").save(buffer, "PNG")
    rows = [{"image": {"bytes": buffer.getvalue(), "path": None}, "question": "How many?", "answer": "3"}] * 2
    found = []
    for compression in ("none", "snappy"):
        out = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), out, compression=compression)
        found.append(out.getvalue())
    return found


def one(data: bytes) -> None:
    path = scratch("parquet") / "data.parquet"
    path.write_bytes(data)
    for samples in (None, 1):  # all that the footer claims, and one drawn from them
        for sample in open_samples(DataSpec(str(path), None, samples), text_only=False):
            assert sample.images, "a sample without its image"
