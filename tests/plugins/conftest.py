"""The tiny bundle, its model, and an installed stand-in for vLLM."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from modes_cli.plugins import vllm as plugin
from modes_cli.requests import ModelSpec
from modes_cli.runtime.torch_model import TorchRuntime, open_model
from tests.pipeline import prepared_run
from tests.plugins.standin import fake_vllm


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    return prepared_run(tmp_path_factory.getbasetemp())[1] / "bundle"


@pytest.fixture(scope="module")
def runtime(bundle: Path) -> TorchRuntime:
    return open_model(ModelSpec(str(bundle), device="cpu"), None)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> dict[str, type]:
    """Installed, in a version that is known, with a bundle named."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.33.1" if name == "vllm" else "?")
    monkeypatch.setenv(plugin.BUNDLE, str(bundle))
    for name in (plugin.TAU, plugin.SKIP):
        monkeypatch.delenv(name, raising=False)
    return fake_vllm(monkeypatch)
