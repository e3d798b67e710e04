"""Norms and similarities of expert outputs against computing them one by one, and what happens where they cannot be had."""

import dataclasses
import importlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save
from torch import Tensor

from modes_cli.calibration import calibrate, ridge
from modes_cli.calibration.contributions import NORMS, PREDICTOR, OutputSums
from modes_cli.calibration.replay import answer_logits
from modes_cli.calibration.saliency import NAMES as SALIENCY
from modes_cli.data.sample import Sample
from modes_cli.errors import BadArtifact
from modes_cli.models.blocks import find_moe_blocks
from modes_cli.models.groups import DECODE, GROUPS, TEXT
from modes_cli.models.inputs import Batch, measuring_batch
from modes_cli.models.loading import Loaded
from modes_cli.models.router import find_router
from modes_cli.run_folder import RunFolder
from modes_cli.skipping.engine import SkipEngine
from modes_cli.skipping.measured import Measured
from modes_cli.skipping.predictor import features, log_norms
from modes_cli.skipping.registry import policy
from modes_cli.skipping.routing import Routing
from tests import families
from tests.families import FAMILIES
from tests.runs import calibration_request, content
from tests.skipping import reference
from tests.skipping.conftest import make

MODULE = importlib.import_module("modes_cli.calibration.contributions")
Found = dict[str, Tensor]


@pytest.fixture(scope="module")
def batches(tiny: Loaded, small_samples: Callable[..., list[Sample]]) -> list[Batch]:
    samples = small_samples(3)
    return [measuring_batch(tiny, samples[:1]), measuring_batch(tiny, samples[1:])]


def measure(loaded: Loaded, sums: OutputSums, number: int, batch: Batch) -> Found:
    """One batch's part, as `calibrate` has it measured."""
    found = sums.zeros()
    engine = SkipEngine(loaded.model, loaded.blocks, loaded.tokens)
    try:
        with engine.answers_at(batch.decoding), engine.using(watch=sums.measuring(found, routers=number == 0)):
            answer_logits(loaded.model, batch)
    finally:
        engine.remove()
    return found


def added(loaded: Loaded, batches: list[Batch], chunk: int = MODULE.CHUNK) -> OutputSums:
    sums = OutputSums(loaded.model, loaded.blocks, chunk)
    for number, batch in enumerate(batches):
        sums.add(measure(loaded, sums, number, batch))
    return sums


@pytest.fixture(scope="module")
def made(tiny: Loaded, batches: list[Batch]) -> Found:
    return added(tiny, batches).tensors()


@dataclasses.dataclass
class Pair:
    group: int
    expert: int
    output: Tensor  # (H,) float64
    logits: Tensor  # (E,) float64, of the pair's token
    chosen: list[int]  # the token's experts

    @cached_property
    def norm(self) -> float:
        return float(self.output.norm())


@pytest.fixture(scope="module")
@torch.no_grad()
def single(tiny: Loaded, batches: list[Batch]) -> list[list[list[Pair]]]:
    """By layer and token, the pairs of real tokens, each computed alone from the weights and the definition."""
    tokens: list[list[list[Pair]]] = [[] for _ in tiny.blocks]
    for batch in batches:
        group = tiny.tokens.of(batch.inputs["input_ids"])
        group = group.masked_fill((group == TEXT) & batch.decoding, DECODE).reshape(-1)
        with reference.listening(tiny.blocks) as calls:
            answer_logits(tiny.model, batch)
        for call in calls:
            gate = tiny.model.get_submodule(call.block.moe).gate.weight  # the name that this family has for it
            for token in batch.inputs["attention_mask"].reshape(-1).nonzero().flatten().tolist():
                hidden, chosen = call.hidden[token], call.index[token].tolist()
                logits = gate.double() @ hidden.double()
                outputs = [output(call.block.experts, expert, hidden.double()) for expert in chosen]
                pairs = zip(chosen, outputs, strict=True)
                tokens[call.block.index].append([Pair(int(group[token]), e, out, logits, chosen) for e, out in pairs])
    return tokens


def output(experts: torch.nn.Module, expert: int, hidden: Tensor) -> Tensor:
    gate_up, down = (getattr(experts, name)[expert].double() for name in ("gate_up_proj", "down_proj"))
    gate, up = (gate_up @ hidden).chunk(2)
    return down @ (torch.nn.functional.silu(gate) * up)


# -- against computing them one by one ---------------------------------------------------------------------------------------


