"""`modes calibrate`: the numbers against their definition, and when they are used again or refused."""

import copy
import dataclasses
import importlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from modes_cli import files
from modes_cli.artifacts import Calibration
from modes_cli.calibration import calibrate
from modes_cli.calibration.calibrate import TENSORS
from modes_cli.calibration.replay import answer_logits
from modes_cli.calibration.scores import bin_of
from modes_cli.data.sample import Sample
from modes_cli.errors import BadArtifact, StaleArtifact
from modes_cli.models.groups import DECODE, GROUPS, TEXT
from modes_cli.models.inputs import measuring_batch
from modes_cli.models.loading import Loaded
from modes_cli.run_folder import RunFolder
from tests import checkpoints
from tests.runs import SAMPLES, calibration_request, content
from tests.skipping import reference

MODULE = importlib.import_module("modes_cli.calibration.calibrate")  # the package has a function of that name
Runs = dict[str, tuple[Path, Calibration]]
COUNT = {"tiny": SAMPLES, "digits": 4}  # samples; the built-in model is the larger one
COLUMNS = ("all", "text", "vision", "prompt", "decode")


@pytest.fixture(scope="module")
def runs(tiny_checkpoint: Path, one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A calibration of the tiny model and one of the built-in model: run folder and artifact."""
    made = {}
    for name, model in (("tiny", tiny_checkpoint), ("digits", "digits")):
        run = tmp_path_factory.mktemp(name)
        outcome = calibrate(calibration_request(model, run, samples=COUNT[name]))
        assert not outcome.reused
        assert outcome.path == run / "calibration.json"
        made[name] = (run, outcome.artifact)
    return made


@pytest.fixture
def run(runs: Runs, tmp_path: Path) -> Path:
    """The tiny model's run folder, to be changed."""
    return Path(shutil.copytree(runs["tiny"][0], tmp_path / "run"))


@pytest.mark.parametrize("name", ["tiny", "digits"])
def test_what_is_written_is_what_is_returned(name: str, runs: Runs) -> None:
    run, artifact = runs[name]
    assert RunFolder(run).read(Calibration) == artifact
    assert sorted(path.name for path in run.iterdir()) == ["calibration.json", TENSORS]
    assert artifact.tensors.sha256 == files.sha256(run / TENSORS)
    assert artifact.tensors.bytes == (run / TENSORS).stat().st_size


@pytest.mark.parametrize("name", ["tiny", "digits"])
def test_the_artifact_describes_the_model_and_the_samples(name: str, runs: Runs, request: pytest.FixtureRequest) -> None:
    loaded: Loaded = request.getfixturevalue(name)
    _, artifact = runs[name]
    assert list(artifact.importance) == [str(block.layer) for block in loaded.blocks]
    assert (artifact.moe_layers, artifact.experts, artifact.top_k) == (
        len(loaded.blocks),
        loaded.blocks[0].num_experts,
        loaded.blocks[0].top_k,
    )
    assert (artifact.model, artifact.family, artifact.groups) == (loaded.info, "qwen3_vl_moe", list(GROUPS))
    assert (artifact.samples, artifact.data.samples, artifact.data.source) == (COUNT[name], COUNT[name], "digits")


@pytest.mark.parametrize("name", ["tiny", "digits"])
def test_importance_sums_to_one_and_follows_the_damage(name: str, runs: Runs) -> None:
    layers = list(runs[name][1].importance.values())
    for column in COLUMNS:
        assert sum(getattr(layer, column) for layer in layers) == pytest.approx(1.0, abs=1e-9)
        total = sum(getattr(layer, f"kl_{column}") for layer in layers)
        for layer in layers:
            assert getattr(layer, column) == pytest.approx(getattr(layer, f"kl_{column}") / total)


@pytest.mark.parametrize("name", ["tiny", "digits"])
def test_vision_tokens_do_not_matter_in_the_last_layer(name: str, runs: Runs) -> None:
    """No answer position attends to them any more: exactly 0, not a rounding error."""
    *before, last = runs[name][1].importance.values()
    assert (last.kl_vision, last.vision) == (0.0, 0.0)
    assert last.kl_text == last.kl_all
    assert all(layer.kl_vision > 0 for layer in before)


@torch.no_grad()
def test_importance_is_the_mean_divergence_without_the_layer(
    tiny: Loaded, runs: Runs, small_samples: Callable[..., list[Sample]]
) -> None:
    """By definition: one sample at a time, a copy of the model with zeroed experts, PyTorch's KL in float64."""
    _, artifact = runs["tiny"]
    singles = [measuring_batch(tiny, [sample]) for sample in small_samples(SAMPLES)]
    full = [answer_logits(tiny.model, batch).double().log_softmax(-1) for batch in singles]
    assert artifact.answer_tokens == sum(len(rows) for rows in full)
    for block in tiny.blocks:
        without = copy.deepcopy(tiny.model)
        without.get_submodule(block.name).down_proj.zero_()
        damage = 0.0
        for batch, rows in zip(singles, full, strict=True):
            other = answer_logits(without, batch).double().log_softmax(-1)
            damage += float(F.kl_div(other, rows, reduction="sum", log_target=True))
        assert artifact.importance[str(block.layer)].kl_all == pytest.approx(damage / artifact.answer_tokens, rel=1e-3)


def test_tokens_and_scores_are_those_of_the_samples_without_padding(
    tiny: Loaded, runs: Runs, small_samples: Callable[..., list[Sample]]
) -> None:
    run, artifact = runs["tiny"]
    histogram = load_file(run / TENSORS)["score_histogram"]
    expected, tokens = torch.zeros_like(histogram), torch.zeros(len(GROUPS), dtype=torch.int64)
    for sample in small_samples(SAMPLES):
        batch = measuring_batch(tiny, [sample])
        group = tiny.tokens.of(batch.inputs["input_ids"])
        group = group.masked_fill((group == TEXT) & batch.decoding, DECODE).reshape(-1)
        tokens += torch.bincount(group, minlength=len(GROUPS))
        with reference.listening(tiny.blocks) as calls:
            answer_logits(tiny.model, batch)
        for call in calls:
            bins = bin_of(reference.probability(call.weights))
            for g in range(len(GROUPS)):
                expected[call.block.index, g] += torch.bincount(bins[group == g].reshape(-1), minlength=histogram.shape[-1])
    assert artifact.tokens == dict(zip(GROUPS, tokens.tolist(), strict=True))
    assert torch.equal(histogram.sum(-1), expected.sum(-1))
    # One sample at a time the last bits differ, so that a few scores fall into the next bin.
    assert int((histogram - expected).abs().sum()) <= 0.01 * int(expected.sum())


def test_slot_ratios_are_the_medians_of_the_samples(
    tiny: Loaded, runs: Runs, small_samples: Callable[..., list[Sample]]
) -> None:
    found = load_file(runs["tiny"][0] / TENSORS)["slot_ratio"]
    pi: dict[int, list[torch.Tensor]] = {}
    for sample in small_samples(SAMPLES):
        with reference.listening(tiny.blocks) as calls:
            answer_logits(tiny.model, measuring_batch(tiny, [sample]))
        for call in calls:
            pi.setdefault(call.block.index, []).append(reference.probability(call.weights))
    for layer, parts in pi.items():
        ordered = torch.cat(parts).sort(1, descending=True).values
        torch.testing.assert_close(found[layer], (ordered / ordered[:, :1]).median(0).values, rtol=5e-3, atol=0)


def test_prompt_and_decode_are_parts_of_text(runs: Runs) -> None:
    """What decodes is where KL is read: in the last layer it is all that matters."""
    *before, last = runs["digits"][1].importance.values()
    assert last.kl_prompt == 0.0
    assert last.kl_decode == last.kl_text
    assert all(layer.kl_prompt > 0 for layer in before)


def test_reference_distributions_are_the_unmodified_models(
    tiny: Loaded, runs: Runs, small_samples: Callable[..., list[Sample]]
) -> None:
    run, artifact = runs["tiny"]
    found = load_file(run / TENSORS)["reference_log_probabilities"]
    samples = small_samples(SAMPLES)
    halves = [measuring_batch(tiny, samples[:8]), measuring_batch(tiny, samples[8:])]
    expected = torch.cat([answer_logits(tiny.model, batch).double().log_softmax(-1).float() for batch in halves])
    assert found.shape[0] == artifact.answer_tokens
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["tiny", "digits"])
def test_replaying_costs_about_half(name: str, runs: Runs, request: pytest.FixtureRequest) -> None:
    loaded: Loaded = request.getfixturevalue(name)
    artifact = runs[name][1]
    layers = loaded.model.config.text_config.num_hidden_layers
    ran = layers + len(COLUMNS) * sum(layers - block.layer for block in loaded.blocks)
    assert artifact.naive_forwards == 1 + len(COLUMNS) * len(loaded.blocks)
    ran += len(loaded.blocks)  # experts alone, for the norms of what they return: counted as whole layers
    ran += 3 * layers  # saliency: forward, every layer again, and back
    assert artifact.forward_equivalents == pytest.approx(ran / layers)
    if name == "digits":  # importance and norms; the naive way has no saliency either
        assert artifact.forward_equivalents - 3 <= 0.6 * artifact.naive_forwards


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["tiny", "digits"])
def test_the_same_bytes_again(name: str, runs: Runs, tiny_checkpoint: Path, tmp_path: Path) -> None:
    calibrate(calibration_request(tiny_checkpoint if name == "tiny" else "digits", tmp_path, samples=COUNT[name]))
    assert content(tmp_path) == content(runs[name][0])


