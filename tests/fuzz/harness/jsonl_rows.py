""".jsonl data with images: lines, columns, fields, paths."""

import io
import json

from PIL import Image

from modes_cli.data.local import open_samples
from modes_cli.data.sample import DataSpec
from tests.fuzz.mutate import as_json_lines as mutate
from tests.fuzz.places import scratch

__all__ = ["mutate", "one", "seeds"]


def seeds() -> list[bytes]:
    rows = [{"image": "0.png", "question": "How many?", "answer": "3", "id": 7, "task": "count"},
            {"image": ["0.png", "0.png"], "question": "Which?", "answer": ["a", "b"]}]  # fmt: skip
    lines = [json.dumps(row).encode() for row in rows]
    return [lines[0], lines[1], b"\n".join(lines) + b"\n"]


def one(data: bytes) -> None:
    folder = scratch("jsonl")
    if not (folder / "0.png").exists():
        buffer = io.BytesIO()
        Image.new("RGB", (3, 2), "red").save(buffer, "PNG")
        (folder / "0.png").write_bytes(buffer.getvalue())
    path = folder / "data.jsonl"
    path.write_bytes(data)
    for sample in open_samples(DataSpec(str(path), None, None), text_only=False):
        assert sample.images, "a sample without its image"
        assert sample.question.strip(), "a sample without its question"