def test_mean_norms(made: Found, single: list[list[list[Pair]]]) -> None:
    """Where a group has no pair of an expert, its layer's mean; a group without any, the mean of the layer."""
    seen = set()
    for layer, tokens in enumerate(single):
        every = [pair for token in tokens for pair in token]
        for group in range(len(GROUPS)):
            of_group = [pair for pair in every if pair.group == group]
            for expert in range(made["output_norm"].shape[2]):
                own = [pair for pair in of_group if pair.expert == expert]
                norms = [pair.norm for pair in (own or of_group or every)]
                assert float(made["output_norm"][layer, group, expert]) == pytest.approx(sum(norms) / len(norms), rel=1e-4)
                seen.add((bool(own), bool(of_group)))
    assert seen == {(True, True), (False, True), (False, False)}


def test_similarities(made: Found, single: list[list[list[Pair]]]) -> None:
    for layer, tokens in enumerate(single):
        cosines: dict[tuple[int, int], list[float]] = {}
        for token in tokens:
            for one in token:
                for other in token:
                    if one.expert != other.expert:
                        value = float(one.output @ other.output) / (one.norm * other.norm)
                        cosines.setdefault((one.expert, other.expert), []).append(value)
        every = [value for values in cosines.values() for value in values]
        found = made["expert_similarity"][layer]
        for one in range(len(found)):
            for other in range(len(found)):
                values = cosines.get((one, other), every)
                expected = 1.0 if one == other else sum(values) / len(values)
                assert float(found[one, other]) == pytest.approx(expected, abs=1e-4)


def test_the_predictor_is_the_ridge_regression_on_these_pairs(made: Found, single: list[list[list[Pair]]]) -> None:
    for layer, tokens in enumerate(single):
        experts = torch.tensor([token[0].chosen for token in tokens])
        logs = torch.tensor([[pair.norm for pair in token] for token in tokens], dtype=torch.float64).log()
        known = features(torch.stack([token[0].logits for token in tokens]), experts)
        sums = torch.zeros(len(made["router"][layer]), ridge.width(len(made["router"][layer])), dtype=torch.float64)
        ridge.add_pairs(sums, known, experts, logs)
        expected = log_norms(known, ridge.solve(sums), experts)
        found = log_norms(known, made["norm_predictor"][layer].double(), experts)
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
        assert float(((found - logs) ** 2).mean()) < 0.9 * float(logs.var())
        assert made["norm_range"][layer].tolist() == pytest.approx([float(logs.min()), float(logs.max())], abs=1e-4)


def test_the_router_is_copied(tiny: Loaded, made: Found) -> None:
    for block in tiny.blocks:
        assert torch.equal(made["router"][block.index], tiny.model.get_submodule(block.moe).gate.weight)
    assert not made["router_bias"].any()


# -- how it is measured ------------------------------------------------------------------------------------------------------


def test_outputs_are_computed_a_part_at_a_time(tiny: Loaded, batches: list[Batch], made: Found) -> None:
    block, limit = tiny.blocks[0], 4096
    rows: list[int] = []
    sums = OutputSums(tiny.model, tiny.blocks, limit)
    inner = sums.measuring(found := sums.zeros(), routers=True)

    def watch(routing: Routing) -> None:
        def compute(hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
            rows.append(len(hidden))
            return routing.compute(hidden, experts, weights)

        inner(dataclasses.replace(routing, compute=compute))

    engine = SkipEngine(tiny.model, tiny.blocks, tiny.tokens)
    try:
        with engine.answers_at(batches[0].decoding), engine.using(watch=watch):
            answer_logits(tiny.model, batches[0])
    finally:
        engine.remove()
    assert len(rows) > 3 * len(tiny.blocks)
    assert max(rows) * block.hidden_size * 4 <= limit
    sums.add(found)
    whole = added(tiny, batches[:1]).tensors()
    for name, tensor in sums.tensors().items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-3, atol=1e-3)


def test_batches_of_other_processes_give_the_same_bytes(tiny: Loaded, batches: list[Batch], made: Found) -> None:
    """Measured in any order and sent, added in theirs."""
    others = [OutputSums(tiny.model, tiny.blocks) for _ in batches]
    sent = {n: save(measure(tiny, others[n], n, batches[n])) for n in reversed(range(len(batches)))}
    sums = OutputSums(tiny.model, tiny.blocks)
    for number in range(len(batches)):
        sums.add(load(sent[number]))
    assert {name: tensor.tolist() for name, tensor in sums.tensors().items()} == {n: t.tolist() for n, t in made.items()}


