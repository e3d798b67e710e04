"""Further families from checkpoints in the hub's layout, taken through all steps, and what is skipped in them."""

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from modes_cli.app import run as run_command
from modes_cli.artifacts import Bundle, Calibration, Profile, Thresholds
from modes_cli.calibration import calibrate
from modes_cli.calibration.calibrate import COLUMNS
from modes_cli.calibration.replay import Replay, answer_logits
from modes_cli.errors import BadModel
from modes_cli.export import export_bundle
from modes_cli.export.families import FAMILIES as GRAPHS
from modes_cli.models import known
from modes_cli.models.groups import AUDIO, DECODE, GROUPS, SPECIAL, TEXT, VISION
from modes_cli.models.inputs import Batch, measuring_batch, prompt_batch
from modes_cli.models.loading import Loaded, load
from modes_cli.models.profiling import profile_model
from modes_cli.requests import ExportRequest, ModelSpec, ProfileRequest
from modes_cli.runtime.torch_model import TorchRuntime, open_model
from modes_cli.search import find_thresholds
from modes_cli.skipping.engine import SkipEngine
from modes_cli.skipping.policy import Rule, tau_vector
from modes_cli.skipping.routing import Drop, Routing
from tests.checkpoint_families import EXPERTS, FAMILIES, FIRST_NEW, IMAGE, SquareImages, write_family
from tests.checkpoints import reference_config, small_samples
from tests.families import spread
from tests.runs import calibration_request, search_request
from tests.skipping import reference

TARGET = 0.5
LAYERS = {"glm4v_moe": [1, 2, 3], "ernie4_5_vl_moe": [1, 2, 3], "llama4": [1, 3]}  # MoE layers; all four in the others
TOP_K = {"llama4": 1}
TAU = {"llama4": (0.8, 0.85)}  # a sigmoid, not a share

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # transformers' processors turn tensors into arrays in a way that NumPy 2 wants otherwise.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


@dataclass(frozen=True)
class Run:
    checkpoint: Path
    path: Path
    profile: Profile
    calibration: Calibration
    thresholds: Thresholds
    bundle: Bundle
    exported: Path


@pytest.fixture(scope="module", autouse=True)
def _stand_in() -> Iterator[None]:
    """Llama 4's own image processor needs torchvision; every other family has its real processor."""
    with pytest.MonkeyPatch.context() as patch:
        for place in ("modes_cli.models.loading", "modes_cli.export.plan"):
            module = __import__(place, fromlist=["load_processor"])
            patch.setattr(module, "load_processor", _processor_loader(module.load_processor))
        yield


def _processor_loader(real: Any) -> Any:
    def load_processor(folder: Path, **options: Any) -> Any:
        llama4 = '"llama4"' in (folder / "config.json").read_text("utf-8")
        return SquareImages(folder) if llama4 else real(folder, **options)

    return load_processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module")
def run_of(folder: Path) -> Any:
    """`run_of(family)`: all steps, done once."""

    @cache
    def run_of(family: str) -> Run:
        checkpoint, run = write_family(folder / family, family), folder / f"{family}-run"
        request = calibration_request(checkpoint, run, samples=4, batch_size=2)
        profile = profile_model(ProfileRequest(request.model, request.data, run, 2)).artifact
        calibration = calibrate(request).artifact
        thresholds = find_thresholds(search_request(run, TARGET, policy="dmt", passes=4)).artifact
        exported = export_bundle(ExportRequest(run, format="safetensors"))
        return Run(checkpoint, run, profile, calibration, thresholds, exported.bundle, exported.path)

    return run_of


@pytest.fixture(scope="module")
def loaded_of(run_of: Any) -> Any:
    """`loaded_of(family)`: the checkpoint in memory; whoever installs an engine removes it."""
    return cache(lambda family: load(ModelSpec(str(run_of(family).checkpoint), device="cpu")))


@contextmanager
def engine_of(loaded: Loaded) -> Iterator[SkipEngine]:
    engine = SkipEngine(loaded.model, loaded.blocks, loaded.tokens)
    try:
        yield engine
    finally:
        engine.remove()


def rule(loaded: Loaded, text: float, vision: float, **others: float) -> Rule:
    return Rule(torch.ones(len(loaded.blocks), len(GROUPS)), tau_vector({"text": text, "vision": vision, **others}))


def batch_of(loaded: Loaded) -> Batch:
    """Two questions of different length, so that one is padded."""
    first, second = small_samples(2)
    batch = measuring_batch(loaded, [first, replace(second, question=f"{second.question} Say it.")])
    assert not batch.inputs["attention_mask"].all()
    return batch