@pytest.mark.parametrize("name", ["tiny", "digits"])
def test_threads_change_at_most_the_last_bits(
    name: str, runs: Runs, tiny_checkpoint: Path, tmp_path: Path, two_threads: None
) -> None:
    """MKL divides a product by the number of threads, so the bytes can differ; with one number of threads they do not."""
    run, one = runs[name]
    request = calibration_request(tiny_checkpoint if name == "tiny" else "digits", tmp_path, samples=COUNT[name])
    two = calibrate(request).artifact
    before = content(tmp_path)
    calibrate(dataclasses.replace(request, fresh=True))
    assert content(tmp_path) == before

    assert (two.tokens, two.answer_tokens) == (one.tokens, one.answer_tokens)
    for layer, expected in one.importance.items():
        assert two.importance[layer].model_dump() == pytest.approx(expected.model_dump(), rel=1e-3, abs=1e-7)
    counts = [load_file(folder / TENSORS)["score_histogram"] for folder in (run, tmp_path)]
    assert torch.equal(counts[0].sum(-1), counts[1].sum(-1))
    assert int((counts[0] - counts[1]).abs().sum()) <= 0.01 * int(counts[0].sum())


def test_a_finished_calibration_is_not_made_again(
    run: Path, runs: Runs, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "load", lambda _: pytest.fail("loaded the model"))
    before = content(run)
    outcome = calibrate(calibration_request(tiny_checkpoint, run))
    assert outcome.reused
    assert outcome.artifact == runs["tiny"][1]
    assert content(run) == before


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"samples": 8}, "data.samples"),
        ({"seed": 1}, "data.seed"),
        ({"batch_size": 4}, "options.batch_size"),
        ({"model": "digits"}, "model.id"),
    ],
)
def test_a_calibration_of_something_else_is_refused(
    change: dict[str, object], field: str, run: Path, tiny_checkpoint: Path
) -> None:
    before = content(run)
    with pytest.raises(StaleArtifact) as caught:
        calibrate(calibration_request(**{"model": tiny_checkpoint, "run": run, **change}))  # type: ignore[arg-type]
    assert f"was made with {field} " in str(caught.value)
    assert "modes calibrate" in str(caught.value.hint)
    assert "--fresh" in str(caught.value.hint)
    assert content(run) == before


