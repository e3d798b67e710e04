"""GroupQueryAttention instead of Attention, one buffer for past and present, and a decoder graph in float16 or bfloat16 from
the same weight files. On the CPU: ONNX Runtime has the operator for float32 and float16 there.
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from modes_cli.errors import BadArtifact
from modes_cli.export import export_bundle, grouped, rotary
from modes_cli.export.bundle import _has_half, _save
from modes_cli.export.decoder import CacheShape, DecoderSpec, export_decoder
from modes_cli.export.integrity import HALF_DECODER, check_for_loading, graph_weights
from modes_cli.export.onnx_checks import check_graph
from modes_cli.export.plan import make_plan
from modes_cli.export.verify import verify_bundle
from modes_cli.models.quantization import SCHEMES
from modes_cli.requests import ExportRequest
from modes_cli.run_folder import RunFolder
from modes_cli.runtime.libraries import library_path
from modes_cli.runtime.ort_model import OrtModel, State
from modes_cli.runtime.providers import CPU, CUDA
from modes_cli.runtime.session import DECODER, decoder_name
from modes_cli.search.calibrated import model_spec
from modes_cli.search.selection import found_in, select
from modes_cli.skipping.measured import Measured
from modes_cli.skipping.policy import tau_vector
from modes_cli.skipping.registry import from_result
from tests.export.bundles import LAYERS, make_checkpoint, make_run, read, relist, shared_bfloat16, shared_bundle
from tests.once import once
from tests.runtime.test_session import BATCHES

GROUPED = "grouped.onnx"
PLAIN, OURS = ("Attention", "RotaryEmbedding"), (grouped.OPERATOR, rotary.MULTIMODAL)  # of the two decoder graphs
NOTHING = tau_vector({}).numpy()
STEPS, ENDED = 6, 3  # generated tokens; the first row has ended before that one
ROOM = 160  # places of a shared buffer


@functools.cache
def half_bundle(base: Path) -> Path:
    def make(folder: Path) -> None:
        export_bundle(ExportRequest(run=make_run(folder / "run", make_checkpoint(folder / "checkpoint", torch.float16))))

    return once(base, "tiny-float16", make) / "run" / "bundle"


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return half_bundle(tmp_path_factory.getbasetemp())


def with_graph(folder: Path, name: str, bundle: Path | None = None) -> OrtModel:
    """A bundle that runs another decoder graph on the CPU. `bundle`: where it is, if the graph's folder holds more than one."""
    model, options = OrtModel(bundle or folder, threads=1), ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.register_custom_ops_library(str(library_path("libmodes_cpu.so")))
    model.decoder = ort.InferenceSession(str(folder / name), options, providers=[CPU])
    element = next(value.type for value in model.decoder.get_inputs() if value.name.startswith("past"))
    model._cached = {"tensor(float)": 1, "tensor(float16)": 10}[element]
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[OrtModel, OrtModel]:
    """A float32 bundle with Attention and with GroupQueryAttention."""
    bundle = shared_bundle(tmp_path_factory.getbasetemp())
    folder = tmp_path_factory.mktemp("grouped")
    for path in bundle.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    run = RunFolder(bundle.parent)
    thresholds, calibration = found_in(run)
    result = select(thresholds, None, None)
    rule = from_result(result, Measured(calibration, run))
    plan = make_plan(model_spec(calibration, "cpu", False), thresholds, result, rule, onnx=True)
    assert plan.family is not None
    text = plan.config.get_text_config()
    spec = DecoderSpec(text, plan.family.deepstack(plan.config), plan.blocks, plan.tokens, rule, grouped=True)
    assert grouped.fits(text, spec.cache)
    plain = OrtModel(bundle, threads=1)
    _save(export_decoder(plan.model, plan.mode, plan.family, spec), folder / GROUPED, plan)
    check_graph(folder / GROUPED, graph_weights(folder, read(folder)))
    return plain, with_graph(folder, GROUPED, bundle)


class SharedBuffers(OrtModel):
    """Past and present are the same memory, with whatever was in it before."""

    def __init__(self, model: OrtModel) -> None:
        self.__dict__ |= model.__dict__

    def empty_state(self, batch: int) -> State:
        info, state = self.bundle.decoder, super().empty_state(batch)
        dtype = {1: np.float32, 10: np.float16}[self._cached]
        full = np.full((batch, info.kv_heads, ROOM, info.head_dim), np.nan, dtype)
        state.past = [ort.OrtValue.ortvalue_from_numpy(full.copy()) for _ in state.past]
        self.decoder = Bound(self.decoder, dict(zip(self._outputs[2:], state.past, strict=True)))
        return state


