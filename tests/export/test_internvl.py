"""InternVL3.5 with both kinds of text model, from hub-layout checkpoints through every step, ONNX Runtime against PyTorch."""

import contextlib
import dataclasses
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText

from modes_cli import app
from modes_cli.calibration import calibrate
from modes_cli.data.sample import DataSpec, Sample
from modes_cli.errors import BadData, UnknownLayout
from modes_cli.evaluation import evaluate
from modes_cli.export import export_bundle
from modes_cli.export.families import family_of
from modes_cli.export.verify import verify_bundle
from modes_cli.models.inputs import prompt_batch
from modes_cli.models.loading import load
from modes_cli.models.processor import load_processor
from modes_cli.models.profiling import profile_model
from modes_cli.requests import EvaluateRequest, ExportRequest, GenerateRequest, ModelSpec, ProfileRequest
from modes_cli.runtime.generate import generate
from modes_cli.runtime.ort_model import OrtModel
from modes_cli.runtime.torch_model import TorchRuntime, open_model
from modes_cli.search import find_thresholds
from modes_cli.skipping.policy import Rule, tau_vector
from tests.checkpoint_internvl import EXPERTS, HIDDEN, IMAGE, INTERMEDIATE, LAYERS, TEXTS, TILE, TOP_K, WINDOW, write_internvl
from tests.checkpoints import small_samples
from tests.export.generation import batches, generated, varied
from tests.runs import calibration_request, search_request

STEPS = 12  # more than the window
ZERO = {"text": 0.0, "vision": 0.0}
NOTHING = tau_vector(ZERO).numpy()
DATA = ("--data", "digits", "--samples", "4", "--batch-size", "2")


def commands(*lines: tuple[object, ...]) -> list[Any]:
    """Run command lines; what each said on stdout."""
    found = []
    for line in lines:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            code = app.run([str(part) for part in line] + ["--json"])
        assert code == 0, out.getvalue()
        found.append(json.loads(out.getvalue()))
    return found


@dataclass(frozen=True)
class Made:
    text: str
    checkpoint: Path
    run: Path
    said: dict[str, Any]  # by command
    torch: TorchRuntime
    ort: OrtModel

    @property
    def bundle(self) -> Path:
        return self.run / "bundle"


