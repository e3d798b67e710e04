"""A folder that changes while it is checked or loaded: what was digested must be what was used."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modes_cli.errors import BadArtifact
from modes_cli.export import integrity
from modes_cli.export.verify import verify_bundle
from modes_cli.runtime import ort_model, session, torch_model
from tests.attacks.bundles import in_pytorch


def swapped_and_back(path: Path) -> None:
    """Other bytes for a moment, then the right ones again with the time that the file had: only its ctime tells."""
    kept, status = path.read_bytes(), path.stat()
    path.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    path.write_bytes(kept)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], object]] = {
    "altered and restored": lambda bundle: swapped_and_back(bundle / "decoder.onnx"),
    "replaced by a copy": lambda bundle: os.replace(_copy(bundle / "decoder.onnx"), bundle / "decoder.onnx"),
    "a file more": lambda bundle: (bundle / "adapter_config.json").write_text("{}"),
    "a file there and gone": lambda bundle: _there_and_gone(bundle / "adapter_config.json"),
    "a link in its place": lambda bundle: _linked(bundle / "tokenizer.json"),
}


def _copy(path: Path) -> Path:
    copy = path.parent.parent / "copy"
    copy.write_bytes(path.read_bytes())
    return copy


def _there_and_gone(path: Path) -> None:
    path.write_text("{}")
    path.unlink()


def _linked(path: Path) -> None:
    elsewhere = path.rename(path.parent.parent / path.name)
    path.symlink_to(elsewhere)


def after(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, change: Callable[[], object]) -> None:
    """Let somebody change something as soon as a function has returned for the first time."""
    original, pending = getattr(module, name), [change]

    def both(*arguments: Any, **more: Any) -> Any:
        result = original(*arguments, **more)
        while pending:
            pending.pop()()
        return result

    monkeypatch.setattr(module, name, both)


@pytest.mark.parametrize("kind", CHANGES)
def test_while_it_is_verified(bundle: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    after(monkeypatch, integrity, "weight_headers", lambda: CHANGES[kind](bundle))  # all digests have been compared
    failed = {check.name: check.detail for check in verify_bundle(bundle) if not check.ok}
    assert "changed while it was checked" in failed["unchanged"]


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("way", ["session", "ort", "torch"])
def test_while_it_is_loaded(bundle: Path, monkeypatch: pytest.MonkeyPatch, kind: str, way: str) -> None:
    load, place = {
        "session": (session.session, (session, "open_graph")),
        "ort": (ort_model.OrtModel, (ort_model, "open_graph")),
        "torch": (in_pytorch, (torch_model, "load_checkpoint")),
    }[way]
    after(monkeypatch, *place, lambda: CHANGES[kind](bundle))
    with pytest.raises(BadArtifact):
        load(bundle)


def test_nothing_changes(bundle: Path) -> None:
    checks = {check.name: check for check in verify_bundle(bundle)}
    assert checks["unchanged"].ok
    assert all(check.ok for check in checks.values()), checks
