"""Quantised expert weights: the bits of the float32 kernels on what the weights stand for, on every instruction set."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from modes_cli.errors import KernelError
from modes_cli.models.quantization import SCHEMES
from tests.kernels.calling import at_byte_offset, beside_a_guard, python, run
from tests.kernels.onnx_layer import feeds, model, session
from tests.kernels.onnx_layer import run as run_in_onnxruntime
from tests.kernels.quantised import random_quantised
from tests.kernels.reference import ACTIVATIONS, assert_close, assert_close_to_float64, keep_mask, random_case
from tests.kernels.test_isa import FORCED, KNOWN, this_machine

both = pytest.mark.parametrize("scheme", SCHEMES)
WEIGHTS = ("gate_up", "down", "gate_up_scales", "down_scales")


@both
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_matches_the_definition(scheme: str, activation: str, interleaved: bool, biases: bool) -> None:
    sizes = {"tokens": 20, "hidden": 70, "intermediate": 101}
    packed, wide = random_quantised(scheme, activation=activation, interleaved=interleaved, biases=biases, **sizes)
    assert_close(run(packed), wide)


@given(
    tokens=st.integers(0, 60),
    hidden=st.integers(1, 90),
    intermediate=st.integers(1, 90),
    experts=st.integers(1, 5),
    top_k=st.integers(1, 3),
    block=st.sampled_from([32, 64, 96]),
    interleaved=st.booleans(),
    biases=st.booleans(),
    explicit_score=st.booleans(),
    scheme=st.sampled_from([*SCHEMES]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_same_bits_as_float32_weights(scheme: str, block: int, **sizes: int) -> None:
    """Every path: one row, a few in place, many in panels; rows that end inside a group or a block."""
    packed, wide = random_quantised(scheme, block, **sizes)
    assert torch.equal(run(packed), run(wide))


@both
@pytest.mark.parametrize("tokens", [1, 3, 5, 24, 25, 130])
def test_same_bits_for_many_blocks(scheme: str, tokens: int) -> None:
    """More blocks than are widened at a time, and more depth than is packed at a time."""
    packed, wide = random_quantised(scheme, tokens=tokens, hidden=2148, intermediate=528, experts=2, top_k=1, tau=0.0)
    assert torch.equal(run(packed), run(wide))
    assert_close_to_float64(run(packed), wide)


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_activations(scheme: str, dtype: torch.dtype) -> None:
    packed, wide = random_quantised(scheme, tokens=30, hidden=45, intermediate=39, dtype=dtype, biases=True)
    assert torch.equal(run(packed), run(wide))
    assert_close(run(packed), wide)


@both
def test_same_bits_for_any_number_of_threads(scheme: str) -> None:
    packed, _ = random_quantised(scheme, tokens=100, hidden=160, intermediate=130)
    assert torch.equal(run(packed, threads=1), run(packed, threads=4))


@both
def test_experts_that_nobody_keeps_are_not_read(scheme: str) -> None:
    """Their scales are NaN: had one been read, NaN would be in the output."""
    packed, wide = random_quantised(scheme, tokens=6, experts=8, top_k=2, tau=0.45)
    kept = set(packed.expert_ids[keep_mask(packed)].tolist())
    assert 0 < len(kept) < 8
    for e in set(range(8)) - kept:
        for scales in (packed.gate_up_scales, packed.down_scales):
            assert scales is not None
            scales[e] = float("nan")
    assert_close(run(packed), wide)


@both
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("tokens", [1, 40])
def test_nothing_outside_the_weights_is_read(scheme: str, after: bool, tokens: int) -> None:
    packed, wide = random_quantised(scheme, tokens=tokens, hidden=45, intermediate=39, experts=2)
    guarded = packed.but(**{name: beside_a_guard(getattr(packed, name), after=after) for name in WEIGHTS})
    guarded = guarded.but(x=beside_a_guard(packed.x, after=after))
    assert torch.equal(run(guarded), run(wide))


@both
@pytest.mark.parametrize("offset", [1, 3, 31])
def test_weights_may_have_any_alignment(scheme: str, offset: int) -> None:
    packed, wide = random_quantised(scheme, tokens=40, hidden=45, intermediate=39)
    off = packed.but(**{name: at_byte_offset(getattr(packed, name).view(torch.uint8), offset).view(getattr(packed, name).dtype)
                        for name in WEIGHTS if getattr(packed, name).itemsize == 1})  # fmt: skip
    assert torch.equal(run(off), run(wide))


OTHERS = """
import pytest
raise SystemExit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-k", "not instruction_set and not onnxruntime",
                              "tests/kernels/test_quantised.py"]))
"""


@pytest.mark.skipif(bool(FORCED), reason="this run is already for one instruction set")
@pytest.mark.parametrize("isa", KNOWN)
def test_each_instruction_set(isa: str) -> None:
    if isa not in this_machine():
        pytest.skip(f"this machine has no {isa}")
    if isa not in ("avx512_bf16", "avx512"):  # these two have the same kernels for quantised weights
        python(OTHERS, MODES_ISA=isa)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("biases", [False, True])
def test_onnxruntime_runs_them(scheme: str, dtype: torch.dtype, biases: bool) -> None:
    packed, wide = random_quantised(scheme, tokens=30, hidden=45, intermediate=39, dtype=dtype, biases=biases, interleaved=True)
    if biases and dtype != torch.float32:  # of the weights' dtype in `random_case`
        assert packed.gate_up_bias is not None
        assert packed.gate_up_bias.dtype == torch.float32
    assert torch.equal(run_in_onnxruntime(packed), run(packed))
    assert_close(run_in_onnxruntime(packed), wide)


@both
def test_what_onnxruntime_refuses(scheme: str) -> None:
    packed, _ = random_quantised(scheme)
    gate_up_scales = packed.gate_up_scales
    assert gate_up_scales is not None
    wrong = [
        (packed.but(block=0), {}, "attribute block is `0`, expected a multiple of 32"),
        (packed.but(block=48), {}, "attribute block is `48`"),
        (packed, {"transposed": 1}, "quantised weights cannot be transposed"),
        (packed.but(down_scales=None), {}, "down_scales is missing"),
        (packed.but(gate_up_scales=gate_up_scales[:, :-1].contiguous()), {}, "gate_up_scales has shape `[6, 31, 1]`"),
        (packed.but(gate_up=packed.gate_up[..., :-1].contiguous()), {}, "gate_up has shape"),
    ]
    for case, attributes, message in wrong:
        with pytest.raises(Exception, match=r"modes\.SkipExperts") as caught:
            session(model(case, **attributes)).run(None, feeds(case))  # type: ignore[arg-type]
        assert message in str(caught.value)


@both
def test_what_pytorch_refuses(scheme: str) -> None:
    packed, _ = random_quantised(scheme)
    floats = random_case()
    gate_up_scales = packed.gate_up_scales
    assert gate_up_scales is not None
    wrong = [
        (packed.but(block=40), "block is `40`, must be a multiple of 32"),
        (packed.but(transposed=True), "cannot be transposed"),
        (packed.but(down_scales=None), "down_scales is missing"),
        (packed.but(gate_up_scales=None, down_scales=None), "down has shape|gate_up has shape|gate_up is"),
        (packed.but(gate_up_scales=gate_up_scales.float()), "gate_up_scales is `float32`, expected float16"),
        (packed.but(gate_up_scales=gate_up_scales[:, 1:].contiguous()), "gate_up_scales has shape"),
        (packed.but(gate_up=floats.gate_up), "gate_up"),
    ]
    for case, message in wrong:
        with pytest.raises(KernelError, match=message):
            run(case)
