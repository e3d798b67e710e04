"""`modes.load` and `modes.skip_statistics`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import modes_cli as modes
from modes_cli.errors import BadOption, MissingArtifact, StaleArtifact
from modes_cli.models.inputs import prompt_batch
from modes_cli.models.loading import load
from modes_cli.requests import ModelSpec
from modes_cli.runtime.torch_model import open_model
from tests.checkpoints import small_samples
from tests.pipeline import prepared_run


@pytest.fixture
def prepared(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> tuple[Path, Path]:
    return prepared_run(tmp_path_factory.getbasetemp())


def generate(model: torch.nn.Module, checkpoint: Path) -> torch.Tensor:
    batch = prompt_batch(load(ModelSpec(str(checkpoint), device="cpu")), small_samples(2))
    tokens: torch.Tensor = model.generate(**batch.inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)  # type: ignore[operator]
    return tokens


def test_a_run_and_its_bundle_skip_alike(prepared: tuple[Path, Path]) -> None:
    checkpoint, run = prepared
    of_run = modes.load(str(checkpoint), run=run, target=0.6, device="cpu")
    of_bundle = modes.load(run / "bundle", device="cpu")

    assert torch.equal(generate(of_run, checkpoint), generate(of_bundle, checkpoint))

    ours, theirs = modes.skip_statistics(of_run), modes.skip_statistics(of_bundle)
    assert ours == theirs
    skipped = sum(c["skipped"] for layer in ours["prefill"].values() for c in layer.values())
    total = skipped + sum(c["kept"] for layer in ours["prefill"].values() for c in layer.values())
    assert 0.4 < skipped / total < 0.8
    assert all(layer["special"]["skipped"] == 0 for layer in ours["prefill"].values())


def test_statistics_count_from_the_last_call_on(prepared: tuple[Path, Path]) -> None:
    checkpoint, run = prepared
    model = modes.load(run / "bundle", device="cpu")
    generate(model, checkpoint)
    assert any(c["kept"] for layer in modes.skip_statistics(model)["prefill"].values() for c in layer.values())
    assert not any(sum(c.values()) for layer in modes.skip_statistics(model)["prefill"].values() for c in layer.values())


def test_tau_can_be_given(prepared: tuple[Path, Path]) -> None:
    checkpoint, run = prepared
    plain = load(ModelSpec(str(checkpoint), device="cpu")).model
    model = modes.load(run / "bundle", {"text": 0.0, "vision": 0.0}, device="cpu")
    assert torch.equal(generate(plain, checkpoint), generate(model, checkpoint))
    model = modes.load(run / "bundle", {"vision": float("inf")}, device="cpu")
    generate(model, checkpoint)
    counts = modes.skip_statistics(model)["prefill"]
    assert all(layer["vision"]["kept"] == 0 and layer["text"]["skipped"] == 0 for layer in counts.values())
    with pytest.raises(BadOption, match="sound"):
        modes.load(run / "bundle", {"sound": 0.1})
    with pytest.raises(BadOption, match="-1"):
        modes.load(run / "bundle", {"text": -1.0})


def test_never_skips_with_thresholds_of_another_model(
    prepared: tuple[Path, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    _, run = prepared
    with pytest.raises(MissingArtifact):
        modes.load(str(tiny_checkpoint), run=tmp_path)
    other = Path(shutil.copytree(tiny_checkpoint, tmp_path / "other"))
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(config.replace('"model_type"', '"note": "changed",\n  "model_type"', 1))
    with pytest.raises(StaleArtifact):
        modes.load(str(other), run=run)


def test_only_an_end_token_ends_an_answer(prepared: tuple[Path, Path]) -> None:
    """Not the padding token, which a model may generate: ONNX Runtime goes on there as well."""
    runtime = open_model(ModelSpec(str(prepared[0]), device="cpu"), prepared[1], 0.6)
    samples = small_samples(1)
    whole = runtime.answer(samples, 6, None).tokens[0]
    assert len(whole) == 6
    runtime.loaded.tokenizer.pad_token = runtime.loaded.tokenizer.convert_ids_to_tokens(whole[2])
    assert runtime.loaded.tokenizer.pad_token_id == whole[2]
    assert runtime.answer(samples, 6, None).tokens[0] == whole
    runtime.loaded.model.generation_config.eos_token_id = whole[2]
    assert runtime.answer(samples, 6, None).tokens[0] == whole[: whole.index(whole[2])]


def test_a_model_that_does_not_skip_has_no_statistics(prepared: tuple[Path, Path]) -> None:
    with pytest.raises(BadOption, match=r"modes\.load|does not skip"):
        modes.skip_statistics(load(ModelSpec(str(prepared[0]), device="cpu")).model)
