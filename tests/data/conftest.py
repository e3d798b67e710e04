"""Small images and data folders to read back."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

Write = Callable[..., Path]


def encode(color: str | tuple[int, int, int] = "red", size: tuple[int, int] = (5, 4), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, kind)
    return file.getvalue()


@pytest.fixture(autouse=True)
def _datasets(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing goes into the user's cache, and no waiting: `datasets` sleeps five seconds after a shuffled stream, to spare
    old versions of Arrow a crash."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture
def png() -> Callable[..., bytes]:
    """`png(color, size, kind)`: the bytes of a plain image."""
    return encode


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(rows)`: a data.jsonl beside the images 0.png .. 9.png, each of another red."""
    for number in range(10):
        (tmp_path / f"{number}.png").write_bytes(encode((20 * number, 0, 0)))

    def jsonl(rows: list[dict[str, Any]], name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return jsonl
