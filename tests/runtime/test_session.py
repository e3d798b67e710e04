"""A bundle in ONNX Runtime against the same checkpoint in transformers with skipping, thresholds active."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import modes_cli
from modes_cli.data.sample import Sample
from modes_cli.errors import BadArtifact, BadData, BadOption
from modes_cli.models.groups import DECODE, GROUPS, TEXT, VISION
from modes_cli.models.inputs import end_ids, prompt_batch
from modes_cli.models.loading import Loaded, load
from modes_cli.requests import GenerateRequest, ModelSpec
from modes_cli.runtime.generate import generate
from modes_cli.runtime.ort_model import OrtModel
from modes_cli.runtime.positions import mrope_positions, text_positions
from modes_cli.runtime.session import session
from modes_cli.skipping.engine import SkipEngine
from modes_cli.skipping.policy import Rule, tau_vector
from tests.export.bundles import MOE_LAYERS, SHARES, TAU, shared_bfloat16, shared_bundle, shared_checkpoint

IMAGE = 5
SCALE = torch.ones(len(SHARES), len(GROUPS))
SCALE[:, [TEXT, VISION, DECODE]] = torch.tensor([[share[0]] for share in SHARES.values()])


def picture(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def sample(question: str, *images: Image.Image) -> Sample:
    return Sample(question, images, question, "x", "t")


BATCHES = {
    "one": [sample("How many digits?", picture(48, 48, 0))],
    "left padding": [sample("What is at the top left?", picture(48, 48, 1)), sample("Add?", picture(32, 72, 2))],
    "several images": [
        sample("Compare.", picture(48, 48, 3), picture(96, 24, 4), picture(24, 96, 5)),
        sample("How many red digits?", picture(48, 48, 6)),
    ],
    "no image": [sample("Read the top row.")],
    "with and without": [sample("Read.", picture(48, 48, 7)), sample("Is there a 7 in the middle row?")],
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_bundle(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def ort_model(bundle: Path) -> OrtModel:
    return OrtModel(bundle, threads=1)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Loaded, SkipEngine]]:
    loaded = load(ModelSpec(str(shared_checkpoint(tmp_path_factory.getbasetemp()))))
    engine = SkipEngine(loaded.model, loaded.blocks, loaded.tokens)
    yield loaded, engine
    engine.remove()


def ask_torch(
    reference: tuple[Loaded, SkipEngine], samples: list[Sample], steps: int, tau: dict[str, float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens [B, steps] and the logits of each step [B, steps, V], without stopping."""
    loaded, engine = reference
    engine.rule = Rule(SCALE, tau_vector(tau))
    engine.counts.reset()
    batch = prompt_batch(loaded, samples)
    with torch.no_grad():
        out = loaded.model.generate(
            **batch.inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, output_logits=True,
            return_dict_in_generate=True, suppress_tokens=[2],
        )  # fmt: skip
    return out.sequences[:, batch.inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1)


