"""Rules of every kind in a bundle: ONNX Runtime and PyTorch decide alike."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from modes_cli.artifacts import Calibration
from modes_cli.data.sample import Sample
from modes_cli.errors import BadOption
from modes_cli.export import bundle as bundle_module
from modes_cli.export import export_bundle, graph
from modes_cli.export.decoder import DecoderSpec
from modes_cli.export.integrity import check_for_loading
from modes_cli.export.thresholds import THRESHOLDS, layer_entries, read_rule
from modes_cli.export.verify import verify_bundle
from modes_cli.models.groups import DECODE, GROUPS, SPECIAL, TEXT, VISION
from modes_cli.models.inputs import prompt_batch
from modes_cli.requests import ExportRequest, GenerateRequest, ModelSpec
from modes_cli.run_folder import RunFolder
from modes_cli.runtime.generate import generate
from modes_cli.runtime.ort_model import OrtModel
from modes_cli.runtime.torch_model import TorchRuntime, open_model
from modes_cli.skipping.contribution import Pairs
from modes_cli.skipping.formula import Formula, Sizes
from modes_cli.skipping.measured import Measured
from modes_cli.skipping.policy import REGISTRY, routing_probability
from modes_cli.skipping.registry import policy
from tests.checkpoints import small_samples
from tests.export.bundles import EXPERTS, MOE_LAYERS, TOP_K, shared_checkpoint
from tests.export.rules import HIDDEN, KINDS, Kind, make_kind, shared_kind

STEPS = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def made(base: Path, kind: str) -> Path:
    return shared_kind(base, kind)


@pytest.fixture(scope="module")
def runtimes(made: Path) -> tuple[TorchRuntime, OrtModel]:
    return open_model(ModelSpec(str(made), device="cpu"), None), OrtModel(made, "cpu", threads=1)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    """Of different lengths: the shorter prompt is padded."""
    first, second = small_samples(2)
    return [replace(first, question="How many digits are there in the top row?"), replace(second, question="Add?")]


# -- both runtimes --------------------------------------------------------------------------------------------------------


def ask_torch(runtime: TorchRuntime, samples: list[Sample], tau: dict[str, float] | None) -> tuple[Tensor, Tensor, Tensor]:
    """Greedy tokens [B, STEPS], their logits [B, STEPS, V], and kept pairs [phases, L, G]."""
    batch = prompt_batch(runtime.loaded, samples)
    rule = runtime.rule if tau is None else runtime.rule.with_tau(tau)
    with runtime.engine.using(rule=rule) as counts, torch.no_grad():
        out = runtime.loaded.model.generate(
            **batch.inputs, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, output_logits=True,
            return_dict_in_generate=True, suppress_tokens=[2],
        )  # fmt: skip
        kept = torch.stack([counts.kept, counts.total])
    return out.sequences[:, batch.inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1), kept


def ask_ort(model: OrtModel, samples: list[Sample], forced: Tensor, tau: dict[str, float] | None) -> tuple[Tensor, Tensor]:
    """Logits when the given tokens are fed, and kept pairs [phases, L, G]."""
    thresholds = None if tau is None else model.tau(tau)
    state = model.prefilled(model.prompts([s.images for s in samples], [s.question for s in samples]), thresholds)
    found, kept = [state.logits[:, -1]], [state.kept, np.zeros_like(state.kept)]
    for token in forced[:, :-1].T:
        model.next_token(state, token.numpy()[:, None], np.ones((len(samples), 1), np.int64), thresholds)
        found.append(state.logits[:, -1])
        kept[1] = kept[1] + state.kept
    return torch.from_numpy(np.stack(found, 1)), torch.from_numpy(np.stack(kept))


def test_both_runtimes_keep_the_same_pairs(kind: str, runtimes: tuple[TorchRuntime, OrtModel], samples: list[Sample]) -> None:
    """Of a padded batch, in prefill and decode, by layer and group; with the bundle's thresholds and with others."""
    ours = KINDS[kind].tau
    for tau in (None, {**ours, "decode": 1.5 * ours["text"]}, {"text": 0.0, "vision": 1e9}):
        tokens, logits, (kept, total) = ask_torch(runtimes[0], samples, tau)
        found, counted = ask_ort(runtimes[1], samples, tokens, tau)
        torch.testing.assert_close(found, logits, atol=1e-3, rtol=1e-3)
        assert torch.equal(counted, kept), (tau, (counted - kept).nonzero().tolist())
        assert torch.equal(kept[..., SPECIAL], total[..., SPECIAL])
        if tau is None:
            for group in (TEXT, VISION, DECODE):  # this decides something
                some, most = kept[..., group].sum(), total[..., group].sum()
                assert 0.05 * most < some < 0.95 * most, GROUPS[group]