class Bound:
    """A session that writes some outputs into given memory."""

    def __init__(self, session: object, buffers: dict[str, ort.OrtValue]) -> None:
        self.session = session.session if isinstance(session, Bound) else session
        self.buffers = buffers

    def io_binding(self) -> object:
        binding = self.session.io_binding()
        bind = binding.bind_output
        binding.bind_output = lambda name, device: (
            binding.bind_ortvalue_output(name, self.buffers[name]) if name in self.buffers else bind(name, device)
        )
        return binding

    def run_with_iobinding(self, binding: object) -> None:
        self.session.run_with_iobinding(binding)


def steps(model: OrtModel, name: str, follow: list[np.ndarray] | None = None, tau: np.ndarray | None = None) -> list[State]:
    """The states after a prompt and after each token; a row of several ends on the way. `follow`: tokens to feed."""
    samples = BATCHES[name]
    state = model.prefilled(model.prompts([s.images for s in samples], [s.question for s in samples]), tau)
    states, running = [dataclasses.replace(state)], np.ones((len(samples), 1), np.int64)
    for step in range(STEPS):
        ids = state.logits[:, -1].argmax(-1).astype(np.int64)[:, None] if follow is None else follow[step]
        if step == ENDED and len(samples) > 1:
            running[0] = 0
        model.next_token(state, np.where(running != 0, ids, model.bundle.pad_token_id), running, tau)
        states.append(dataclasses.replace(state))
    return states


def tokens(states: list[State]) -> list[np.ndarray]:
    return [state.logits[:, -1].argmax(-1).astype(np.int64)[:, None] for state in states]


def real_rows(states: list[State]) -> Iterator[np.ndarray]:
    """Logits of rows that have not ended."""
    for step, state in enumerate(states):
        yield state.logits[1 if step > ENDED and len(state.logits) > 1 else 0 :]