def run_ort(
    model: OrtModel, samples: list[Sample], forced: torch.Tensor, tau: dict[str, float] | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of each step when the given tokens are fed, and kept pairs of prefill and decode."""
    prompts = model.prompts([s.images for s in samples], [s.question for s in samples])
    thresholds = None if tau is None else tau_vector(tau).numpy()
    state = model.prefilled(prompts, thresholds)
    found, prefill = [state.logits[:, -1]], state.kept
    decode = np.zeros_like(prefill)
    for token in forced[:, :-1].T:
        model.next_token(state, token.numpy()[:, None], np.ones((len(samples), 1), np.int64), thresholds)
        found.append(state.logits[:, -1])
        decode = decode + state.kept
    return np.stack(found, 1), prefill, decode


@pytest.mark.parametrize("name", BATCHES)
def test_logits_and_kept_pairs(ort_model: OrtModel, reference: tuple[Loaded, SkipEngine], name: str) -> None:
    samples = BATCHES[name]
    if name == "with and without":  # one at a time in transformers; as one batch here
        parts = [ask_torch(reference, [s], 5, TAU) for s in samples]
        tokens, logits = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    else:
        tokens, logits = ask_torch(reference, samples, 5, TAU)
    found, prefill, decode = run_ort(ort_model, samples, tokens, None)
    np.testing.assert_allclose(found, logits.numpy(), atol=1e-3)
    assert float(logits.std()) > 0.3  # or the comparison would mean little
    if name != "with and without":
        counts = reference[1].counts
        np.testing.assert_array_equal(prefill, counts.kept[0].numpy())
        np.testing.assert_array_equal(decode, counts.kept[1].numpy())
        assert 0.05 < counts.skip_ratio() < 0.9


def test_thresholds_are_inputs_with_a_default(ort_model: OrtModel, reference: tuple[Loaded, SkipEngine]) -> None:
    samples = BATCHES["left padding"]
    for tau in (
        {"text": 0.0, "vision": 0.0},
        {"text": 0.0, "vision": 1e9},
        {"text": 1e9, "vision": 0.0},
        {"text": 0.0, "vision": 0.0, "decode": 1e9},
        {"text": 1e9, "vision": 1e9, "decode": 0.0},
        {"text": 0.02, "vision": 0.2, "decode": 0.09},
    ):
        tokens, logits = ask_torch(reference, samples, 3, tau)
        found, prefill, decode = run_ort(ort_model, samples, tokens, tau)
        counts = reference[1].counts
        np.testing.assert_allclose(found, logits.numpy(), atol=1e-3)
        np.testing.assert_array_equal(prefill, counts.kept[0].numpy())
        np.testing.assert_array_equal(decode, counts.kept[1].numpy())
        assert int(counts.total[0, 0, DECODE]) == len(samples) * ort_model.bundle.top_k  # the last token of each prompt
        for group, name in enumerate(GROUPS[:3]):
            if (threshold := tau.get(name, tau["text"])) in (0.0, 1e9):
                kept, total = counts.kept[..., group], counts.total[..., group]
                assert torch.equal(kept, torch.zeros_like(total) if threshold else total)
    default = run_ort(ort_model, samples, tokens, None)[0]
    np.testing.assert_array_equal(default, run_ort(ort_model, samples, tokens, TAU)[0])


def test_all_logits_or_the_last(ort_model: OrtModel) -> None:
    prompts = ort_model.prompts([s.images for s in BATCHES["left padding"]], ["a", "b"])
    features, (positions, _) = ort_model.image_features(prompts.pixel_values, prompts.grids), ort_model.positions(prompts)

    def logits(keep: int) -> np.ndarray:
        state = ort_model.empty_state(2)
        ort_model.step(state, prompts.input_ids, prompts.attention_mask, positions, features, None, keep)
        return state.logits

    everything = logits(0)
    assert everything.shape[:2] == prompts.input_ids.shape
    assert np.isfinite(everything).all()  # padding rows as well
    np.testing.assert_allclose(logits(1), everything[:, -1:], atol=1e-5)
    np.testing.assert_allclose(logits(3), everything[:, -3:], atol=1e-5)


def test_one_prompt_in_two_pieces(ort_model: OrtModel) -> None:
    """Prefill with a cache: the graph that does prefill and decode does everything between."""
    prompts = ort_model.prompts([BATCHES["one"][0].images], ["How many digits?"])
    features, (positions, _) = ort_model.image_features(prompts.pixel_values, prompts.grids), ort_model.positions(prompts)
    ids, mask = prompts.input_ids, prompts.attention_mask
    whole = ort_model.prefilled(prompts, None)
    cut = int(np.flatnonzero(ids[0] == IMAGE)[10])
    state = ort_model.empty_state(1)
    ort_model.step(state, ids[:, :cut], mask[:, :cut], positions[..., :cut], features[:10], None)
    first = state.kept
    ort_model.step(state, ids[:, cut:], mask[:, cut:], positions[..., cut:], features[10:], None)
    np.testing.assert_allclose(state.logits, whole.logits, atol=1e-4)
    np.testing.assert_array_equal(first + state.kept, whole.kept)


def test_decode_steps_leave_the_state(ort_model: OrtModel) -> None:
    prompts = ort_model.prompts([s.images for s in BATCHES["left padding"]], ["a", "b"])
    state = ort_model.prefilled(prompts, None)
    logits = state.logits.copy()
    counts = [ort_model.decode_steps(state, 4, None) for _ in range(2)]
    assert torch.equal(counts[0].kept, counts[1].kept)
    assert int(counts[0].total.sum()) == 2 * 4 * ort_model.bundle.top_k * len(MOE_LAYERS)
    assert state.attention_mask.shape == prompts.attention_mask.shape
    np.testing.assert_array_equal(state.logits, logits)


@pytest.mark.parametrize("decode", [None, 0.02, 0.3])
def test_generates_the_same_text(
    decode: float | None, ort_model: OrtModel, reference: tuple[Loaded, SkipEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And counts the same tokens, in the same groups, also when a sample of the batch has ended."""
    loaded, engine = reference
    tau = TAU if decode is None else {**TAU, "decode": decode}
    monkeypatch.setattr(engine, "ended", (*end_ids(loaded), loaded.tokenizer.pad_token_id))
    for samples in (BATCHES["several images"], BATCHES["no image"]):
        engine.rule = Rule(SCALE, tau_vector(tau))
        engine.counts.reset()
        batch = prompt_batch(loaded, samples)
        with torch.no_grad():
            ids = loaded.model.generate(**batch.inputs, max_new_tokens=12, do_sample=False)[
                :, batch.inputs["input_ids"].shape[1] :
            ]
        expected = loaded.tokenizer.batch_decode(ids, skip_special_tokens=True)
        thresholds = None if decode is None else tau
        answers = ort_model.generate([s.images for s in samples], [s.question for s in samples], 12, thresholds)
        assert answers.texts == expected
        assert torch.equal(answers.counts.total, engine.counts.total)
        assert torch.equal(answers.counts.kept, engine.counts.kept)
        assert "decode" in answers.skip_ratio
        assert answers.prefill_seconds > 0


def test_a_finished_row_costs_nothing(ort_model: OrtModel, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = BATCHES["left padding"]
    images, questions = [s.images for s in samples], [s.question for s in samples]
    free = ort_model.generate(images, questions, 6)
    stop = free.tokens[0][2]
    assert stop not in free.tokens[0][:2]
    monkeypatch.setattr(ort_model, "bundle", ort_model.bundle.model_copy(update={"eos_token_ids": [stop]}))
    stopped = ort_model.generate(images, questions, 6)
    assert stopped.tokens[0] == free.tokens[0][:2]
    longer = free.tokens[1][: free.tokens[1].index(stop)] if stop in free.tokens[1] else free.tokens[1]
    assert stopped.tokens[1] == longer  # the other row does not notice
    total = stopped.counts.total[1, 0].sum() / ort_model.bundle.top_k
    assert total == 2 + min(len(longer), 5)  # decode steps that fed a real token


def test_statistics_of_nothing_skipped(ort_model: OrtModel) -> None:
    answers = ort_model.generate([[]], ["Hello?"], 2, {"text": 0.0, "vision": 0.0})
    assert answers.skip_ratio == {"all": 0.0, "text": 0.0, "decode": 0.0}  # no vision token, no ratio
    assert answers.counts.total.shape == (2, len(MOE_LAYERS), len(GROUPS))


def test_bfloat16_weights(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Experts stay bfloat16 in the operator, the rest is cast; both computed in float32, as the checkpoint loaded so."""
    checkpoint, bundle = shared_bfloat16(tmp_path_factory.getbasetemp())
    loaded = load(ModelSpec(str(checkpoint), dtype="float32"))
    engine = SkipEngine(loaded.model, loaded.blocks, loaded.tokens)
    tokens, logits = ask_torch((loaded, engine), BATCHES["left padding"], 3, TAU)
    found, _, _ = run_ort(OrtModel(bundle, threads=1), BATCHES["left padding"], tokens, None)
    np.testing.assert_allclose(found, logits.numpy(), atol=1e-3)


def test_session_of_the_package(bundle: Path) -> None:
    opened = modes_cli.session(bundle)
    assert [output.name for output in opened.get_outputs()][:2] == ["logits", "kept_pairs"]
    assert {value.name for value in opened.get_overridable_initializers()} == {"tau", "logits_to_keep"}
    with pytest.raises(BadOption, match="NoSuchProvider"):
        session(bundle, ["NoSuchProvider"])
    with pytest.raises(BadArtifact, match="missing"):
        session(bundle.parent)


def test_generate_command(bundle: Path, tmp_path: Path) -> None:
    picture(48, 48, 0).save(tmp_path / "a.png")
    found = generate(GenerateRequest(bundle, (tmp_path / "a.png",), "How many digits?", max_new_tokens=3))
    assert 0 < found.tokens <= 3
    assert found.skip_ratio.keys() == {"all", "text", "vision", "decode"}
    nothing = generate(
        GenerateRequest(bundle, (tmp_path / "a.png",), "How many digits?", tau={"text": 0.0, "vision": 0.0}, max_new_tokens=1)
    )
    assert nothing.skip_ratio["all"] == 0
    same = generate(GenerateRequest(bundle, (tmp_path / "a.png",), "How many digits?", runtime="torch", max_new_tokens=3))
    assert (same.text, same.tokens) == (found.text, found.tokens)
    assert same.skip_ratio == pytest.approx(found.skip_ratio)
    for tau in ({"text": -1.0}, {"special": 1.0}, {"sound": 1.0}):
        with pytest.raises(BadOption):
            generate(GenerateRequest(bundle, (), "?", tau=tau))
    with pytest.raises(BadOption, match="runtime"):
        generate(GenerateRequest(bundle, (), "?", runtime="tpu"))
    with pytest.raises(BadOption, match="max-new-tokens"):
        generate(GenerateRequest(bundle, (), "?", max_new_tokens=0))


def test_unreadable_images(bundle: Path, tmp_path: Path) -> None:
    """With the limits and formats of `--data`: Pillow would hand an EPS file to Ghostscript."""
    (tmp_path / "text.png").write_text("no image")
    good = tmp_path / "good.png"
    picture(48, 48, 0).save(good)
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:500])
    picture(48, 48, 0).convert("RGB").save(tmp_path / "page.eps")
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("text.png", "cut.png", "absent.png", "page.eps", "pipe.png"):
        with pytest.raises(BadData, match=name) as caught:
            generate(GenerateRequest(bundle, (tmp_path / name,), "?"))
        assert "Ghostscript" not in str(caught.value)


def test_images_and_videos_go_through_frame_by_frame(ort_model: OrtModel) -> None:
    grids = np.array([[2, 4, 6], [1, 2, 2], [3, 2, 4]])
    pixels = np.random.default_rng(0).standard_normal((int(grids.prod(1).sum()), 96)).astype(np.float32)
    packed = ort_model.vision.run(None, {"pixel_values": pixels, "image_grid_thw": grids})[0]
    np.testing.assert_allclose(ort_model.image_features(pixels, grids), packed, atol=1e-4)


@pytest.mark.parametrize("left", [True, False])
def test_mrope_positions(reference: tuple[Loaded, SkipEngine], left: bool) -> None:
    grids = torch.tensor([[1, 4, 6], [1, 8, 2], [1, 2, 2], [1, 12, 12]])
    rows = [[9, 3, *[IMAGE] * 6, 4, 10, 11, 3, *[IMAGE] * 4, 4, 9], [3, IMAGE, 4], [9, 10], [*[IMAGE] * 36, 9, 9]]
    length = max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        where = slice(length - len(row), None) if left else slice(None, len(row))
        ids[index, where], mask[index, where] = torch.tensor(row), 1
    expected, deltas = reference[0].model.model.get_rope_index(ids, (ids == IMAGE).int(), grids, attention_mask=mask)
    found, more = mrope_positions(ids.numpy(), mask.numpy(), grids.numpy(), [IMAGE], 2)
    np.testing.assert_array_equal(found, expected.numpy())
    np.testing.assert_array_equal(more, deltas.numpy())


def test_positions_refuse_what_does_not_match() -> None:
    ones = np.ones((1, 5), np.int64)
    ids = np.array([[9, IMAGE, IMAGE, IMAGE, 9]])
    with pytest.raises(BadData, match="takes `4`"):
        mrope_positions(ids, ones, np.array([[1, 4, 4]]), [IMAGE], 2)
    with pytest.raises(BadData, match="more images"):
        mrope_positions(ids, ones, np.zeros((0, 3), np.int64), [IMAGE], 2)
    with pytest.raises(BadData, match="the prompts show 0"):
        mrope_positions(ones, ones, np.array([[1, 4, 4]]), [IMAGE], 2)


def test_text_positions() -> None:
    mask = np.array([[0, 0, 1, 1], [1, 1, 1, 0]])
    np.testing.assert_array_equal(text_positions(mask), [[0, 0, 0, 1], [0, 1, 2, 0]])