@pytest.fixture(scope="module", params=TEXTS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Made:
    """The whole chain, by command lines."""
    base = tmp_path_factory.mktemp(request.param)
    checkpoint, run = write_internvl(base / "checkpoint", request.param), base / "run"
    at = ("--run", run)
    names = ("profile", "calibrate", "search", "export", "verify", "evaluate")
    said = commands(
        ("profile", checkpoint, *DATA, *at),
        ("calibrate", checkpoint, *DATA, *at),
        ("search", "--target", 0.3, "--target", 0.6, "--policy", "dmt", *at),
        ("export", "--format", "onnx", "--target", 0.6, *at),
        ("verify", run / "bundle"),
        ("evaluate", *DATA, "--max-new-tokens", 2, "--bundle", run / "bundle", *at),
    )
    torch_model = open_model(ModelSpec(str(checkpoint), device="cpu"), run, 0.6)
    return Made(
        request.param, checkpoint, run, dict(zip(names, said, strict=True)), torch_model, OrtModel(run / "bundle", "cpu", 1)
    )


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    """Pictures of different shapes, two of them, none."""
    one, two, three = small_samples(3)
    wide = two.images[0].resize((96, 24))
    several = dataclasses.replace(three, images=(three.images[0], wide), question="Compare.")
    return [one, dataclasses.replace(two, images=(wide,), question="Add?"), several, dataclasses.replace(one, images=())]


def ask_torch(runtime: TorchRuntime, rule: Rule | None, asked: list[Sample]) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Greedy tokens [B, steps], logits [B, steps, V], and kept pairs by phase, layer and group."""
    batch, model = prompt_batch(runtime.loaded, asked), runtime.loaded.model
    with runtime.engine.using(rule=rule) as counts, torch.no_grad():
        out: Any = model.generate(  # type: ignore[operator]
            **batch.inputs, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, output_logits=True,
            return_dict_in_generate=True, suppress_tokens=[2],
        )  # fmt: skip
        kept = counts.kept.clone()
    return out.sequences[:, batch.inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1), kept


def feed_ort(model: OrtModel, asked: list[Sample], tokens: torch.Tensor, tau: Any) -> tuple[np.ndarray, np.ndarray]:
    """Logits [B, steps, V] when the given tokens are fed, and the kept pairs of the prefill."""
    state = model.prefilled(model.prompts([s.images for s in asked], [s.question for s in asked]), tau)
    found, kept = [state.logits[:, -1]], state.kept
    for token in tokens[:, :-1].T:
        model.next_token(state, token.numpy()[:, None], np.ones((len(asked), 1), np.int64), tau)
        found.append(state.logits[:, -1])
    return np.stack(found, 1), kept


def test_the_chain_by_command_lines(made: Made) -> None:
    said = made.said
    assert (said["profile"]["family"], said["profile"]["moe_layers"]) == ("internvl", LAYERS)
    assert (said["profile"]["experts"], said["profile"]["top_k"]) == (EXPERTS, TOP_K)
    assert said["profile"]["tokens"]["vision"] == 4 * 5 * 9  # samples, tiles, tokens per tile
    assert [result["target"] for result in said["search"]["results"]] == [0.3, 0.6]
    assert all(result["skip_ratio"] >= result["target"] - 0.01 for result in said["search"]["results"])
    assert said["verify"]["ok"]
    assert said["evaluate"]["skip_ratio"]["all"] == pytest.approx(0.6, abs=0.1)


@pytest.mark.parametrize("tau", [ZERO, None, {"text": 0.4, "vision": 0.3, "decode": 0.1}], ids=["all", "searched", "most"])
@pytest.mark.parametrize("which", [(0,), (0, 1), (2, 0), (3,)], ids=["one", "left padding", "several images", "no image"])
def test_the_same_logits_and_tokens(made: Made, samples: list[Sample], which: tuple[int, ...], tau: Any) -> None:
    """Prefill and decode steps, all far beyond the sliding window."""
    asked = [samples[i] for i in which]
    rule = made.torch.rule if tau is None else made.torch.rule.with_tau(tau)
    fed = None if tau is None else tau_vector(tau).numpy()
    tokens, logits, kept = ask_torch(made.torch, rule, asked)
    found, prefill = feed_ort(made.ort, asked, tokens, fed)
    np.testing.assert_allclose(found, logits.numpy(), atol=1e-4)
    np.testing.assert_array_equal(prefill, kept[0].numpy())
    assert float(logits.std()) > 0.5  # or the comparison would mean little
    prompts = made.ort.prompts([s.images for s in asked], [s.question for s in asked])
    assert prompts.input_ids.shape[1] > WINDOW
    answers = made.ort.answer(prompts, STEPS, fed)
    assert answers.tokens == made.torch.answer(asked, STEPS, rule).tokens


@pytest.mark.parametrize("target", [0.3, 0.6, None], ids=["0.3", "0.6", "nothing skipped"])
def test_answers_of_transformers(made: Made, target: float | None) -> None:
    """100 different questions, generated token by token, at both operating points; with nothing skipped, against the model that
    nothing was done to.
    """
    runtime = made.torch if target is None else open_model(ModelSpec(str(made.checkpoint), device="cpu"), made.run, target)
    plain = load(ModelSpec(str(made.checkpoint), device="cpu")) if target is None else None
    tau = NOTHING if target is None else runtime.rule.tau.numpy()
    skipped, answers = 0.0, []
    for asked in batches(varied(100)):
        prompts = made.ort.prompts([s.images for s in asked], [s.question for s in asked])
        found = made.ort.answer(prompts, STEPS, tau)
        with runtime.engine.using(rule=None if plain else runtime.rule):
            assert found.tokens == generated(plain or runtime.loaded, asked, STEPS)
        skipped, answers = max(skipped, found.skip_ratio["all"]), answers + found.tokens
    assert len(answers) == 100
    assert len({tuple(answer) for answer in answers}) > 15
    assert sum(map(len, answers)) > 5 * len(answers)
    assert (skipped > 0.2) == (target is not None)


def test_a_batch_with_and_without_images(made: Made, samples: list[Sample]) -> None:
    parts = [ask_torch(made.torch, made.torch.rule, [samples[i]])[:2] for i in (0, 3)]
    found, _ = feed_ort(made.ort, [samples[0], samples[3]], torch.cat([tokens for tokens, _ in parts]), None)
    np.testing.assert_allclose(found, torch.cat([logits for _, logits in parts]).numpy(), atol=1e-4)


def test_one_prompt_in_two_pieces(made: Made, samples: list[Sample]) -> None:
    """The window reaches from new tokens into the cache."""
    model = made.ort
    prompts = model.prompts([samples[0].images], [samples[0].question])
    features, (positions, _) = model.image_features(prompts.pixel_values, prompts.grids), model.positions(prompts)
    ids, mask = prompts.input_ids, prompts.attention_mask
    whole = model.prefilled(prompts, None)
    cut = int(np.flatnonzero(ids[0] == IMAGE)[20])
    state = model.empty_state(1)
    model.step(state, ids[:, :cut], mask[:, :cut], positions[:, :cut], features[:20], None)
    first = state.kept
    model.step(state, ids[:, cut:], mask[:, cut:], positions[:, cut:], features[20:], None)
    np.testing.assert_allclose(state.logits, whole.logits, atol=1e-4)
    np.testing.assert_array_equal(first + state.kept, whole.kept)


def test_nothing_skipped_is_the_unmodified_model_bit_for_bit(made: Made, samples: list[Sample]) -> None:
    loaded = made.torch.loaded
    plain = AutoModelForImageTextToText.from_pretrained(made.checkpoint).eval()
    inputs = prompt_batch(loaded, samples[:2]).inputs
    with torch.no_grad():
        expected = plain(**inputs).logits
        for rule in (made.torch.rule.with_tau(ZERO), made.torch.rule):
            with made.torch.engine.using(rule=rule):
                found = loaded.model(**inputs).logits
            assert torch.equal(found, expected) == (rule is not made.torch.rule)


def test_sinks_and_window_take_part(made: Made, samples: list[Sample]) -> None:
    """What is compared above would differ without them."""
    model: Any = made.torch.loaded.model
    text, inputs = model.model.language_model, prompt_batch(made.torch.loaded, samples[:1]).inputs
    sinks = [parameter for name, parameter in text.named_parameters() if name.endswith(".sinks")]
    assert len(sinks) == (LAYERS if made.text == "gpt_oss" else 0)
    if not sinks:
        return
    with torch.no_grad():
        expected = model(**inputs).logits
        text.config.sliding_window, before = 1000, text.config.sliding_window
        wide = model(**inputs).logits
        text.config.sliding_window = before
        kept = [parameter.clone() for parameter in sinks]
        for parameter in sinks:
            parameter.fill_(-1e4)
        without = model(**inputs).logits
        for parameter, value in zip(sinks, kept, strict=True):
            parameter.copy_(value)
        assert torch.equal(model(**inputs).logits, expected)
    assert float((wide - expected).abs().max()) > 0.05
    assert float((without - expected).abs().max()) > 0.05


def test_image_features(made: Made) -> None:
    pixels = torch.randn(3, 3, TILE, TILE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = made.torch.loaded.model.get_image_features(pixels).pooler_output.flatten(0, 1).numpy()  # type: ignore[operator]
    np.testing.assert_allclose(made.ort.image_features(pixels.numpy(), np.zeros((0, 0), np.int64)), expected, atol=1e-4)
    np.testing.assert_allclose(made.ort.vision.run(None, {"pixel_values": pixels.numpy()})[0], expected, atol=1e-4)


def test_tiles_of_another_size(made: Made, samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(made.ort.processor.image_processor, "size", {"height": 16, "width": 16})
    with pytest.raises(BadData, match="the vision graph takes"):
        made.ort.prompts([samples[0].images], ["?"])


def test_graphs(made: Made) -> None:
    gpt_oss = made.text == "gpt_oss"
    decoder = onnx.load(made.bundle / "decoder.onnx", load_external_data=False).graph
    experts = [node for node in decoder.node if node.op_type == "SkipExperts"]
    assert len(experts) == LAYERS
    for node in experts:
        settings = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert (settings["transposed"], settings["interleaved"]) == (gpt_oss, gpt_oss)
        assert settings["activation"] == (b"swiglu_oai" if gpt_oss else b"silu")
        assert (settings["alpha"], settings["limit"]) == pytest.approx((1.702, 7.0) if gpt_oss else (0, 0))
        assert sum(bool(name) for name in node.input) == (10 if gpt_oss else 8)
    assert sum(node.op_type == "Attention" for node in decoder.node) == LAYERS
    shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in decoder.input}
    assert shapes["position_ids"] == ["batch", "length"]
    assert shapes["inputs_embeds"] == ["batch", "length", HIDDEN]
    for name in ("decoder", "embedding", "vision"):
        graph = onnx.load(made.bundle / f"{name}.onnx", load_external_data=False).graph
        inline = [t for t in graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
        assert sum(t.ByteSize() for t in inline) < 10_000


def test_weights_are_those_in_memory(made: Made) -> None:
    """The hub's files have other names, and one tensor per expert and matrix below Qwen3-MoE."""
    index = json.loads((made.checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    one = "language_model.model.layers.1.mlp.experts."
    assert {"language_model.lm_head.weight", "vision_tower.embeddings.cls_token"} < index.keys()
    assert (f"{one}15.up_proj.weight" if made.text == "qwen3_moe" else f"{one}gate_up_proj_bias") in index
    assert len(set(index.values())) == 2
    stored: dict[str, torch.Tensor] = {}
    for path in made.bundle.glob("model-*.safetensors"):
        stored |= load_file(path)
    state = made.torch.loaded.model.state_dict()
    assert stored.keys() == state.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("text", TEXTS)
def test_bfloat16_through_the_api(tmp_path: Path, text: str, samples: list[Sample], one_thread: None) -> None:
    """Weights stay bfloat16; all is computed in float32, as PyTorch does with the checkpoint loaded so."""
    checkpoint, run = write_internvl(tmp_path / "checkpoint", text, torch.bfloat16, layers=1), tmp_path / "run"
    profile = profile_model(ProfileRequest(ModelSpec(str(checkpoint), device="cpu"), DataSpec("digits", None, 2, 0), run, 2))
    assert profile.artifact.tokens["vision"] == 2 * 5 * 9
    calibrate(calibration_request(checkpoint, run, samples=4))
    find_thresholds(search_request(run, 0.5, policy="dmt", passes=4))
    exported = export_bundle(ExportRequest(run))
    assert [check for check in verify_bundle(exported.path) if not check.ok] == []
    stored = load_file(exported.path / "model-00001-of-00001.safetensors")
    experts = {name: tensor for name, tensor in stored.items() if ".experts." in name}
    assert len(experts) == (4 if text == "gpt_oss" else 2)
    assert all(tensor.dtype == torch.bfloat16 for tensor in experts.values())
    assert INTERMEDIATE in {size for tensor in experts.values() for size in tensor.shape}
    ort, wide = OrtModel(exported.path, "cpu", 1), load(ModelSpec(str(exported.path), dtype="float32", device="cpu"))
    runtime = open_model(ModelSpec(str(exported.path), dtype="float32", device="cpu"), None)
    assert wide.info.dtype == runtime.loaded.info.dtype == "float32"
    tokens, logits, _ = ask_torch(runtime, runtime.rule, samples[:2])
    np.testing.assert_allclose(feed_ort(ort, samples[:2], tokens, None)[0], logits.numpy(), atol=1e-3)
    data = DataSpec("digits", None, 2, 0)
    answered = evaluate(EvaluateRequest(data, run, exported.path, batch_size=2, max_new_tokens=2, device="cpu"))
    assert answered.artifact.skip_ratio["all"] > 0.3


def test_generate_gives_the_same_in_both_runtimes(made: Made, samples: list[Sample], tmp_path: Path) -> None:
    samples[0].images[0].save(tmp_path / "a.png")
    request = GenerateRequest(made.bundle, (tmp_path / "a.png",), "How many digits?", max_new_tokens=STEPS, device="cpu")
    first, second = generate(request), generate(dataclasses.replace(request, runtime="torch"))
    assert (first.text, first.tokens) == (second.text, second.tokens)
    assert first.skip_ratio == pytest.approx(second.skip_ratio)
    assert first.skip_ratio["vision"] > 0.3
    asked = ("--image", tmp_path / "a.png", "--prompt", "How many digits?", "--max-new-tokens", STEPS)
    (said,) = commands(("generate", made.bundle, *asked))
    assert (said["text"], said["tokens"]) == (first.text, first.tokens)


def test_another_text_model_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    config = AutoConfig.for_model("internvl", text_config={"model_type": "mixtral"})
    with pytest.raises(UnknownLayout, match="`internvl` with text model `mixtral`"):
        family_of(config)


def test_processor_without_torchvision(tmp_path: Path, samples: list[Sample]) -> None:
    """Also where transformers 5 has written the video part into processor_config.json."""
    folder = write_internvl(tmp_path / "checkpoint", "qwen3_moe")
    before = load_processor(folder)
    path, video = folder / "processor_config.json", {"video_processor_type": "InternVLVideoProcessor"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"video_processor": video}))
    after = load_processor(folder)
    assert after.image_seq_length == before.image_seq_length == 9
    chat = [{"role": "user", "content": [{"type": "image", "image": samples[0].images[0]}, {"type": "text", "text": "?"}]}]
    made = [p.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt") for p in (before, after)]
    assert made[0]["pixel_values"].shape == (5, 3, TILE, TILE)
    assert all(torch.equal(made[0][name], made[1][name]) for name in ("input_ids", "pixel_values"))
    assert int((made[0]["input_ids"] == IMAGE).sum()) == 5 * 9