@torch.no_grad()
def logits_and_text(loaded: Loaded) -> tuple[Tensor, list[list[int]]]:
    model: Any = loaded.model
    prompts = prompt_batch(loaded, small_samples(2)).inputs
    text = model.generate(**prompts, max_new_tokens=4, do_sample=False).tolist()
    return model(**batch_of(loaded).inputs).logits, text


# -- the whole way ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_from_the_hubs_files_to_an_answer(family: str, run_of: Any, loaded_of: Any) -> None:
    run: Run = run_of(family)
    loaded: Loaded = loaded_of(family)
    layers = LAYERS.get(family, [0, 1, 2, 3])
    assert [layer.layer for layer in run.profile.layers] == [int(layer) for layer in run.calibration.importance] == layers
    assert (run.profile.experts, run.profile.top_k) == (EXPERTS, TOP_K.get(family, 4))
    assert run.profile.expert_parameters == sum(
        p.numel() for name, p in loaded.model.named_parameters() if re.search(r"\.experts\.(gate_up|down)_proj$", name)
    )
    for column, _ in COLUMNS:
        assert sum(getattr(layer, column) for layer in run.calibration.importance.values()) == pytest.approx(1)
    tokens = dict(run.calibration.tokens)  # which knows where the answers are; a profile does not
    assert tokens.pop("audio", 0) == 0
    assert min(tokens.values()) > 0
    tokens["text"] += tokens.pop("decode")
    assert tokens == run.profile.tokens
    (result,) = run.thresholds.results
    assert TARGET <= result.skip_ratio < 0.6
    assert run.bundle.family == run.calibration.family == loaded.family
    bundled = open_model(ModelSpec(str(run.exported), device="cpu"), None)
    state, own = bundled.loaded.model.state_dict(), loaded.model.state_dict()
    assert state.keys() == own.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in own.items())
    answers, expected = answered(bundled), answered(open_model(ModelSpec(str(run.checkpoint), device="cpu"), run.path))
    assert answers == expected
    assert 0 < answers[1]["all"] < 1


def answered(runtime: TorchRuntime) -> tuple[list[list[int]], dict[str, float]]:
    samples = small_samples(2)
    answers = runtime.generate([list(s.images) for s in samples], [s.question for s in samples], 4, None)
    runtime.engine.remove()
    return answers.tokens, answers.skip_ratio


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_those_that_were_written(family: str, loaded_of: Any) -> None:
    """Every tensor of the model came from the files, at its place: experts, routers, biases."""
    torch.manual_seed(0)
    written = spread(FAMILIES[family]().made(), 0).state_dict()
    found = loaded_of(family).model.state_dict()
    assert written.keys() == found.keys()
    others = [name for name, tensor in written.items() if not torch.equal(tensor, found[name])]
    assert all("e_score_correction_bias" in name for name in others)  # drawn after that, the same in both sets but reversed
    for name in others:
        if "text_moe" in name:
            assert torch.equal(found[name].flip(-1), found[name.replace("text_moe", "vision_moe")])
            assert found[name].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_read_while_they_run(family: str, run_of: Any, loaded_of: Any) -> None:
    loaded: Loaded = loaded_of(family)
    streamed = load(ModelSpec(str(run_of(family).checkpoint), device="cpu", offload=True))
    batch, tau, found = batch_of(loaded), TAU.get(family, (0.2, 0.3)), []
    for each in (loaded, streamed):
        with engine_of(each) as engine, engine.using(rule=rule(each, *tau)) as counts:
            found.append((answer_logits(each.model, batch), counts.kept.clone()))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert int(found[0][1].sum()) > 0


# -- what is skipped ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_thresholds_change_no_bit(family: str, loaded_of: Any) -> None:
    loaded: Loaded = loaded_of(family)
    logits, text = logits_and_text(loaded)
    with engine_of(loaded) as engine, engine.using(rule=rule(loaded, 0.0, 0.0)) as counts:
        skipping_logits, skipping_text = logits_and_text(loaded)
        assert int(counts.total.sum()) > 0
        assert torch.equal(counts.kept, counts.total)
    assert torch.equal(skipping_logits, logits)
    assert skipping_text == text
    again, _ = logits_and_text(loaded)
    assert torch.equal(again, logits)  # the engine left nothing behind


def groups_of(loaded: Loaded, batch: Batch) -> Tensor:
    """(B * S,) int32, token by token; the last one of each row is `decode`."""
    return reference.groups(loaded.tokens, batch.inputs["input_ids"], batch.inputs["attention_mask"])


