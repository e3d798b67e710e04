"""Skipping in a model on a real GPU: no waiting, CUDA graphs, the unchanged model bit for bit. Skipped where there is none."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from modes_cli.errors import KernelError
from modes_cli.models.blocks import find_moe_blocks
from modes_cli.runtime import kernels
from modes_cli.skipping.policy import Rule
from tests.cuda.as_gpu import real_gpu
from tests.families import FAMILIES, TOKENS
from tests.kernels.reference import assert_close, random_case
from tests.skipping import reference
from tests.skipping.conftest import Subject, make

pytestmark = pytest.mark.gpu
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(scope="module")
def gpu() -> torch.device:
    return real_gpu()


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def qwen(gpu: torch.device) -> Subject:
    return on(gpu, make("qwen3_vl_moe"))


def on(device: torch.device, subject: Subject, dtype: torch.dtype = torch.float32) -> Subject:
    model = copy.deepcopy(subject.model).to(device, dtype)
    inputs = {
        name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
        for name, value in subject.inputs.items()
    }
    return Subject(model, inputs, find_moe_blocks(model))


def rule_for(it: Subject, seed: int = 5) -> Rule:
    return reference.rule(len(it.blocks), 0.22, 0.3, seed=seed)


def step(it: Subject, ids: Tensor) -> Tensor:
    """One token of each sample. Positions are given: transformers would read the device to make a mask from its own."""
    positions = torch.zeros(3, *ids.shape, dtype=torch.int64, device=ids.device)
    logits: Tensor = it.model(input_ids=ids, position_ids=positions, use_cache=False).logits
    return logits


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(work: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of `work`, which is warmed up on a side stream as capturing wants it, and what it writes to."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = work()
    return graph, out


@pytest.mark.parametrize("tokens", [1, 9, 70, 600])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_a_graph_of_the_operator_follows_its_inputs(tokens: int, dtype: torch.dtype, gpu: torch.device) -> None:
    sizes: dict[str, Any] = {"hidden": 64, "intermediate": 32, "dtype": dtype, "weight_dtype": dtype}
    first, second = random_case(tokens=tokens, **sizes), random_case(tokens=tokens, seed=1, **sizes)
    experts_of = {name: getattr(first, name).to(gpu) for name in ("gate_up", "down")}
    experts = kernels.Experts(**experts_of)
    names = ("x", "expert_ids", "expert_weights", "group", "tau", "score_scale")
    inputs = [getattr(first, name).to(gpu) for name in names]
    kept = torch.zeros(2, dtype=torch.int64, device=gpu)
    graph, out = captured(lambda: experts(*inputs, kept=kept))
    for case in (first, second):
        case = case.but(gate_up=first.gate_up, down=first.down)
        for tensor, name in zip(inputs, names, strict=True):
            tensor.copy_(getattr(case, name))
        graph.replay()
        torch.cuda.synchronize()
        assert_close(out.cpu(), case)
        assert torch.equal(out, experts(*inputs))


def test_the_operator_runs_on_the_current_stream(gpu: torch.device) -> None:
    """Weights that a long queue of the stream is still to write are read after it."""
    case = random_case(tokens=9, hidden=64, intermediate=32)
    names = ("x", "expert_ids", "expert_weights", "group", "tau", "score_scale", "gate_up", "down")
    tensors = [getattr(case, name).to(gpu) for name in names]
    wanted = kernels.skip_experts(*tensors)
    scale, stream = torch.randn(4096, 4096, device=gpu), torch.cuda.Stream()
    saved = tensors[0].clone()
    tensors[0].zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(20):
            scale = (scale @ scale).clamp_(-1, 1)
        tensors[0].copy_(saved)
        out = kernels.skip_experts(*tensors)
    stream.synchronize()
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_every_dtype(family: str, dtype: torch.dtype, gpu: torch.device) -> None:
    it = on(gpu, make(family), dtype)
    rule = rule_for(it)
    group = reference.groups(TOKENS, it.inputs["input_ids"], it.inputs["attention_mask"])
    with it.engine() as engine, reference.listening(it.blocks) as calls, engine.using(rule=rule) as counts:
        it.model(**it.inputs)
        assert {found.name for found in engine.implementations} == {"modes"}, engine.implementations
        assert 0 < counts.skip_ratio() < 1
    cpu = {block.index: block for block in find_moe_blocks(copy.deepcopy(it.model).cpu())}
    for call in calls:
        hidden, index, weights = call.hidden.cpu(), call.index.cpu(), call.weights.cpu()
        kept = reference.keep(rule, reference.probability(weights), call.block.index, group)
        exact = reference.experts_output(cpu[call.block.index], hidden, index, weights, kept)
        output = call.output.float().cpu()
        assert float((output - exact).norm() / exact.norm()) < ROUNDING[dtype]
        assert not output[~kept.any(-1)].any()


def test_zero_thresholds_are_the_unchanged_model_bit_for_bit(qwen: Subject) -> None:
    logits = qwen.model(**qwen.inputs).logits
    with qwen.engine() as engine, engine.using(rule=reference.rule(len(qwen.blocks), 0.0, 0.0)) as counts:
        assert torch.equal(qwen.model(**qwen.inputs).logits, logits)
        assert torch.equal(counts.kept, counts.total)


def test_counts_are_those_of_the_cpu(qwen: Subject) -> None:
    rule = reference.rule(len(qwen.blocks), 0.0, math.inf)  # nothing near a threshold
    found = []
    for it in (qwen, make("qwen3_vl_moe")):
        with it.engine() as engine, engine.using(rule=rule) as counts:
            it.model(**it.inputs)
            found.append((counts.kept.clone(), counts.total.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_experts_wait_for_nothing_after_the_first_forward(qwen: Subject) -> None:
    """The whole engine: token groups, routing, experts, counting. The model around it may wait in a prefill, so without it."""
    with qwen.engine() as engine, reference.listening(qwen.blocks) as calls, engine.using(rule=rule_for(qwen)) as counts:
        qwen.model(**qwen.inputs)
        kept = counts.kept.clone()
        before = len(calls)
        with waiting_is_an_error():
            engine._read_tokens(qwen.model, (), qwen.inputs)
            for call in calls[:before]:
                call.block.experts(call.hidden, call.index, call.weights)
            engine._count()
        assert torch.equal(counts.kept, 2 * kept)


def test_a_decoding_step_waits_for_nothing(qwen: Subject) -> None:
    ids = qwen.inputs["input_ids"][:, -1:].clone()
    with qwen.engine() as engine, engine.using(rule=rule_for(qwen)):
        expected = step(qwen, ids)
        with waiting_is_an_error():
            out = step(qwen, ids)
        assert torch.equal(out, expected)


def test_a_graph_of_a_decoding_step_with_a_rule(qwen: Subject) -> None:
    """Replayed with other tokens, it gives what a forward gives, and counts."""
    ids = qwen.inputs["input_ids"][:, -1:].clone()
    others = torch.randint(10, 490, ids.shape, device=ids.device)
    with qwen.engine() as engine, engine.using(rule=rule_for(qwen)) as counts:
        graph, out = captured(lambda: step(qwen, ids))
        for tokens in (others, ids.clone()):
            expected = step(qwen, tokens)
            counts.reset()
            step(qwen, tokens)
            kept = counts.kept.clone()
            counts.reset()
            ids.copy_(tokens)
            graph.replay()
            torch.testing.assert_close(out, expected)
            assert torch.equal(counts.kept, kept)
            assert int(counts.total.sum()) > 0


def test_a_graph_follows_the_rule_that_ran_last(qwen: Subject) -> None:
    ids = qwen.inputs["input_ids"][:, -1:].clone()
    with qwen.engine() as engine, engine.using(rule=rule_for(qwen)):
        graph, out = captured(lambda: step(qwen, ids))
        graph.replay()
        before = out.clone()
        with engine.using(rule=reference.rule(len(qwen.blocks), math.inf, math.inf)):
            expected = step(qwen, ids)
            graph.replay()
            torch.testing.assert_close(out, expected)
            assert not torch.equal(out, before)


def test_a_first_forward_cannot_be_captured(qwen: Subject) -> None:
    ids = qwen.inputs["input_ids"][:, -1:]
    with (
        qwen.engine() as engine,
        engine.using(rule=rule_for(qwen)),
        pytest.raises(KernelError, match="while a CUDA graph is being captured") as raised,
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        step(qwen, ids.clone())  # a graph with nothing in it is worth a warning
    assert raised.value.hint == "run the model once before capturing"


def test_text_is_that_of_the_cpu(qwen: Subject) -> None:
    texts = []
    for it in (qwen, make("qwen3_vl_moe")):
        with it.engine() as engine, engine.using(rule=rule_for(it)):
            texts.append(it.model.generate(**it.inputs, max_new_tokens=6, do_sample=False).cpu())
    assert torch.equal(*texts)
