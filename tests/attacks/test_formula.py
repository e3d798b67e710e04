"""Bundles whose rule has a formula, altered: its tensors, the policy that names it, and the graph that refers to them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from modes_cli.artifacts.bundle import Bundle
from modes_cli.errors import BadArtifact
from modes_cli.export.integrity import check_for_loading
from modes_cli.export.thresholds import THRESHOLDS, layer_entries
from modes_cli.export.verify import verify_bundle
from modes_cli.requests import ModelSpec
from modes_cli.runtime.ort_model import OrtModel
from modes_cli.runtime.torch_model import open_model
from tests.export.bundles import EXPERTS, MOE_LAYERS, relist
from tests.export.rules import shared_kind


@pytest.fixture
def bundle(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shared_kind(tmp_path_factory.getbasetemp(), "predicted"), tmp_path / "bundle"))


def refused(bundle: Path, *words: str) -> None:
    for load in (check_for_loading, lambda folder: open_model(ModelSpec(str(folder), device="cpu"), None), OrtModel):
        with pytest.raises(BadArtifact) as caught:
            load(bundle)
        assert all(word in str(caught.value) for word in words), caught.value
    assert not all(check.ok for check in verify_bundle(bundle))


def nan(tensors: dict[str, np.ndarray]) -> None:
    tensors["contribution.router"][1, 2, 3] = np.nan


def infinite(tensors: dict[str, np.ndarray]) -> None:
    tensors["contribution.coefficients"][0, 0, 0] = -np.inf


def missing(tensors: dict[str, np.ndarray]) -> None:
    del tensors["contribution.range"]


def another(tensors: dict[str, np.ndarray]) -> None:
    tensors["contribution.code"] = np.zeros((len(MOE_LAYERS), 1), np.float32)


def short(tensors: dict[str, np.ndarray]) -> None:
    tensors["contribution.router_bias"] = tensors["contribution.router_bias"][:, :-1].copy()


def layers(tensors: dict[str, np.ndarray]) -> None:
    tensors["contribution.range"] = tensors["contribution.range"][:-1].copy()


def half(tensors: dict[str, np.ndarray]) -> None:
    tensors["contribution.router"] = tensors["contribution.router"].astype(np.float16)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (nan, ("contribution.router", "offset", "`nan`")),
        (infinite, ("contribution.coefficients", "`-inf`")),
        (missing, ("contribution.range",)),
        (another, ("contribution.code",)),
        (short, ("contribution.router_bias", f"[{len(MOE_LAYERS)}, {EXPERTS}]")),
        (layers, ("contribution.range", f"[{len(MOE_LAYERS)}, 2]")),
        (half, ("contribution.router", "F16")),
    ],
)
def test_tensors_that_are_not_the_formulas(
    bundle: Path, damage: Callable[[dict[str, np.ndarray]], None], words: tuple[str, ...]
) -> None:
    tensors = {name: tensor.copy() for name, tensor in load_file(bundle / THRESHOLDS).items()}
    damage(tensors)
    save_file(tensors, bundle / THRESHOLDS)
    relist(bundle, THRESHOLDS)
    refused(bundle, THRESHOLDS, *words)


def test_a_bit_of_a_formula(bundle: Path) -> None:
    data = bytearray((bundle / THRESHOLDS).read_bytes())
    data[layer_entries(bundle)["contribution.router_1"].start] ^= 1
    (bundle / THRESHOLDS).write_bytes(data)
    refused(bundle, THRESHOLDS, "SHA-256")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"policy": "topp", "parameters": {}}, (THRESHOLDS, "contribution.router")),
        ({"policy": "naee", "parameters": {}}, (THRESHOLDS, "contribution.share")),
        ({"policy": "magic"}, ("bundle.json", "policy", "`magic`")),
        ({"policy": "predicted", "parameters": {"power": 7.0}}, ("bundle.json", "power")),
        ({"policy": "predicted", "parameters": {}}, ("bundle.json", "parameters")),
        ({"policy": "predicted", "parameters": {"depth": 1.0}}, ("bundle.json", "depth")),
    ],
)
def test_another_policy_than_the_tensors(bundle: Path, change: dict[str, object], words: tuple[str, ...]) -> None:
    path = bundle / "bundle.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    Bundle.model_validate_json(path.read_text())
    refused(bundle, *words)


def test_a_graph_that_refers_to_other_parts_of_the_file(bundle: Path) -> None:
    """Only whole tensors of one layer are anything a graph may read."""
    path = bundle / "decoder.onnx"
    decoder = onnx.load(path, load_external_data=False)
    tensor = next(t for t in decoder.graph.initializer if t.name.endswith("router_1"))
    place = next(entry for entry in tensor.external_data if entry.key == "offset")
    place.value = str(int(place.value) + 4)
    path.write_bytes(decoder.SerializeToString())
    relist(bundle, path.name)
    assert [check.name for check in verify_bundle(bundle) if not check.ok] == ["decoder.onnx"]
    with pytest.raises(BadArtifact, match="is no tensor of the bundle"):
        OrtModel(bundle, "cpu", threads=1)
