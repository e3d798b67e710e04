"""Kimi-VL from the hub's files: the published structure's numbers, skipping, and the way to a bundle."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.kimi_k25.modeling_kimi_k25 import Kimi_K25VisionModel

from modes_cli.calibration import calibrate
from modes_cli.data.sample import DataSpec
from modes_cli.errors import BadModel
from modes_cli.export import export_bundle
from modes_cli.models.families.kimi_vl import KimiVLForConditionalGeneration
from modes_cli.models.families.kimi_vl_processing import KimiVLProcessor
from modes_cli.models.families.moonvit import MoonViTConfig
from modes_cli.models.groups import GROUPS, SPECIAL
from modes_cli.models.inputs import measuring_batch, prompt_batch
from modes_cli.models.loading import Loaded, load
from modes_cli.models.profiling import profile_model
from modes_cli.requests import ExportRequest, GenerateRequest, ModelSpec, ProfileRequest
from modes_cli.runtime.generate import generate
from modes_cli.search import find_thresholds
from modes_cli.skipping.engine import SkipEngine
from modes_cli.skipping.policy import Rule, tau_vector
from tests import checkpoint_kimi_vl as kimi
from tests.checkpoints import small_samples
from tests.models.kimi_vl_reference import Cache, Reference
from tests.runs import calibration_request, search_request

TOLERANCE = 1e-5
NEXT = (3, 88, 250)  # tokens after the prompt
Grids = tuple[tuple[int, int], ...]
ONE, TWO = ((4, 6),), ((4, 6), (10, 2))  # rows and columns of patches; the learned table has 8 of each
TAU = 0.24  # of shares that are 1/4 on average: skips about half


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    return kimi.write_kimi_vl(tmp_path_factory.mktemp("kimi-vl") / "checkpoint")


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Loaded:
    return load(ModelSpec(str(checkpoint), device="cpu"))


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    return Reference(checkpoint)


@pytest.fixture
def engine(loaded: Loaded) -> Iterator[SkipEngine]:
    engine = SkipEngine(loaded.model, loaded.blocks, loaded.tokens)
    yield engine
    engine.remove()


def prompt(grids: Grids) -> tuple[list[int], Tensor]:
    """Ids with an image between words, for each grid, and their pixels."""
    place, ids = kimi.token_ids()["<|media_pad|>"], [5, 9]
    for number, (rows, columns) in enumerate(grids):
        ids += [place] * (rows * columns // 4) + [30 + number, 44]
    patches = sum(rows * columns for rows, columns in grids)
    return ids, torch.randn(patches, 3, kimi.PATCH, kimi.PATCH, generator=torch.Generator().manual_seed(len(grids)))


@torch.no_grad()
def assert_same_logits(loaded: Loaded, reference: Reference, grids: Grids) -> None:
    """The prompt's logits, then those of further tokens with the cache."""
    ids, pixels = prompt(grids)
    cache: Cache = []
    expected = [reference.logits(ids, reference.image_features(pixels, grids), cache)]
    expected += [reference.logits([token], None, cache) for token in NEXT]
    out = loaded.model(input_ids=torch.tensor([ids]), pixel_values=pixels, image_grid_hws=torch.tensor(grids), use_cache=True)
    found = [out.logits[0]]
    for token in NEXT:
        out = loaded.model(input_ids=torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
        found.append(out.logits[0])
    assert expected[0].std() > 0.5  # a difference would show
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("grids", [ONE, TWO], ids=["one image", "two images"])
def test_logits_are_those_of_the_published_structure(loaded: Loaded, reference: Reference, grids: Grids) -> None:
    assert_same_logits(loaded, reference, grids)


@pytest.mark.parametrize("grids", [ONE, TWO], ids=["one image", "two images"])
def test_a_rule_leaves_out_the_published_structures_pairs(
    loaded: Loaded, reference: Reference, engine: SkipEngine, grids: Grids, monkeypatch: pytest.MonkeyPatch
) -> None:
    tau = {"text": TAU, "vision": TAU + 0.02}
    image = kimi.token_ids()["<|media_pad|>"]
    monkeypatch.setattr(reference, "keep", lambda token, pi: pi >= (tau["vision"] if token == image else tau["text"]))
    rule = Rule(torch.ones(len(loaded.blocks), len(GROUPS)), tau_vector(tau))
    with engine.using(rule=rule) as counts:
        assert_same_logits(loaded, reference, grids)
    assert 0.3 < 1 - float(counts.kept.sum() / counts.total.sum()) < 0.7
    tokens = len(prompt(grids)[0]) + len(NEXT)
    assert int(counts.total.sum()) == tokens * kimi.TOP_K * (kimi.LAYERS - kimi.DENSE_LAYERS)


def test_what_was_loaded(loaded: Loaded, checkpoint: Path) -> None:
    ids = kimi.token_ids()
    assert (loaded.family, loaded.info.dtype) == ("kimi_vl", "float32")
    assert [block.layer for block in loaded.blocks] == [1, 2, 3]
    assert {(block.num_experts, block.top_k, block.intermediate_size) for block in loaded.blocks} == {
        (kimi.EXPERTS, kimi.TOP_K, kimi.EXPERT_INTERMEDIATE)
    }
    assert loaded.tokens.vision_ids == (ids["<|media_pad|>"],)
    assert loaded.tokens.special_ids == tuple(sorted(set(ids.values()) - {ids["<|media_pad|>"]}))
    stored: dict[str, Tensor] = {}
    for path in checkpoint.glob("*.safetensors"):
        stored |= load_file(path)
    layer = "language_model.model.layers.2.mlp.experts"
    experts: Any = loaded.model.get_submodule(layer)
    for n in (0, kimi.EXPERTS - 1):
        both = torch.cat([stored[f"{layer}.{n}.gate_proj.weight"], stored[f"{layer}.{n}.up_proj.weight"]])
        assert torch.equal(experts.gate_up_proj[n], both)
        assert torch.equal(experts.down_proj[n], stored[f"{layer}.{n}.down_proj.weight"])
    # Every other tensor has the name that the files have.
    held = loaded.model.state_dict()
    stacked = {name for name in held if ".mlp.experts." in name}
    others = {name for name in stored if ".mlp.experts." not in name and not name.endswith("inv_freq")}
    assert set(held) - stacked == others
    assert all(torch.equal(held[name], stored[name]) for name in others)


def test_a_checkpoints_own_code_is_never_run(checkpoint: Path) -> None:
    """Its config.json names code, which is not even there."""
    assert "auto_map" in json.loads((checkpoint / "config.json").read_text())
    trusting = load(ModelSpec(str(checkpoint), device="cpu", trust_remote_code=True))
    assert type(trusting.model) is KimiVLForConditionalGeneration
    assert type(trusting.processor) is KimiVLProcessor


def test_bfloat16_keeps_the_routers_correction_in_float32(tmp_path: Path) -> None:
    model = load(ModelSpec(str(kimi.write_kimi_vl(tmp_path / "half", dtype=torch.bfloat16)), device="cpu")).model
    corrections = {name: value for name, value in model.state_dict().items() if name.endswith("e_score_correction_bias")}
    assert {value.dtype for value in corrections.values()} == {torch.float32}
    assert len(corrections) == 3
    assert {value.dtype for name, value in model.state_dict().items() if name not in corrections} == {torch.bfloat16}
    ids, pixels = prompt(TWO)
    with torch.no_grad():
        out = model(input_ids=torch.tensor([ids]), pixel_values=pixels, image_grid_hws=torch.tensor(TWO), logits_to_keep=2)
    assert out.logits.shape[:2] == (1, 2)
    assert bool(out.logits.isfinite().all())


def test_the_time_axis_of_kimi_k25_leaves_an_image_as_it_is(loaded: Loaded) -> None:
    """transformers' tower for videos, given the same weights, says the same of images."""
    tower: Any = loaded.model.get_submodule("vision_tower")
    theirs = Kimi_K25VisionModel._from_config(MoonViTConfig(**tower.config.to_dict()))
    state, heads = dict(tower.patch_embed.state_dict(prefix="patch_embed.")), kimi.VISION_HEADS
    state["patch_embed.pos_emb.position_embeddings"] = state.pop("patch_embed.pos_emb.weight")
    for n, block in enumerate(tower.encoder.blocks):
        for part in ("weight", "bias"):
            split = getattr(block.wqkv, part).unflatten(0, (3, heads, -1, 2)).unbind(0)
            for name, value in zip("qkv", split, strict=True):  # pairs beside each other -> first values, then second ones
                ordered = value if name == "v" else value.transpose(1, 2)
                state[f"layers.{n}.attn.{name}_proj.{part}"] = ordered.flatten(0, 2)
            state[f"layers.{n}.attn.proj.{part}"] = getattr(block.wo, part)
            for ours, name in (("norm0", "norm1"), ("norm1", "norm2"), ("mlp.fc0", "mlp.fc1"), ("mlp.fc1", "mlp.fc2")):
                state[f"layers.{n}.{name}.{part}"] = getattr(block.get_submodule(ours), part)
    state |= tower.encoder.final_layernorm.state_dict(prefix="final_layernorm.")
    theirs.load_state_dict(state)
    grid = torch.tensor(TWO)
    with torch.no_grad():
        expected = theirs.eval()(prompt(TWO)[1], torch.nn.functional.pad(grid, (1, 0), value=1)).pooler_output
        torch.testing.assert_close(tower(prompt(TWO)[1], grid), expected, rtol=0, atol=TOLERANCE)


def test_zero_thresholds_change_no_bit(loaded: Loaded, engine: SkipEngine) -> None:
    batch = prompt_batch(loaded, small_samples(3))
    rule = Rule(torch.ones(len(loaded.blocks), len(GROUPS)), torch.zeros(len(GROUPS)))
    with torch.no_grad():
        logits = loaded.model(**batch.inputs).logits
        text = loaded.model.generate(**batch.inputs, max_new_tokens=4, do_sample=False)
        with engine.using(rule=rule) as counts:
            assert torch.equal(loaded.model(**batch.inputs).logits, logits)
            assert torch.equal(loaded.model.generate(**batch.inputs, max_new_tokens=4, do_sample=False), text)
        assert torch.equal(counts.kept, counts.total)
        with engine.using(rule=Rule(rule.score_scale, tau_vector({"text": math.inf, "vision": math.inf}))) as counts:
            assert not torch.equal(loaded.model(**batch.inputs).logits, logits)
    kept = counts.kept.sum((0, 1))
    assert kept[:SPECIAL].tolist() == [0] * SPECIAL
    assert int(kept[SPECIAL]) > 0  # special tokens lose nothing


def test_a_batch_answers_as_its_samples_alone(loaded: Loaded) -> None:
    """Left padding, images of several samples packed together; with beams each of them sees its own image."""
    samples = small_samples(3)
    model: Any = loaded.model
    for beams in (1, 2):
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": beams}
        together = model.generate(**prompt_batch(loaded, samples).inputs, **options)[:, -4:]
        alone = [model.generate(**prompt_batch(loaded, [sample]).inputs, **options)[0, -4:] for sample in samples]
        assert torch.equal(together, torch.stack(alone))


def test_embeddings_in_place_of_ids_and_logits_of_some_positions(loaded: Loaded) -> None:
    batch = measuring_batch(loaded, small_samples(2)).inputs
    with torch.no_grad():
        whole = loaded.model(**batch).logits
        last = loaded.model(**batch, logits_to_keep=2).logits
        torch.testing.assert_close(last, whole[:, -2:], rtol=0, atol=TOLERANCE)
        ids = batch.pop("input_ids")
        embeds = loaded.model.get_input_embeddings()(ids)
        torch.testing.assert_close(loaded.model(inputs_embeds=embeds, **batch).logits, whole, rtol=0, atol=TOLERANCE)


def test_placeholders_and_image_tokens_have_to_be_as_many(loaded: Loaded) -> None:
    ids, pixels = prompt(ONE)
    with pytest.raises(ValueError, match="`7` image placeholders, the images have `6` tokens"):
        loaded.model(
            input_ids=torch.tensor([[*ids, loaded.tokens.vision_ids[0]]]),
            pixel_values=pixels,
            image_grid_hws=torch.tensor(ONE),
        )


@pytest.mark.parametrize(
    ("field", "value"), [("scoring_func", "softmax"), ("topk_method", "greedy"), ("moe_layer_freq", 2)], ids=str
)
def test_other_routing_is_refused(checkpoint: Path, tmp_path: Path, field: str, value: object) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"][field] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadModel, match=f"{field} `{value}`"):
        load(ModelSpec(str(folder)))


@pytest.mark.parametrize("lost", ["5.up_proj", "15."], ids=["one of an expert's tensors", "the last expert"])
def test_a_missing_expert_is_noticed(checkpoint: Path, tmp_path: Path, lost: str) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    names = {name for name in index["weight_map"] if name.startswith(f"language_model.model.layers.3.mlp.experts.{lost}")}
    for path in {folder / index["weight_map"].pop(name) for name in names}:
        save_file({name: value for name, value in load_file(path).items() if name not in names}, path, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert names
    with pytest.raises(BadModel, match="cannot be loaded"):
        load(ModelSpec(str(folder), device="cpu"))


def test_the_way_to_an_answer(checkpoint: Path, tmp_path: Path) -> None:
    """profile, calibrate, search, export --format safetensors, generate."""
    run = tmp_path / "run"
    spec = ModelSpec(str(checkpoint), device="cpu")
    profile = profile_model(ProfileRequest(spec, DataSpec("digits", None, 4, 0), run)).artifact
    assert (profile.family, profile.moe_layers, profile.experts, profile.top_k) == ("kimi_vl", 3, kimi.EXPERTS, kimi.TOP_K)
    assert profile.tokens["vision"] == 4 * 4  # four images of 2 x 2 tokens

    calibration = calibrate(calibration_request(checkpoint, run, samples=8, batch_size=4)).artifact
    assert set(calibration.importance) == {"1", "2", "3"}
    assert calibration.forward_equivalents < calibration.naive_forwards
    found = find_thresholds(search_request(run, 0.5, policy="dmt", passes=4)).artifact.results[0]
    assert 0.5 <= found.skip_ratio < 0.6

    exported = export_bundle(ExportRequest(run, format="safetensors"))
    picture = tmp_path / "picture.png"
    sample = small_samples(1)[0]
    sample.images[0].save(picture)
    answer = generate(GenerateRequest(exported.path, (picture,), sample.question, "torch", None, 4, "cpu"))
    unskipped = generate(GenerateRequest(exported.path, (picture,), sample.question, "torch", {"text": 0, "vision": 0}, 4))
    assert 0.2 < answer.skip_ratio["all"] < 0.8
    assert unskipped.skip_ratio["all"] == 0

    # The bundle holds the checkpoint's values, stacked, under the same names.
    bundle, original = (load(ModelSpec(str(path), device="cpu")).model.state_dict() for path in (exported.path, checkpoint))
    assert bundle.keys() == original.keys()
    assert all(torch.equal(bundle[name], original[name]) for name in bundle)