def require_same(found: list[State], expected: list[State], atol: float) -> None:
    for one, other in zip(real_rows(found), real_rows(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=atol)
        np.testing.assert_array_equal(one.argmax(-1), other.argmax(-1))


@pytest.mark.parametrize("name", BATCHES)
def test_as_attention(models: tuple[OrtModel, OrtModel], name: str) -> None:
    """Padding at the left of prompts, and in rows that have ended, is seen by neither."""
    plain, model = models
    expected = steps(plain, name)
    found = steps(model, name, tokens(expected))
    require_same(found, expected, 1e-4)
    assert all((one.kept == other.kept).all() for one, other in zip(found, expected, strict=True))
    assert expected[0].logits.std() > 0.3


@pytest.mark.parametrize("name", ["one", "left padding", "with and without"])
def test_one_buffer_for_past_and_present(models: tuple[OrtModel, OrtModel], name: str) -> None:
    """Whatever lies behind the tokens in it, not-a-numbers here, is never looked at."""
    expected = steps(models[0], name)
    require_same(steps(SharedBuffers(models[1]), name, tokens(expected)), expected, 1e-4)


def test_a_prompt_in_two_pieces(models: tuple[OrtModel, OrtModel]) -> None:
    plain, model = models
    samples = BATCHES["left padding"]
    prompts = plain.prompts([s.images for s in samples], [s.question for s in samples])
    positions, _ = plain.positions(prompts)
    features = plain.image_features(prompts.pixel_values, prompts.grids)
    cut = prompts.input_ids.shape[1] - 3  # behind the images
    for rows in (slice(0, 1), slice(1, 2)):
        count = int(np.isin(prompts.input_ids[rows], plain.bundle.vision_token_ids).sum())
        own = features[:count] if rows.start == 0 else features[-count:]
        found = []
        for one in (plain, model):
            state = one.empty_state(1)
            for part, shown in ((slice(0, cut), own), (slice(cut, None), features[:0])):
                ids, mask = prompts.input_ids[rows, part], prompts.attention_mask[rows, part]
                one.step(state, ids, mask, positions[:, rows, part], shown, None)
            found.append(state)
        np.testing.assert_allclose(found[1].logits, found[0].logits, atol=1e-4)
    state = model.empty_state(2)
    model.step(state, prompts.input_ids, prompts.attention_mask, positions, features, None)
    with pytest.raises(Exception, match="batch_size must be 1"):  # ONNX Runtime's own words: several rows at once it has not
        model.step(state, prompts.input_ids[:, -2:], prompts.attention_mask[:, -2:], positions[..., -2:], features[:0], None)


@pytest.mark.parametrize("name", BATCHES)
def test_float16(half: Path, name: str) -> None:
    """Half the precision, the same tokens. Nothing is skipped, since a score at a threshold may fall to the other side."""
    wide, narrow = OrtModel(half, threads=1), with_graph(half, HALF_DECODER)
    expected = steps(wide, name, tau=NOTHING)
    found = steps(narrow, name, tokens(expected), NOTHING)
    shared = steps(SharedBuffers(narrow), name, tokens(expected), NOTHING)
    for one, same, other in zip(real_rows(found), real_rows(shared), real_rows(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=3e-2)
        np.testing.assert_array_equal(one, same)
        np.testing.assert_array_equal(one.argmax(-1), other.argmax(-1))
    assert any((one.logits != other.logits).any() for one, other in zip(found, expected, strict=True))
    skipped = steps(narrow, name, tokens(expected))
    assert skipped[0].kept.sum() < found[0].kept.sum()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_both_graphs_use_the_same_weights(half: Path, tmp_path_factory: pytest.TempPathFactory, dtype: str) -> None:
    folder = half if dtype == "float16" else shared_bfloat16(tmp_path_factory.getbasetemp())[1]
    bundle = check_for_loading(folder)
    graphs = [onnx.load_model(folder / name, load_external_data=False) for name in (DECODER, HALF_DECODER)]
    places = [
        {tuple(sorted((e.key, e.value) for e in tensor.external_data)) for tensor in graph.graph.initializer} - {()}
        for graph in graphs
    ]
    assert places[0] == places[1]
    assert len(places[0]) > 40
    assert (folder / HALF_DECODER).stat().st_size < 60_000
    assert [check for check in verify_bundle(folder) if not check.ok] == []
    element = onnx.TensorProto.FLOAT16 if dtype == "float16" else onnx.TensorProto.BFLOAT16
    types = {value.name: value.type.tensor_type.elem_type for value in (*graphs[1].graph.input, *graphs[1].graph.output)}
    assert {types[name] for name in types if ".key" in name or ".value" in name} == {element}
    assert types["inputs_embeds"] == types["logits"] == types["tau"] == onnx.TensorProto.FLOAT
    onnx.shape_inference.infer_shapes(graphs[1], check_type=True, strict_mode=True)
    found = [[node.op_type for node in graph.graph.node if node.op_type in PLAIN + OURS] for graph in graphs]
    assert [sorted(set(ops)) for ops in found] == [sorted(PLAIN), sorted(OURS)]
    assert {ops.count(name) for ops, (_, name) in zip(found, (PLAIN, OURS), strict=True)} == {2 * LAYERS}  # queries and keys
    # Which one runs where.
    assert decoder_name(bundle, [CUDA, CPU]) == HALF_DECODER
    assert decoder_name(bundle) == decoder_name(bundle, [CPU]) == DECODER


def test_float32_weights_have_one_graph(tmp_path_factory: pytest.TempPathFactory) -> None:
    bundle = check_for_loading(shared_bundle(tmp_path_factory.getbasetemp()))
    assert decoder_name(bundle, [CUDA, CPU]) == DECODER
    assert HALF_DECODER not in {file.path for file in bundle.files}


def test_quantised_experts_have_one_graph(half: Path) -> None:
    """They are not on CUDA yet."""
    run = RunFolder(half.parent)
    thresholds, calibration = found_in(run)
    result = select(thresholds, None, None)
    spec = model_spec(calibration, "cpu", False)
    plan = make_plan(spec, thresholds, result, from_result(result, Measured(calibration, run)), onnx=True)
    assert _has_half(plan)
    assert not _has_half(dataclasses.replace(plan, scheme=SCHEMES["int8"]))


@dataclasses.dataclass
class Text:
    num_attention_heads: int = 4
    layer_types: tuple[str, ...] = ("full_attention",)
    use_sliding_window: bool = False
    kv_lora_rank: int | None = None


def test_what_the_operator_has_not() -> None:
    wide = CacheShape(2, 16, 16)
    assert grouped.fits(Text(), wide)
    assert grouped.fits(Text(layer_types=("full_attention", "sliding_attention")), wide)
    assert not grouped.fits(Text(), CacheShape(2, 16, 8))
    assert not grouped.fits(Text(), CacheShape(2, 12, 12))
    assert not grouped.fits(Text(), CacheShape(3, 16, 16))
    assert not grouped.fits(Text(layer_types=("full_attention", "linear_attention")), wide)
    assert not grouped.fits(Text(use_sliding_window=True), wide)
    assert not grouped.fits(Text(kv_lora_rank=8), wide)


def test_another_operator_of_that_domain_is_refused(half: Path, tmp_path: Path) -> None:
    for path in half.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    model = onnx.load_model(tmp_path / HALF_DECODER, load_external_data=False)
    next(node for node in model.graph.node if node.op_type == grouped.OPERATOR).op_type = "MultiHeadAttention"
    (tmp_path / HALF_DECODER).write_bytes(model.SerializeToString())
    relist(tmp_path, HALF_DECODER)
    with pytest.raises(BadArtifact, match=r"com\.microsoft::MultiHeadAttention"):
        check_graph(tmp_path / HALF_DECODER, graph_weights(tmp_path, read(tmp_path)))