def test_importance_and_reference_are_the_same_bits_without_it(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = calibrate(calibration_request(tiny_checkpoint, tmp_path / "with", samples=2)).artifact
    monkeypatch.setattr(MODULE, "obstacles", lambda *_: dict.fromkeys((*NORMS, *PREDICTOR), "left out"))
    without = calibrate(calibration_request(tiny_checkpoint, tmp_path / "without", samples=2)).artifact
    assert without.importance == artifact.importance
    tensors, fewer = (load_file(tmp_path / run / artifact.tensors.file) for run in ("with", "without"))
    assert tensors.keys() - fewer.keys() == {*NORMS, *PREDICTOR, *SALIENCY}
    assert all(torch.equal(tensors[name], tensor) for name, tensor in fewer.items())
    more = artifact.forward_equivalents - without.forward_equivalents
    assert more == pytest.approx(artifact.moe_layers / 4 + 3)  # three MoE layers of four layers, once, and what saliency costs


# -- families ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_router_is_found_and_its_logits_give_pi(family: str) -> None:
    subject, checked = make(family), 0

    def watch(routing: Routing) -> None:
        nonlocal checked
        router = find_router(subject.model, routing.block)
        assert router is not None
        chosen = router.logits(routing.hidden).gather(1, routing.experts)
        softmax, sigmoid = chosen.softmax(1), chosen.sigmoid() / chosen.sigmoid().sum(1, keepdim=True)
        assert min(float((routing.pi - likely).abs().max()) for likely in (softmax, sigmoid)) < 1e-5
        checked += 1

    sums = OutputSums(subject.model, subject.blocks)
    assert sums.absent == {}
    found = sums.zeros()
    with subject.engine() as engine:
        for watcher in (watch, sums.measuring(found, routers=True)):
            with engine.using(watch=watcher):
                subject.model(**subject.inputs)
    sums.add(found)
    assert checked == len(subject.blocks)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in sums.tensors().values())


def test_where_norms_have_no_meaning_the_reason_is_given() -> None:
    model, _ = families.llama4()
    blocks = find_moe_blocks(model)
    sums = OutputSums(model, blocks)
    assert sums.absent.keys() == {*NORMS, *PREDICTOR}
    assert "goes into an expert" in sums.absent["output_norm"]
    assert (sums.layers_per_batch, sums.sums, sums.tensors()) == (0, {}, {})

    qwen = make("qwen3_vl_moe")
    several = [dataclasses.replace(block, further=(block,)) for block in qwen.blocks]
    sums = OutputSums(qwen.model, several)
    assert "more than one set" in sums.absent["output_norm"]
    assert find_router(qwen.model, several[0]) is None


def test_a_matrix_of_the_same_shape_that_lies_deeper_is_not_the_router() -> None:
    qwen = make("qwen3_vl_moe")
    block = qwen.blocks[0]
    moe = qwen.model.get_submodule(block.moe)
    before = find_router(qwen.model, block)
    moe.shared = torch.nn.Sequential(torch.nn.Linear(block.hidden_size, block.num_experts))
    found = find_router(qwen.model, block)
    assert before is not None
    assert found is not None
    assert found.module is before.module


def test_a_router_that_is_not_found_leaves_the_predictor_out() -> None:
    qwen = make("qwen3_vl_moe")
    for block in qwen.blocks:
        moe = qwen.model.get_submodule(block.moe)
        moe.second = torch.nn.Linear(block.hidden_size, block.num_experts)
    sums = OutputSums(qwen.model, qwen.blocks)
    assert sums.absent.keys() == set(PREDICTOR)
    assert "routers were not found" in sums.absent["norm_predictor"]
    assert {"norm_sums", "cosine_sums"} <= sums.sums.keys()


@pytest.mark.parametrize(
    ("limit", "absent", "name"),
    [("MOST", {"expert_similarity", *PREDICTOR}, "diep"), ("LARGEST_ROUTERS", set(PREDICTOR), "predicted")],
)
def test_what_would_take_too_much_memory_is_left_out_and_said(
    limit: str, absent: set[str], name: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, limit, 1000)
    request = calibration_request(tiny_checkpoint, tmp_path / "run", samples=2)
    artifact = calibrate(request).artifact
    found = Measured(artifact, RunFolder(tmp_path / "run"))
    assert not load_file(found.path).keys() & absent
    with pytest.raises(BadArtifact, match=r"was not measured: it would need .* MiB is the most") as caught:
        policy(name).rule(found, {})
    assert "another policy" in str(caught.value.hint)
    policy("norm").rule(found, {})
    calibrate(calibration_request(tiny_checkpoint, tmp_path / "again", samples=2))
    assert content(tmp_path / "again") == content(tmp_path / "run")