def test_the_rule_of_the_bundle_is_the_runs(made: Path, kind: str) -> None:
    run, bundle = RunFolder(made.parent), check_for_loading(made)
    chosen = policy(bundle.policy, **bundle.parameters)
    expected = chosen.rule(Measured(run.read(Calibration), run), KINDS[kind].tau)
    assert read_rule(made, bundle).key == expected.key
    assert (bundle.policy, bundle.tau, bundle.decode_target) == (chosen.name, KINDS[kind].tau, KINDS[kind].decode_target)
    shape = (len(MOE_LAYERS), len(GROUPS), EXPERTS)
    assert expected.score_scale.shape == (shape if kind == "experts" else shape[:2])


def test_the_bundle_verifies(made: Path) -> None:
    assert [check for check in verify_bundle(made) if not check.ok] == []


def test_what_the_graph_gives_the_operator(made: Path, kind: str) -> None:
    decoder = onnx.load(made / "decoder.onnx", load_external_data=False).graph
    nodes = [node for node in decoder.node if node.op_type == "SkipExperts"]
    routes = {node.output[0]: list(node.input) for node in decoder.node if node.op_type == "Route"}
    assert len(routes) == len(nodes) == len(MOE_LAYERS)
    scored = {"predicted": 10, "salient": 12}.get(KINDS[kind].policy, 1)  # inputs of Route; otherwise it only routes
    assert all(len(routes[node.input[1]]) == scored for node in nodes)
    held = {t.name: {e.key: e.value for e in t.external_data} for t in decoder.initializer if t.external_data}
    own = {name: place for name, place in held.items() if place["location"] == THRESHOLDS}
    if KINDS[kind].policy in ("topp", "predicted", "salient"):
        assert all(len(node.input) == 11 and list(node.input[8:10]) == ["", ""] and node.input[10] for node in nodes)
        assert own.keys() == layer_entries(made).keys()
    else:
        assert all(len(node.input) == 8 for node in nodes)
        assert own == {}
    assert len(own) == {"predicted": 4, "salient": 6}.get(kind, 0) * len(MOE_LAYERS)