def silence(loaded: Loaded, batch: Batch, group: int) -> list[Any]:
    """Hooks that set what routed experts give for one group's tokens to 0; nothing of the engine is used."""
    groups = groups_of(loaded, batch)
    types = batch.inputs.get("moe_mm_token_type_ids")

    def hook(name: str) -> Any:
        def zero(_module: Any, _args: Any, output: Tensor) -> Tensor:
            here = groups
            if types is not None:  # two sets of experts, each sees its own rows
                here = groups[types.reshape(-1).bool() == ("vision_moe" in name)]
            here = here.repeat(output.shape[0] // here.numel())  # one copy of all tokens for each expert
            return output.masked_fill((here == group)[:, None], 0)

        return zero

    return [
        module.register_forward_hook(hook(name))
        for name, module in loaded.model.named_modules()
        if name.endswith(".experts") and ".layers." in name
    ]


@torch.no_grad()
@pytest.mark.parametrize("group", [TEXT, VISION])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_groups_threshold_hits_exactly_its_tokens(family: str, group: int, loaded_of: Any) -> None:
    loaded: Loaded = loaded_of(family)
    batch = batch_of(loaded)
    model: Any = loaded.model
    hooks = silence(loaded, batch, group)
    assert len(hooks) == sum(len(block.sets) for block in loaded.blocks)
    expected = model(**batch.inputs).logits
    for handle in hooks:
        handle.remove()
    plain = model(**batch.inputs).logits
    thresholds = (math.inf, 0.0) if group == TEXT else (0.0, math.inf)
    with engine_of(loaded) as engine, engine.using(rule=rule(loaded, *thresholds, decode=0.0)) as counts:
        found = model(**batch.inputs).logits
        kept, total = counts.kept.sum(0), counts.total.sum(0)
    real = batch.inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], atol=2e-4, rtol=1e-3)
    assert not torch.allclose(expected[real], plain[real], atol=1e-2)
    tokens = groups_of(loaded, batch)[real.reshape(-1)]
    assert int((tokens == DECODE).sum()) == len(real) - int((tokens[real.sum(1).cumsum(0) - 1] == SPECIAL).sum())
    for g in range(len(GROUPS)):  # special tokens count and keep theirs; padding is in neither
        assert total[:, g].tolist() == [int((tokens == g).sum()) * TOP_K.get(family, 4)] * len(loaded.blocks)
        assert torch.equal(kept[:, g], torch.zeros_like(total[:, g]) if g == group else total[:, g])


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_kept_pairs_are_those_of_the_rule(family: str, loaded_of: Any) -> None:
    loaded: Loaded = loaded_of(family)
    seen: list[Routing] = []
    batch, taus = batch_of(loaded), TAU.get(family, (0.25, 0.3))
    with engine_of(loaded) as engine, engine.using(rule=rule(loaded, *taus), watch=seen.append) as counts:
        loaded.model(**batch.inputs)
        found = counts.kept.sum(0)
    expected = torch.zeros_like(found)
    for routing in seen:
        tau = tau_vector({"text": taus[0], "vision": taus[1]})[routing.group.long()]
        for g in range(len(GROUPS)):
            expected[routing.layer, g] += int((routing.pi >= tau[:, None])[routing.group == g].sum())
    assert torch.equal(found, expected)
    assert 0 < int(found.sum()) < TOP_K.get(family, 4) * int(batch.inputs["attention_mask"].sum()) * len(loaded.blocks)


# -- importance --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_replay_gives_the_bits_of_whole_forwards(family: str, loaded_of: Any) -> None:
    """Also through layers of linear attention: what comes before the start hands its input through."""
    loaded: Loaded = loaded_of(family)
    batch = batch_of(loaded)
    expected = {}
    with engine_of(loaded) as engine:
        for block in loaded.blocks:
            for _, groups in COLUMNS:
                with engine.using(drop=Drop(block.index, groups)):
                    expected[block.index, groups] = answer_logits(loaded.model, batch)
    with engine_of(loaded) as engine, Replay(loaded.model, loaded.blocks) as replay:
        replay.record(batch)
        replay.check(batch)
        assert replay._whole == set()
        for block in loaded.blocks:
            before = replay.layers_run
            for _, groups in COLUMNS:
                with engine.using(drop=Drop(block.index, groups)):
                    assert torch.equal(replay.run(batch, block.layer), expected[block.index, groups])
            assert replay.layers_run - before == len(COLUMNS) * (replay.layers - block.layer)


