"""What a bundle holds for onnxruntime-genai, and what `verify` refuses of it. Running it: tests/runtime/test_genai.py."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from onnx import numpy_helper

from modes_cli.artifacts.bundle import OperatingPoint
from modes_cli.errors import UnknownLayout
from modes_cli.export import export_bundle
from modes_cli.export.genai import RUNS
from modes_cli.export.genai.folder import obstacle
from modes_cli.export.genai.image_steps import image_steps
from modes_cli.export.genai.points import graph_name
from modes_cli.export.verify import verify_bundle
from modes_cli.requests import ExportRequest
from tests.export.bundles import TAU, make_run, read, relist

CONFIG, STEPS = "genai_config.json", "vision_processor.json"


@pytest.fixture
def mine(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


def failed(bundle: Path, *changed: str) -> dict[str, str]:
    relist(bundle, *changed)
    return {check.name: check.detail for check in verify_bundle(bundle) if not check.ok}


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def test_settings(bundle: Path) -> None:
    model = json.loads((bundle / CONFIG).read_text())["model"]
    decoder = model["decoder"]
    assert model["type"] == "qwen3_vl"
    assert (model["image_token_id"], model["video_token_id"], model["vision_start_token_id"]) == (5, 6, 3)
    assert (model["pad_token_id"], model["eos_token_id"]) == (0, [2])
    assert decoder["session_options"]["custom_ops_library"] == "libmodes_cpu.so"
    assert decoder["hidden_size"] == 3 * 64  # embeddings and two of DeepStack's features
    assert (decoder["head_size"], decoder["num_hidden_layers"], decoder["num_key_value_heads"]) == (16, 4, 2)
    assert decoder["filename"] == "decoder-0.3.onnx"
    assert decoder["inputs"]["input_ids"] == "input_ids"  # the groups are found with them


def test_graphs_of_the_operating_points(bundle: Path) -> None:
    """The search's thresholds as constants, and one row of logits."""

    def tau(name: str) -> list[float]:
        graph = onnx.load_model(bundle / name, load_external_data=False).graph
        logits, *present = graph.output
        if name != "decoder.onnx":
            assert "tau" not in [value.name for value in graph.input]
            assert logits.type.tensor_type.shape.dim[1].dim_value == 1
            assert len(present) == 2 * 4
        return [float(x) for x in numpy_helper.to_array(next(t for t in graph.initializer if t.name == "tau"))]

    assert tau("decoder-0.onnx") == [0.0] * 5
    assert tau("decoder-0.3.onnx") == tau("decoder.onnx") == pytest.approx([TAU["text"], TAU["vision"], TAU["text"], 0, 0])
    assert tau("decoder-0.1.onnx") == pytest.approx([0.02, 0.03, 0.02, 0, 0])
    assert [graph_name(point) for point in read(bundle).points] == ["decoder-0.1.onnx", "decoder-0.3.onnx"]
    both = OperatingPoint(target=0.75, decode_target=0.5, tau={}, skip_ratio=0.75, kl=0.0)
    assert graph_name(both) == "decoder-0.75-0.5.onnx"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["decoder"]["session_options"].update(custom_ops_library="other.so"), "model.decoder"),
        (lambda m: m["decoder"]["session_options"].update(custom_ops_library="../libmodes_cpu.so"), "custom_ops_library"),
        (lambda m: m["decoder"].update(filename="embedding.onnx"), "model.decoder"),
        (lambda m: m["decoder"].update(hidden_size=64), "model.decoder"),
        (lambda m: m["decoder"].update(sliding_window={}), "sliding_window"),
        (lambda m: m["vision"].update(config_filename="/etc/passwd"), "config_filename"),
        (lambda m: m["vision"].update(config_filename="other.json"), "other.json"),
        (lambda m: m.update(type="phi3"), "model.type"),
        (lambda m: m.update(pad_token_id=1), "model.pad_token_id"),
        (lambda m: m.pop("embedding"), "embedding"),
    ],
)
def test_altered_settings(mine: Path, change: Callable[[dict[str, Any]], object], words: str) -> None:
    """They name code that onnxruntime-genai would load."""
    edit(mine / CONFIG, lambda tree: change(tree["model"]))
    found = failed(mine, CONFIG)
    assert words in found[CONFIG]
    (mine / CONFIG).write_text("[" * 10_000)
    assert CONFIG in failed(mine, CONFIG)


def test_a_graph_that_differs_in_more_than_tau(mine: Path) -> None:
    shutil.copy(mine / "embedding.onnx", mine / "decoder-0.1.onnx")
    assert "decoder-0.1.onnx" in failed(mine, "decoder-0.1.onnx")[CONFIG]
    shutil.copy(mine / "decoder-0.onnx", mine / "decoder-0.1.onnx")  # nothing skipped, under a name that says otherwise
    assert "`tau`" in failed(mine, "decoder-0.1.onnx")[CONFIG]


def test_settings_without_graphs(mine: Path) -> None:
    edit(mine / "bundle.json", lambda tree: tree.update(format="safetensors"))
    assert "no graphs" in failed(mine)[CONFIG]


@pytest.mark.parametrize("name", [STEPS, "decoder-0.onnx"])
def test_files_that_are_not_listed(mine: Path, name: str) -> None:
    edit(mine / "bundle.json", lambda tree: tree.update(files=[file for file in tree["files"] if file["path"] != name]))
    assert name in failed(mine)[CONFIG]


def processor(**changes: Any) -> SimpleNamespace:
    values = {
        "do_convert_rgb": True, "do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3, "patch_size": 16,
        "merge_size": 2, "temporal_patch_size": 2, "size": {"shortest_edge": 65536, "longest_edge": 16777216},
        "image_mean": (0.5,) * 3, "image_std": (0.5,) * 3, "rescale_factor": 1 / 255,
    }  # fmt: skip
    return SimpleNamespace(**(values | changes))


def test_image_steps() -> None:
    steps = {
        step["operation"]["type"]: step["operation"].get("attrs")
        for step in image_steps(processor())["processor"]["transforms"]
    }
    assert (steps["Resize"]["min_pixels"], steps["Resize"]["max_pixels"]) == (65536, 16777216)
    assert steps["PatchImage"] == {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
    for change in ({"do_normalize": False}, {"resample": 5}):
        with pytest.raises(UnknownLayout, match=str(*change)[:8]):
            image_steps(processor(**change))


def test_where_it_cannot_run(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundle is whole without the files, and whoever exports it hears why there are none."""
    monkeypatch.delitem(RUNS, "qwen3_vl_moe")
    request = ExportRequest(run=make_run(tmp_path / "run", checkpoint))
    exported = export_bundle(request)
    assert exported.notes == (obstacle("qwen3_vl_moe"),)
    assert not list(exported.path.glob("*genai*")) + list(exported.path.glob("decoder-*"))
    assert [check for check in verify_bundle(exported.path) if not check.ok] == []
    assert export_bundle(request).notes == exported.notes  # not written again