def test_a_changed_checkpoint_of_the_same_name_is_refused(run: Path, tmp_path: Path) -> None:
    folder = checkpoints.write_moe(tmp_path / "model")
    calibrate(calibration_request(folder, run, fresh=True))
    config = folder / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(StaleArtifact, match=r"model\.digest"):
        calibrate(calibration_request(folder, run))


def test_fresh_makes_it_anew(run: Path, runs: Runs, tiny_checkpoint: Path) -> None:
    outcome = calibrate(calibration_request(tiny_checkpoint, run, samples=8, fresh=True))
    assert (outcome.reused, outcome.artifact.samples) == (False, 8)
    assert calibrate(calibration_request(tiny_checkpoint, run, samples=8)).reused
    calibrate(calibration_request(tiny_checkpoint, run, fresh=True))
    assert content(run) == content(runs["tiny"][0])


@pytest.mark.parametrize("damage", ["altered", "truncated", "missing"])
def test_damaged_tensors_are_not_used_again(damage: str, run: Path, tiny_checkpoint: Path) -> None:
    path = run / TENSORS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink() if damage == "missing" else path.write_bytes(data if damage == "altered" else data[:-1])
    with pytest.raises(BadArtifact, match=r"calibration\.safetensors"):
        calibrate(calibration_request(tiny_checkpoint, run))


def test_progress_counts_samples(tiny_checkpoint: Path, tmp_path: Path) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.stages: list[tuple[str, int]] = []
            self.done = 0

        def start(self, label: str, total: int) -> None:
            self.stages.append((label, total))

        def advance(self, pieces: int = 1) -> None:
            self.done += pieces

    recorder = Recorder()
    calibrate(calibration_request(tiny_checkpoint, tmp_path, samples=5, batch_size=2, progress=recorder))
    assert recorder.stages == [("calibrate", 5)]
    assert recorder.done == 5


def test_an_error_leaves_no_artifact(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "kl_sum", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        calibrate(calibration_request(tiny_checkpoint, tmp_path))
    assert content(tmp_path) == {}


def test_a_text_model_has_one_modality(tiny_text_moe_checkpoint: Path, tmp_path: Path) -> None:
    artifact = calibrate(calibration_request(tiny_text_moe_checkpoint, tmp_path, text_only=True)).artifact
    assert artifact.tokens["vision"] == 0
    assert artifact.tokens["text"] > 0
    assert all(layer.kl_all > 0 for layer in artifact.importance.values())
    assert [(layer.vision, layer.kl_vision) for layer in artifact.importance.values()] == [(0.0, 0.0)] * artifact.moe_layers
