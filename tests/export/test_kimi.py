"""Kimi-K2.5 and Kimi-VL through the whole chain, from files as the hub has them to text from ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modes_cli.calibration import calibrate
from modes_cli.data.sample import DataSpec, Sample
from modes_cli.errors import BadModel, UnknownLayout
from modes_cli.export import export_bundle
from modes_cli.export.conversion import in_memory
from modes_cli.export.families import moonvit
from modes_cli.export.skeleton import build
from modes_cli.export.verify import verify_bundle
from modes_cli.models.inputs import prompt_batch
from modes_cli.models.kimi_processor import fit
from modes_cli.models.loading import Loaded, load
from modes_cli.models.processor import load_processor
from modes_cli.models.profiling import profile_model
from modes_cli.requests import ExportRequest, ModelSpec, ProfileRequest
from modes_cli.runtime.ort_model import OrtModel
from modes_cli.safetensors_header import Entry
from modes_cli.search import find_thresholds
from modes_cli.skipping.engine import SkipEngine
from modes_cli.skipping.policy import Rule, tau_vector
from tests import checkpoint_kimi_k25 as k25
from tests import checkpoint_kimi_vl as vl
from tests.checkpoint_kimi_k25 import write_kimi_k25
from tests.checkpoint_kimi_vl import write_kimi_vl
from tests.export.generation import batches, generated, varied
from tests.runs import calibration_request, search_request
from tests.runtime.test_session import picture, run_ort, sample

FAMILIES = ("kimi_k25", "kimi_vl")
BATCHES = {
    "two images of different sizes, left padding": [
        sample("What is at the top left of the first?", picture(48, 48, 1), picture(24, 40, 2)),
        sample("Add?", picture(40, 32, 3)),
    ],
    "no image": [sample("Read the top row.")],
}
NEVER = {"text": 0.0, "vision": 0.0}
STEPS = 10


@dataclass(frozen=True)
class Case:
    """A checkpoint taken through the chain, in both runtimes."""

    family: str
    checkpoint: Path
    bundle: Path
    loaded: Loaded
    engine: SkipEngine
    ort: OrtModel

    @property
    def rule(self) -> Rule:
        return self.engine.rule


def write(family: str, folder: Path, **options: Any) -> Path:
    return write_kimi_k25(folder, **options) if family == "kimi_k25" else write_kimi_vl(folder, **options)


def chain(folder: Path, checkpoint: Path) -> Path:
    """The bundle at the end of it."""
    run, spec = folder / "run", ModelSpec(str(checkpoint), device="cpu")
    profile = profile_model(ProfileRequest(spec, DataSpec("digits", None, 4, 0), run)).artifact
    assert (profile.family, profile.experts, profile.top_k) == (checkpoint.name, 16, 4)
    calibrate(calibration_request(checkpoint, run, samples=6, batch_size=3))
    find_thresholds(search_request(run, 0.6, policy="dmt", passes=10))
    return export_bundle(ExportRequest(run, target=0.6)).path


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = write(request.param, folder / request.param)
    bundle = chain(folder, checkpoint)
    loaded, ort = load(ModelSpec(str(checkpoint), device="cpu")), OrtModel(bundle, threads=1)
    scale = torch.from_numpy(np.array(_scores(bundle)))
    engine = SkipEngine(loaded.model, loaded.blocks, loaded.tokens)
    engine.rule = Rule(scale, tau_vector(ort.bundle.tau))
    yield Case(request.param, checkpoint, bundle, loaded, engine, ort)
    engine.remove()


def _scores(bundle: Path) -> Any:
    from modes_cli.export.integrity import read_bundle
    from modes_cli.export.thresholds import read_rule

    return read_rule(bundle, read_bundle(bundle)).score_scale.numpy()


def ask_torch(loaded: Loaded, samples: list[Sample], steps: int) -> tuple[Tensor, Tensor]:
    """Greedy tokens [B, steps] and the logits of each step [B, steps, V], without stopping."""
    batch = prompt_batch(loaded, samples)
    with torch.no_grad():
        out = loaded.model.generate(
            **batch.inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    return out.sequences[:, batch.inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1)


# -- the bundle ---------------------------------------------------------------------------------------------------------


def test_verified(case: Case) -> None:
    checks = verify_bundle(case.bundle)
    assert [check.name for check in checks if not check.ok] == []
    assert {check.name for check in checks} >= {"weights", "decoder.onnx", "embedding.onnx", "vision.onnx", "session"}


def test_weights_are_what_transformers_loads(case: Case) -> None:
    """Renamed, stacked and, for Kimi-K2.5, query, key and value taken apart with the rows of the rotation moved."""
    bundled = load(ModelSpec(str(case.bundle), device="cpu")).model.state_dict()
    expected = case.loaded.model.state_dict()
    assert bundled.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(bundled[name], tensor), name


def test_one_latent_per_token(case: Case) -> None:
    decoder = case.ort.bundle.decoder
    latent, rope = (k25.LATENT, k25.ROPE) if case.family == "kimi_k25" else (vl.LATENT, vl.ROPE)
    assert (decoder.kv_heads, decoder.head_dim, decoder.value_dim) == (1, latent, rope)
    graph = onnx.load(case.bundle / "decoder.onnx", load_external_data=False).graph
    shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.input, *graph.output)}
    assert shapes["past_key_values.1.key"] == ["batch", 1, "past", latent]
    assert shapes["present.1.value"] == ["batch", 1, "total", rope]
    assert sum(node.op_type == "SkipExperts" for node in graph.node) == decoder.layers - 1  # the first layer is dense
    assert sum(node.op_type == "Attention" for node in graph.node) == decoder.layers


# -- in ONNX Runtime ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [[[12, 12]], [[2, 2]], [[4, 6], [4, 4], [2, 10]]])
def test_pictures(case: Case, grid: list[list[int]]) -> None:
    rows = torch.tensor(grid)
    side = case.loaded.model.config.vision_config.patch_size
    pixels = torch.randn(int(rows.prod(-1).sum()), 3, side, side, generator=torch.Generator().manual_seed(0))
    name, sizes = ("image_grid_thw", F.pad(rows, (1, 0), value=1)) if case.family == "kimi_k25" else ("image_grid_hws", rows)
    owner = case.loaded.model.model if case.family == "kimi_k25" else case.loaded.model
    with torch.no_grad():
        expected = torch.cat(owner.get_image_features(pixels, sizes).pooler_output).numpy()
    found = case.ort.vision.run(None, {"pixel_values": pixels.numpy(), name: sizes.numpy()})[0]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert expected.std() > 0.3
    np.testing.assert_allclose(case.ort.image_features(pixels.numpy(), sizes.numpy()), expected, atol=1e-4)


def test_clips(case: Case) -> None:
    """Kimi-K2.5: frames attend to each other and carry their time, and a token is the mean over them."""
    if case.family == "kimi_vl":
        assert [value.shape for value in case.ort.vision.get_inputs()][1] == ["images", 2]  # it has no time axis
        return
    grid = torch.tensor([[2, 4, 4], [1, 2, 6], [4, 2, 2], [3, 6, 2]])
    pixels = torch.randn(int(grid.prod(-1).sum()), 3, 4, 4, generator=torch.Generator().manual_seed(0))
    model = case.loaded.model.model
    with torch.no_grad():  # one by one: transformers stacks clips of one length only
        each = [model.vision_tower(p, g[None]) for p, g in zip(pixels.split(grid.prod(-1).tolist()), grid, strict=True)]
        expected = torch.cat([model.mm_projector(out.pooler_output).squeeze(1) for out in each]).numpy()
    found = case.ort.vision.run(None, {"pixel_values": pixels.numpy(), "image_grid_thw": grid.numpy()})[0]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(case.ort.image_features(pixels.numpy(), grid.numpy()), expected, atol=1e-4)


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("tau", ["searched", "nothing skipped"])
def test_logits_and_kept_pairs(case: Case, name: str, tau: str) -> None:
    before = case.engine.rule
    thresholds = dict(case.ort.bundle.tau) if tau == "searched" else NEVER
    case.engine.rule = before.with_tau(thresholds)
    case.engine.counts.reset()
    try:
        tokens, logits = ask_torch(case.loaded, BATCHES[name], 5)
        kept, ratio = case.engine.counts.kept.numpy().copy(), case.engine.counts.skip_ratio()
    finally:
        case.engine.rule = before
    found, prefill, decode = run_ort(case.ort, BATCHES[name], tokens, None if tau == "searched" else thresholds)
    np.testing.assert_allclose(found, logits.numpy(), atol=1e-4)
    assert float(logits.std()) > 0.3  # or the comparison would mean little
    np.testing.assert_array_equal(found.argmax(-1), tokens.numpy())
    np.testing.assert_array_equal(prefill, kept[0])
    np.testing.assert_array_equal(decode, kept[1])
    if tau != "searched":
        assert ratio == 0
    elif name != "no image":  # the threshold of text may be 0: then text alone keeps everything
        assert 0.2 < ratio < 0.9


def test_generates_the_same_text(case: Case) -> None:
    samples = BATCHES["two images of different sizes, left padding"]
    tokens, _ = ask_torch(case.loaded, samples, 6)
    ends = case.ort.bundle.eos_token_ids
    answers = case.ort.generate([s.images for s in samples], [s.question for s in samples], 6)
    for found, expected in zip(answers.tokens, tokens.tolist(), strict=True):
        assert found == expected[: next((i for i, token in enumerate(expected) if token in ends), 6)]
    assert 0.2 < answers.skip_ratio["all"] < 0.9


@pytest.mark.parametrize("share", [0.8, 1, 0], ids=["fewer", "searched", "nothing skipped"])
def test_answers_of_transformers(case: Case, share: float) -> None:
    """100 different questions, generated token by token, at two operating points; with nothing skipped, against the model that
    nothing was done to.
    """
    tau = {group: share * value for group, value in case.ort.bundle.tau.items()}
    plain = None if share else load(ModelSpec(str(case.checkpoint), device="cpu"))
    rule = case.rule.with_tau(tau)
    ratios, answers = [], []
    for asked in batches(varied(100)):
        found = case.ort.generate([s.images for s in asked], [s.question for s in asked], STEPS, tau)
        with case.engine.using(rule=rule):
            assert found.tokens == generated(plain or case.loaded, asked, STEPS)
        ratios.append(found.skip_ratio["all"])
        answers += found.tokens
    assert len(answers) == 100
    assert len({tuple(answer) for answer in answers}) > 15
    assert sum(map(len, answers)) > 5 * len(answers)
    assert (max(ratios) > 0.1) == (share > 0), ratios


def test_a_placeholder_without_an_image(case: Case) -> None:
    """One that was generated: transformers looks up token 0 for Kimi-K2.5, the placeholder itself for Kimi-VL."""
    features = np.zeros((0, 64), np.float32)
    image = case.ort.bundle.vision_token_ids[-1]
    found = case.ort.embedding.run(None, {"input_ids": np.array([[9, image]]), "image_features": features})[0]
    table = case.loaded.model.get_input_embeddings().weight
    np.testing.assert_array_equal(found[0], table[[9, 0 if case.family == "kimi_k25" else image]].detach().numpy())


# -- in PyTorch ---------------------------------------------------------------------------------------------------------


def test_nothing_skipped_is_the_unmodified_model(case: Case) -> None:
    samples, before = BATCHES["two images of different sizes, left padding"], case.engine.rule
    case.engine.rule = before.with_tau(NEVER)
    try:
        skipping = ask_torch(case.loaded, samples, 4)
    finally:
        case.engine.rule = before
    plain = ask_torch(load(ModelSpec(str(case.checkpoint), device="cpu")), samples, 4)
    assert torch.equal(skipping[0], plain[0])
    assert torch.equal(skipping[1], plain[1])


# -- parts --------------------------------------------------------------------------------------------------------------


def test_bfloat16_weights(tmp_path: Path) -> None:
    """Both computed in float32 from bfloat16 weights; a dense layer and one with experts."""
    checkpoint = write_kimi_k25(tmp_path / "kimi_k25", dtype=torch.bfloat16, layers=2)
    bundle = chain(tmp_path, checkpoint)
    loaded, ort = load(ModelSpec(str(checkpoint), dtype="float32", device="cpu")), OrtModel(bundle, threads=1)
    assert ort.bundle.model.dtype == "bfloat16"
    engine = SkipEngine(loaded.model, loaded.blocks, loaded.tokens)
    engine.rule = Rule(torch.from_numpy(np.array(_scores(bundle))), tau_vector(ort.bundle.tau))
    samples = BATCHES["two images of different sizes, left padding"]
    tokens, logits = ask_torch(loaded, samples, 3)
    found, _, _ = run_ort(ort, samples, tokens, None)
    np.testing.assert_allclose(found, logits.numpy(), atol=1e-3)
    np.testing.assert_array_equal(found.argmax(-1), tokens.numpy())


@pytest.mark.parametrize(
    ("size", "fitted", "whole"),
    [
        ((48, 48), (48, 48), (48, 48)),
        ((45, 30), (45, 30), (48, 32)),  # only padded
        ((60, 44), (56, 41), (56, 48)),  # 165 patches, 144 are allowed
        ((4, 400), (1, 64), (8, 64)),  # 100 patches on a side, 16 are allowed
    ],
)
def test_sizes_of_images(size: tuple[int, int], fitted: tuple[int, int], whole: tuple[int, int]) -> None:
    assert fit(*size, patch_size=4, merge_size=2, max_patches=144, max_side=16) == (fitted, whole)


def test_images_become_patches(tmp_path: Path) -> None:
    k25.write_processor(tmp_path)
    (tmp_path / "config.json").write_text(k25.kimi_config().to_json_string())
    processor = load_processor(tmp_path)
    image = picture(30, 45, 0)
    found = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "Add?"}]}],
        tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    assert found["image_grid_thw"].tolist() == [[1, 12, 8]]
    assert int((found["input_ids"] == k25.IMAGE).sum()) == 24
    whole = found["pixel_values"].reshape(12, 8, 3, 4, 4).permute(0, 3, 1, 4, 2).reshape(48, 32, 3)
    expected = torch.full((48, 32, 3), -1.0)
    expected[:45, :30] = torch.from_numpy(np.asarray(image) / 127.5 - 1)
    torch.testing.assert_close(whole, expected, atol=1e-5, rtol=0)


def test_image_settings_that_are_not_understood(tmp_path: Path) -> None:
    k25.write_processor(tmp_path)
    (tmp_path / "config.json").write_text(k25.kimi_config().to_json_string())
    settings = tmp_path / "preprocessor_config.json"
    settings.write_text(settings.read_text().replace('"fixed_output_tokens": null', '"fixed_output_tokens": 64'))
    with pytest.raises(BadModel, match="fixed_output_tokens `64`"):
        load_processor(tmp_path)


@pytest.mark.parametrize("size", [(8, 8), (3, 5), (20, 1), (13, 40)])
def test_resampling_is_that_of_torch(size: tuple[int, int]) -> None:
    table = torch.randn(8, 8, 6, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(table.permute(2, 0, 1)[None], size, mode="bicubic")[0].flatten(1).T
    grid = torch.tensor([[1, 2, 2], [2, *size]])
    found = moonvit.resampled(table, moonvit.places(grid, int(grid.prod(-1).sum())))
    rows = size[0] * size[1]
    torch.testing.assert_close(found[4 : 4 + rows], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found[4 + rows :], expected, atol=1e-5, rtol=0)  # the second frame


def test_only_squares_are_merged() -> None:
    with pytest.raises(UnknownLayout, match="`2` x `3`"):
        moonvit.square((2, 3))


def test_a_tensor_under_two_names(tmp_path: Path) -> None:
    config = k25.kimi_config()
    _, model = build(config)

    def entry(name: str, *shape: int) -> dict[str, Entry]:
        return {name: Entry(tmp_path / "a", name, "F32", shape, 0, 4)}

    whole, parts = in_memory(entry("vision_tower.encoder.blocks.0.wqkv.bias", 96), model)
    assert not whole
    assert sorted(parts) == [f"model.vision_tower.layers.0.attn.{part}_proj.bias" for part in "kqv"]
    twice = entry("language_model.lm_head.weight", 416, 64) | entry("lm_head.weight", 416, 64)
    with pytest.raises(UnknownLayout, match=r"`lm_head\.weight` twice"):
        in_memory(twice, model)
