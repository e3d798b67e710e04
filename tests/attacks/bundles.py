"""What attacks on a bundle share: that it is refused by loading and by verify, in the same words."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modes_cli.errors import BadArtifact
from modes_cli.export.integrity import check_for_loading
from modes_cli.export.verify import verify_bundle
from modes_cli.requests import ModelSpec
from modes_cli.runtime.ort_model import OrtModel
from modes_cli.runtime.session import session
from modes_cli.runtime.torch_model import open_model

SHARD = "model-00001-of-00001.safetensors"
THRESHOLDS = "thresholds.safetensors"
NORM = "model.language_model.norm.weight"  # the name of a tensor in the shard


def assert_refused(bundle: Path, *words: str, ways: tuple[Callable[[Path], object], ...] = ()) -> None:
    """By every way to load it and by verify, in the same words."""
    for load in ways or (check_for_loading, session, OrtModel, in_pytorch):
        with pytest.raises(BadArtifact) as caught:
            load(bundle)
        assert all(word in str(caught.value) for word in words), str(caught.value)
    assert_verify_fails(bundle, *words)


def in_pytorch(bundle: Path) -> object:
    """As `modes.load` and `modes generate --runtime torch`."""
    return open_model(ModelSpec(str(bundle), device="cpu"), None)


def assert_verify_fails(bundle: Path, *words: str) -> None:
    failed = [check for check in verify_bundle(bundle) if not check.ok]
    assert failed
    assert any(all(word in check.detail for word in words) for check in failed), failed
    assert not any(check.name == "session" for check in failed)  # it was never tried


def write_header(path: Path, header: Any, *, length: int | None = None, data: bytes | None = None) -> None:
    raw = path.read_bytes()
    old = struct.unpack("<Q", raw[:8])[0]
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(
        struct.pack("<Q", len(text) if length is None else length) + text + (raw[8 + old :] if data is None else data)
    )


def header_of(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    tree: dict[str, Any] = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    return tree


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tree = json.loads((bundle / "bundle.json").read_text())
    change(tree)
    (bundle / "bundle.json").write_text(json.dumps(tree))