@pytest.mark.parametrize("shared", [(0, 2), (1, 3)])
def test_layers_that_share_more_than_hidden_states_run_whole(shared: tuple[int, int], loaded_of: Any) -> None:
    """A later layer takes what an earlier one left in this forward, as with shared keys and values."""
    loaded: Loaded = loaded_of("qwen3_5_moe")
    batch, layers, left = batch_of(loaded), loaded.model.get_decoder().layers, list[Tensor]()
    giver, taker = (layers[i].mlp for i in shared)
    hooks = [
        giver.register_forward_hook(lambda _m, _a, out: left.append(out)),
        taker.register_forward_hook(lambda _m, _a, out: out + left.pop()),
    ]
    try:
        with engine_of(loaded) as engine, Replay(loaded.model, loaded.blocks) as replay:
            recorded = replay.record(batch)
            replay.check(batch)
            assert replay._whole == set(range(shared[0] + 1, shared[1] + 1))
            assert replay.layers_run == replay.layers  # the check is not part of any measurement
            for block in loaded.blocks:
                left.clear()
                assert torch.equal(replay.run(batch, block.layer), recorded)
                with engine.using(drop=Drop(block.index)):
                    left.clear()
                    found = replay.run(batch, block.layer)
                with engine.using(drop=Drop(block.index)):
                    left.clear()
                    assert torch.equal(found, replay.run(batch, 0))
                assert not torch.equal(found, recorded)
    finally:
        for handle in hooks:
            handle.remove()


# -- one by one --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_ernies_sets_see_their_own_rows_and_count_as_one_layer(loaded_of: Any) -> None:
    loaded: Loaded = loaded_of("ernie4_5_vl_moe")
    assert [len(block.sets) for block in loaded.blocks] == [2, 2, 2]
    assert [block.intermediate_size for block in loaded.blocks[0].sets] == [32, 16]
    seen: list[Routing] = []
    batch = batch_of(loaded)
    with engine_of(loaded) as engine, engine.using(watch=seen.append):
        loaded.model(**batch.inputs)
    real = batch.inputs["attention_mask"].bool()
    vision = int(batch.inputs["moe_mm_token_type_ids"][real].bool().sum())
    for text_set, vision_set in zip(seen[::2], seen[1::2], strict=True):
        assert text_set.layer == vision_set.layer
        assert not (text_set.group == VISION).any()
        assert int((vision_set.group == VISION).sum()) == vision - int((vision_set.group == SPECIAL).sum())
        assert len(text_set.group) + len(vision_set.group) == int(real.sum())
    words = prompt_batch(loaded, [replace(sample, images=()) for sample in small_samples(1)]).inputs
    seen.clear()
    with engine_of(loaded) as engine, engine.using(watch=seen.append):
        loaded.model(**words)
    assert [len(routing.group) for routing in seen] == [words["input_ids"].numel()] * 3  # text experts alone


@torch.no_grad()
@pytest.mark.parametrize("use_operator", [True, False])
def test_llama4_computes_kept_pairs_only(use_operator: bool, loaded_of: Any) -> None:
    loaded: Loaded = loaded_of("llama4")
    batch, computed, dense = batch_of(loaded), list[int](), list[int]()
    with engine_of(loaded) as engine:
        engine.use_operator = use_operator
        for block in loaded.blocks:
            run_pairs, operator = block.experts._modes_base, engine._operators[block.name]
            monitor = _counting(computed, operator if use_operator else run_pairs)
            if use_operator:
                engine._operators[block.name] = monitor
            else:
                block.experts._modes_base = monitor
            block.experts.register_forward_pre_hook(lambda _m, args: dense.append(len(args[0])))
        with engine.using(rule=rule(loaded, 0.85, 0.85)) as counts:
            loaded.model(**batch.inputs)
    padding = int((batch.inputs["attention_mask"] == 0).sum()) * len(loaded.blocks)
    kept = int(counts.kept.sum())
    assert dense == []
    assert kept <= sum(computed) <= kept + padding
    assert sum(computed) < batch.inputs["input_ids"].numel() * len(loaded.blocks)
    for block in loaded.blocks:
        block.experts._forward_pre_hooks.clear()


def _counting(computed: list[int], call: Any) -> Any:
    def counted(hidden: Tensor, *rest: Tensor) -> Any:
        computed.append(hidden.shape[0])
        return call(hidden, *rest)

    return counted