def test_the_same_in_plain_nodes(base: Path, tmp_path: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs for where `modes::Route` has no kernel decide alike."""
    fused = shared_kind(base, "salient")
    monkeypatch.setattr(bundle_module, "DecoderSpec", lambda *values, route: DecoderSpec(*values))
    export_bundle(ExportRequest(fused.parent, output=tmp_path / "plain"))
    kinds = {node.op_type for node in onnx.load(tmp_path / "plain" / "decoder.onnx", load_external_data=False).graph.node}
    assert "Route" not in kinds
    assert {"TopK", "ReduceLogSumExp"} <= kinds
    models = [OrtModel(folder, "cpu", threads=1) for folder in (fused, tmp_path / "plain")]
    forced = torch.full((len(samples), STEPS), 7)
    (logits, kept), (plain_logits, plain_kept) = (ask_ort(model, samples, forced, None) for model in models)
    assert torch.equal(kept, plain_kept)
    torch.testing.assert_close(logits, plain_logits, atol=1e-4, rtol=1e-4)


def test_an_export_that_is_there_is_not_made_again(base: Path) -> None:
    bundle = shared_kind(base, "predicted")
    before = (bundle / "bundle.json").stat().st_mtime_ns
    export_bundle(ExportRequest(bundle.parent))
    assert (bundle / "bundle.json").stat().st_mtime_ns == before


def test_one_answer_in_both_runtimes(base: Path) -> None:
    bundle = shared_kind(base, "predicted")
    first, second = (generate(GenerateRequest(bundle, (), "Read.", runtime, max_new_tokens=3)) for runtime in ("ort", "torch"))
    assert (first.text, first.tokens) == (second.text, second.tokens)
    assert first.skip_ratio == pytest.approx(second.skip_ratio)


class EveryCall(nn.Module):
    """The operator with and without biases, with and without a score."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, group: Tensor, up: Tensor, down: Tensor) -> list[Tensor]:
        tau = scale = up[0, 0]
        both, calls = (up[:, :, 0], down[:, :, 0]), []
        for biases in ((None, None), both):
            for score in (None, weights):
                given = (x, ids, weights, group, tau, scale, up, down, *biases, "silu", 0.0, 0.0, False, False, score)
                calls.append(torch.ops.modes_trace.skip_experts(*given)[0])
        return calls


def test_optional_inputs_keep_their_places() -> None:
    float32, names = torch.zeros(3, 2), [f"out_{number}" for number in range(4)]
    example = {"x": torch.zeros(3, 8), "ids": float32.long(), "weights": float32, "group": torch.zeros(3, dtype=torch.int32)}
    example |= {"up": torch.zeros(4, 12, 8), "down": torch.zeros(4, 8, 6)}
    shapes: dict[str, graph.Shape] = {name: list(tensor.shape) for name, tensor in example.items()}
    found = graph.trace(EveryCall(), example, dict.fromkeys(example), shapes, {name: [3, 8] for name in names})
    given = [[value is not None for value in node.inputs] for node in found.graph if node.domain == "modes"]
    eight = [True] * 8
    assert given == [eight, [*eight, False, False, True], [*eight, True, True], [*eight, True, True, True]]


# -- decode targets -------------------------------------------------------------------------------------------------------


def test_points_with_and_without_a_decode_target(base: Path) -> None:
    bundle = check_for_loading(shared_kind(base, "experts"))
    both = KINDS["experts"].tau
    without = {group: tau for group, tau in both.items() if group != "decode"}
    assert [(point.target, point.decode_target, point.tau) for point in bundle.points] == [
        (0.3, None, without),
        (0.3, 0.5, both),
    ]
    assert (bundle.target, bundle.decode_target, bundle.tau) == (0.3, 0.5, both)


def test_a_decode_target_is_chosen(base: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(shared_kind(base, "experts").parent, tmp_path / "run", ignore=lambda *_: ["bundle"]))
    for decode in (None, 0.5):
        found = export_bundle(ExportRequest(run, format="safetensors", decode_target=decode)).bundle
        assert (found.decode_target, "decode" in found.tau) == (decode, decode is not None)
        assert read_rule(run / "bundle", found).tau[DECODE] == pytest.approx(found.tau.get("decode", found.tau["text"]))
    with pytest.raises(BadOption, match=r"decode 0\.9"):
        export_bundle(ExportRequest(run, decode_target=0.9))


# -- every formula --------------------------------------------------------------------------------------------------------


class Scores(nn.Module):
    """Formulas of one layer, as the decoder's graph has them."""

    def __init__(self, formulas: dict[str, Formula], layer: int) -> None:
        super().__init__()
        self.formulas, self.layer = formulas, layer

    def forward(self, weights: Tensor, experts: Tensor, hidden: Tensor, group: Tensor) -> list[Tensor]:
        pairs = Pairs(self.layer, routing_probability(weights), group, experts, hidden)
        return [
            formula.of({name: tensor[self.layer] for name, tensor in formula.tensors.items()}, pairs)
            for formula in self.formulas.values()
        ]


@pytest.fixture
def calibration(base: Path) -> Measured:
    run = RunFolder(shared_kind(base, "predicted").parent)
    return Measured(run.read(Calibration), run)


def test_every_formula_is_the_same_in_a_graph(calibration: Measured, tmp_path: Path) -> None:
    """Bit by bit where nothing is summed in another order, for numbers of tokens that were not traced."""
    formulas: dict[str, Formula] = {}
    for name in REGISTRY:
        made = policy(name).contribution(calibration)
        if made is not None and policy(name).exportable:
            assert isinstance(made, Formula)
            assert made.shapes(Sizes(EXPERTS, TOP_K, HIDDEN)) == {key: tuple(t.shape[1:]) for key, t in made.tensors.items()}
            formulas[name] = made
    assert {"topk", "topp", "naee", "diep", "random", "predicted", "salient"} <= formulas.keys()

    def inputs(tokens: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(tokens)
        logits = 2 * torch.randn(tokens, EXPERTS, generator=generator)
        weights, experts = logits.softmax(-1).topk(TOP_K)
        weights[1::4] = 0.25  # equal ones: ranked by their experts
        group = (torch.arange(tokens) % len(GROUPS)).int()
        hidden = torch.randn(tokens, HIDDEN, generator=generator)
        return {"weights": weights, "experts": experts, "hidden": hidden, "group": group}

    module, tokens = Scores(formulas, 1), {0: graph.AUTO}
    shapes: dict[str, graph.Shape] = {"weights": ["T", TOP_K], "experts": ["T", TOP_K], "hidden": ["T", HIDDEN], "group": ["T"]}
    model = graph.trace(module, inputs(5), dict.fromkeys(shapes, tokens), shapes, {name: ["T", TOP_K] for name in formulas})
    graph.ir.save(model, tmp_path / "scores.onnx")
    session = ort.InferenceSession(tmp_path / "scores.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 4, 200):
        given = inputs(count)
        found = session.run(None, {name: tensor.numpy() for name, tensor in given.items()})
        for name, score, expected in zip(formulas, found, module(**given), strict=True):
            tolerance = 1e-5 if name in ("predicted", "salient") else 0.0
            torch.testing.assert_close(
                torch.from_numpy(score), expected, rtol=tolerance, atol=0.0, msg=lambda m, n=name: f"{n}: {m}"
            )


# -- what no graph can have -----------------------------------------------------------------------------------------------


def test_a_policy_without_graphs(base: Path, tmp_path: Path) -> None:
    """Refused before anything is written; in PyTorch its bundle runs."""
    run = make_kind(tmp_path / "run", shared_checkpoint(base), Kind("mcmoe", {"text": 1.0, "vision": 1.0}, {"protected": 0.02}))
    with pytest.raises(BadOption, match="policy `mcmoe` has no graph: it looks at attention weights") as caught:
        export_bundle(ExportRequest(run))
    assert caught.value.exit_code == 1
    assert "--format safetensors" in str(caught.value.hint)
    assert not (run / "bundle").exists()
    bundle = export_bundle(ExportRequest(run, format="safetensors")).path
    assert [check for check in verify_bundle(bundle) if not check.ok] == []
    found = generate(GenerateRequest(bundle, (), "Read.", "torch", max_new_tokens=2))
    assert 0.1 < found.skip_ratio["all"] < 0.9
