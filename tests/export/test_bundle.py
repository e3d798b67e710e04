"""`export_bundle`: what is written, what is refused, and that nothing of the user's is lost."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AriaConfig, AutoModelForImageTextToText

from modes_cli.artifacts import Thresholds
from modes_cli.errors import BadOption, MissingArtifact, StaleArtifact, UnknownLayout, WriteFailed
from modes_cli.export import bundle as exporter
from modes_cli.export import export_bundle
from modes_cli.export.families import family_of
from modes_cli.export.verify import verify_bundle
from modes_cli.models.groups import DECODE, GROUPS, TEXT, VISION
from modes_cli.requests import ExportRequest
from modes_cli.run_folder import RunFolder
from modes_cli.safetensors_header import merged, read_header
from tests.export.bundles import SHARES, TAU, make_run, read, shared_bfloat16


def test_verifies(bundle: Path) -> None:
    checks = verify_bundle(bundle)
    assert [check for check in checks if not check.ok] == []
    names = ["bundle.json", "files", "digests", "nothing else", "weights", "thresholds"]
    names += ["decoder-0.1.onnx", "decoder-0.3.onnx", "decoder-0.onnx", "decoder.onnx", "embedding.onnx", "vision.onnx"]
    names += ["genai_config.json", "kernels", "session", "unchanged"]
    assert [check.name for check in checks] == names


def test_describes_itself(bundle: Path) -> None:
    found = read(bundle)
    assert found.moe_layers == [1, 2, 3]
    assert (found.experts, found.top_k, found.policy, found.target, found.tau) == (16, 4, "modes", 0.3, TAU)
    assert [point.target for point in found.points] == [0.1, 0.3]
    assert found.vision_token_ids == [5, 6]
    assert found.eos_token_ids == [2]
    assert set(found.special_token_ids) >= {0, 1, 2, 3, 4}
    assert (found.groups, found.audio_token_ids) == (list(GROUPS), [])
    assert (found.decoder.layers, found.decoder.deepstack, found.decoder.position_rows) == (4, 2, 3)


def test_transformers_loads_it_without_complaint(bundle: Path, checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, report = AutoModelForImageTextToText.from_pretrained(bundle, output_loading_info=True)
    assert not any(report.values()), report
    assert "UNEXPECTED" not in caplog.text
    source = load_file(checkpoint / "model.safetensors")
    assert source.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, source[name]) for name, tensor in model.state_dict().items())


def test_weights_are_aligned(bundle: Path) -> None:
    tensors = merged([read_header(path) for path in bundle.glob("model-*.safetensors")])
    assert all(entry.start % 64 == 0 for entry in tensors.values())
    assert all(entry.start % 4096 == 0 for name, entry in tensors.items() if ".experts." in name)


def test_thresholds(bundle: Path) -> None:
    with safe_open(bundle / "thresholds.safetensors", "pt") as file:
        scale, tau, metadata = file.get_tensor("score_scale"), file.get_tensor("tau"), file.metadata()
    assert scale.dtype == tau.dtype == torch.float32
    assert tau.tolist() == pytest.approx([TAU["text"], TAU["vision"], TAU["text"], 0.0, 0.0])  # decode has that of text
    alpha = torch.tensor([share[0] for share in SHARES.values()])  # policy `modes`: that of all tokens
    torch.testing.assert_close(scale[:, [TEXT, VISION, DECODE]], alpha[:, None].expand(-1, 3))
    assert scale.shape == (len(SHARES), len(GROUPS))
    assert metadata["policy"] == "modes"
    assert metadata["groups"] == "text,vision,decode,audio,special"
    assert metadata["moe_layers"] == "1,2,3"


def test_is_not_written_twice(bundle: Path) -> None:
    before = (bundle / "bundle.json").stat().st_mtime_ns
    export_bundle(ExportRequest(run=bundle.parent))
    assert (bundle / "bundle.json").stat().st_mtime_ns == before


@pytest.fixture
def run(tmp_path: Path, checkpoint: Path) -> Path:
    return make_run(tmp_path / "run", checkpoint)


def test_safetensors_format_has_no_graphs(run: Path) -> None:
    exported = export_bundle(ExportRequest(run=run, format="safetensors", target=0.1))
    names = {path.name for path in exported.path.iterdir()}
    assert not [name for name in names if name.endswith((".onnx", ".so"))]
    assert exported.bundle.target == 0.1
    assert exported.peak_rss > 0
    assert all(check.ok for check in verify_bundle(exported.path))
    again = export_bundle(ExportRequest(run=run, format="safetensors", target=0.3))  # another target replaces it
    assert again.bundle.target == 0.3


def test_bfloat16_and_tied_embeddings(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Weights stay as stored, with casts in the graph, and nothing is stored twice."""
    _, bundle = shared_bfloat16(tmp_path_factory.getbasetemp())
    assert [check for check in verify_bundle(bundle) if not check.ok] == []
    stored = load_file(bundle / "model-00001-of-00001.safetensors")
    assert "lm_head.weight" not in stored
    assert all(tensor.dtype == torch.bfloat16 for tensor in stored.values())
    assert json.loads((bundle / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_folder_with_other_things_is_not_replaced(run: Path, tmp_path: Path, bundle: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(BadOption, match="mine"):
        export_bundle(ExportRequest(run=run, output=mine, format="safetensors"))
    shutil.copytree(bundle, tmp_path / "both")
    (tmp_path / "both" / "thesis.tex").write_text("years of work")
    with pytest.raises(BadOption, match=r"thesis\.tex"):
        export_bundle(ExportRequest(run=run, output=tmp_path / "both", format="safetensors"))
    assert (mine / "thesis.tex").exists()
    assert (tmp_path / "both" / "thesis.tex").exists()


def test_unknown_target(run: Path) -> None:
    with pytest.raises(BadOption, match=r"`0\.5`.* 0\.1, 0\.3"):
        export_bundle(ExportRequest(run=run, target=0.5))


def test_missing_and_stale_artifacts(run: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingArtifact):
        export_bundle(ExportRequest(run=tmp_path / "empty"))
    text = (run / "calibration.json").read_text()
    (run / "calibration.json").write_text(text + " ")
    with pytest.raises(StaleArtifact, match="calibration"):
        export_bundle(ExportRequest(run=run))


def test_changed_checkpoint(tmp_path: Path, checkpoint: Path) -> None:
    mine = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    run = make_run(tmp_path / "run", mine)
    config = json.loads((mine / "config.json").read_text())
    (mine / "config.json").write_text(json.dumps(config | {"changed": 1}))
    with pytest.raises(StaleArtifact, match="digest"):
        export_bundle(ExportRequest(run=run))


def test_no_space(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "SLACK", 1 << 60)
    with pytest.raises(WriteFailed, match="bytes"):
        export_bundle(ExportRequest(run=run))
    assert not (run / "bundle").exists()


def test_failing_leaves_the_old_bundle(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = export_bundle(ExportRequest(run=run, format="safetensors", target=0.1)).bundle

    def fail(*_: object) -> None:
        raise RuntimeError("power cut")

    monkeypatch.setattr(exporter, "copy_settings", fail)
    with pytest.raises(RuntimeError, match="power cut"):
        export_bundle(ExportRequest(run=run, format="safetensors", target=0.3))
    assert read(run / "bundle") == before
    assert sorted(path.name for path in run.iterdir()) == ["bundle", "calibration.json", "thresholds.json"]


def test_unknown_family() -> None:
    with pytest.raises(UnknownLayout, match=r"`aria` with text model `aria_text`.*internvl\+gpt_oss"):
        family_of(AriaConfig())


def test_policies_with_other_parameters_are_no_operating_points(run: Path) -> None:
    folder = RunFolder(run)
    thresholds = folder.read(Thresholds)
    other = thresholds.results[0].model_copy(update={"policy": "tempered", "parameters": {"power": 0.25}})
    folder.write(thresholds.model_copy(update={"results": [other, thresholds.results[1]]}))
    found = export_bundle(ExportRequest(run=run, format="safetensors")).bundle
    assert [point.target for point in found.points] == [0.3]