@torch.no_grad()
def test_llama4s_score_is_its_sigmoid(loaded_of: Any) -> None:
    loaded: Loaded = loaded_of("llama4")
    scores: list[Tensor] = []
    seen: list[Routing] = []
    batch = batch_of(loaded)
    handles = [
        loaded.model.get_submodule(f"{block.moe}.router").register_forward_hook(
            lambda _m, _a, out: scores.append(out[0].amax(-1))
        )
        for block in loaded.blocks
    ]
    with engine_of(loaded) as engine, engine.using(watch=seen.append):
        loaded.model(**batch.inputs)
    for handle in handles:
        handle.remove()
    real = batch.inputs["attention_mask"].bool().reshape(-1)
    for routing, score in zip(seen, scores, strict=True):
        assert torch.equal(routing.pi[:, 0], score[real])
        assert 0 < float(routing.pi.min()) < float(routing.pi.max()) < 1


@torch.no_grad()
def test_sound_is_skipped_where_it_has_a_threshold(loaded_of: Any) -> None:
    loaded: Loaded = loaded_of("qwen3_omni_moe")
    sound = np.sin(np.arange(8000) / 20).astype(np.float32)
    text = "<|im_start|>user\n<|audio_start|><|audio_pad|><|audio_end|>What?<|im_end|>\n"
    inputs = {k: v for k, v in loaded.processor(text=text, audio=[sound], return_tensors="pt").items() if isinstance(v, Tensor)}
    audio = inputs["input_ids"] == FIRST_NEW
    assert int(audio.sum()) > 1
    assert (loaded.tokens.of(inputs["input_ids"])[audio] == AUDIO).all()
    for threshold in ({}, {"audio": math.inf}):
        with engine_of(loaded) as engine, engine.using(rule=rule(loaded, math.inf, math.inf, **threshold)) as counts:
            loaded.model(**inputs)
        kept, total = counts.kept[0, 0], counts.total[0, 0]
        assert total[AUDIO] == 4 * int(audio.sum())
        assert kept[AUDIO] == (0 if threshold else total[AUDIO])
        assert kept[SPECIAL] == total[SPECIAL] > 0
        assert kept[TEXT] == 0 < total[TEXT]


# -- which families ----------------------------------------------------------------------------------------------------------


def test_the_table_in_the_docs_is_the_one_in_the_code() -> None:
    text = (Path(__file__).parent.parent / "docs" / "families.md").read_text("utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    listed = {row[1].strip("`"): row[0] for row in rows if row[1].startswith("`")}
    assert listed == known.FAMILIES
    assert {row[1].strip("`") for row in rows if row[-1] == "yes"} == set(GRAPHS)


@pytest.mark.parametrize("family", FAMILIES)
def test_these_families_are_known(family: str, run_of: Any) -> None:
    assert run_of(family).calibration.family in known.FAMILIES
    assert IMAGE in run_of(family).bundle.vision_token_ids


def write_unknown(folder: Path) -> Path:
    """A text model with experts of the common shape whose family no test here covers."""
    from tests.checkpoints import save

    text = reference_config()["text_config"]
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    ids = {name: text[name] for name in ("vocab_size", "eos_token_id", "pad_token_id")}
    return save(transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**experts, **sizes, **ids)), folder, 0)


def test_an_unknown_family_is_refused_and_taken_when_asked(folder: Path) -> None:
    checkpoint, run = write_unknown(folder / "unknown"), folder / "unknown-run"
    request = calibration_request(checkpoint, run, samples=2, batch_size=2, text_only=True)
    with pytest.raises(BadModel, match="model type `qwen2_moe` is of no family") as refused:
        calibrate(request)
    assert "`--family auto`" in str(refused.value.hint)
    assert "experts have the common shape" in str(refused.value.hint)
    with pytest.raises(BadModel, match="`qwen2_moe`"):
        profile_model(ProfileRequest(request.model, request.data, run, 2))
    assert not run.exists() or not any(run.iterdir())
    taken = calibrate(replace(request, model=replace(request.model, family="auto"))).artifact
    assert (taken.family, taken.moe_layers) == ("qwen2_moe", 2)
    found = find_thresholds(search_request(run, 0.3, policy="threshold", passes=4)).artifact  # needs no further permission
    assert found.results[0].skip_ratio >= 0.3


@pytest.mark.parametrize("step", ["profile", "calibrate"])
def test_the_option_on_the_command_line(step: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    checkpoint = str(write_unknown(folder / f"{step}-unknown"))
    words = [
        step,
        checkpoint,
        "--text-only",
        "--data",
        "digits",
        "--samples",
        "2",
        "--run",
        str(folder / f"{step}-run"),
        "--json",
    ]
    assert run_command(words) == 1
    refused = json.loads(capfd.readouterr().out)["error"]
    assert "`qwen2_moe`" in refused["message"]
    assert "`--family auto`" in refused["hint"]
    assert run_command([*words, "--family", "auto"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert len(found["layers"] if step == "profile" else found["importance"]) == 2
