"""Block-wise symmetric quantisation: its error, its edges, its layout, and what becomes of a loaded model."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from modes_cli.errors import BadModel, BadOption
from modes_cli.models.blocks import find_moe_blocks
from modes_cli.models.loading import load
from modes_cli.models.quantization import BLOCK, SCHEMES, WEIGHTS, Scheme, blocks_of, dequantise, quantise, quantise_experts
from modes_cli.requests import ModelSpec
from tests.families import FAMILIES

INT8, INT4 = SCHEMES["int8"], SCHEMES["int4"]
both = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)


def scale_of_each(scales: Tensor, depth: int, block: int) -> Tensor:
    return scales.double().repeat_interleave(block, -1)[..., :depth]


@given(
    rows=st.integers(1, 5),
    depth=st.integers(1, 200),
    block=st.sampled_from([32, 64, 96]),
    exponents=st.tuples(st.integers(-149, 15), st.integers(-149, 15)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    scheme=st.sampled_from([INT8, INT4]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=200, deadline=None)
def test_the_error_is_at_most_half_a_scale(
    rows: int, depth: int, block: int, exponents: tuple[int, int], dtype: torch.dtype, scheme: Scheme, seed: int
) -> None:
    """Denormals, zeros and sizes that are no multiple of a block included; and the scale is no larger than it must be."""
    g = torch.Generator().manual_seed(seed)
    low, high = min(exponents), max(exponents)
    power = torch.randint(low, high + 1, (rows, depth), generator=g)
    weights = torch.ldexp(torch.randn(rows, depth, generator=g).clamp(-3, 3), power).to(dtype)
    weights[torch.rand(rows, depth, generator=g) < 0.2] = 0
    stored, scales = quantise(weights, scheme, block)
    assert (stored.dtype, stored.shape) == (scheme.dtype, (rows, scheme.stored(depth)))
    assert (scales.dtype, scales.shape) == (torch.float16, (rows, blocks_of(depth, block)))
    back = dequantise(stored, scales, scheme, depth, block)
    each = scale_of_each(scales, depth, block)
    assert ((back.double() - weights.double()).abs() <= each / 2).all()
    largest = torch.nn.functional.pad(weights.double(), (0, -depth % block)).unflatten(-1, (-1, block)).abs().amax(-1)
    assert (scales.double() <= (largest / scheme.most) * (1 + 2**-10) + 2**-24).all()
    assert ((scales == 0) == (largest == 0)).all()


@both
def test_what_was_quantised_is_quantised_to_itself(scheme: Scheme) -> None:
    weights = torch.randn(7, 100, generator=torch.Generator().manual_seed(1))
    once = dequantise(*quantise(weights, scheme), scheme, 100)
    assert torch.equal(dequantise(*quantise(once, scheme), scheme, 100), once)


@both
def test_zeros_stay_zeros(scheme: Scheme) -> None:
    stored, scales = quantise(torch.zeros(2, 40), scheme)
    assert not stored.any()
    assert not scales.any()
    assert torch.equal(dequantise(stored, scales, scheme, 40), torch.zeros(2, 40))


@both
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_is_refused(scheme: Scheme, value: float) -> None:
    weights = torch.ones(3, 70)
    weights[2, 69] = value
    with pytest.raises(ValueError, match="not finite"):
        quantise(weights, scheme)


def test_what_no_float16_scale_reaches_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`1e\+30` is too large"):
        quantise(torch.tensor([[1e30]]), INT8)
    quantise(torch.tensor([[65504.0 * 127]]), INT8)


def test_the_layout_is_the_headers() -> None:
    """kernels/include/modes.h: of each 32 elements, byte i of 16 holds element i low and element 16 + i high."""
    numbers = torch.tensor([(i * 5) % 15 - 7 for i in range(64)])
    numbers[[0, 32]] = 7  # so that the scale of both blocks is 1
    stored, scales = quantise(numbers[None].float(), INT4)
    assert scales.tolist() == [[1.0, 1.0]]
    expected = [(int(numbers[g + i]) & 15) | (int(numbers[g + 16 + i]) & 15) << 4 for g in (0, 32) for i in range(16)]
    assert stored.tolist() == [expected]
    stored, scales = quantise(torch.arange(-3.0, 4.0)[None] * 127 / 3, INT8)
    assert stored.tolist() == [[-127, -85, -42, 0, 42, 85, 127] + [0] * 25]
    assert scales.tolist() == [[1.0]]


def test_bits_of_a_weight() -> None:
    for scheme, bits in ((INT8, 8.5), (INT4, 4.5)):
        stored, scales = quantise(torch.ones(1, 2048), scheme)
        assert (stored.nbytes + scales.nbytes) * 8 / 2048 == bits
        assert BLOCK == 32


@both
@pytest.mark.parametrize("family", ["internvl_qwen3_moe", "internvl_gpt_oss"])
def test_a_loaded_model_has_what_comes_back(scheme: Scheme, family: str) -> None:
    """In place, in the model's own dtype, along the input dimension in both layouts; nothing else changes."""
    model = FAMILIES[family]()[0].bfloat16()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    blocks = find_moe_blocks(model)
    assert blocks[0].transposed == (family == "internvl_gpt_oss")
    quantise_experts(blocks, scheme)
    changed = {f"{block.name}.{name}" for block in blocks for name in WEIGHTS}
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        if name not in changed:
            assert torch.equal(tensor, before[name])
            continue
        old = before[name].mT if blocks[0].transposed else before[name]
        expected = dequantise(*quantise(old, scheme), scheme, old.shape[-1]).bfloat16()
        assert torch.equal(tensor.mT if blocks[0].transposed else tensor, expected)
        assert not torch.equal(tensor, before[name])


def test_weights_that_cannot_be_quantised_are_named() -> None:
    model = FAMILIES["internvl_qwen3_moe"]()[0]
    blocks = find_moe_blocks(model)
    getattr(blocks[1].experts, "down_proj")[2, 0, 0] = float("nan")  # noqa: B009
    with pytest.raises(BadModel, match=rf"`{blocks[1].name}\.down_proj` cannot be quantised: a weight is not finite"):
        quantise_experts(blocks, INT8)


@pytest.mark.parametrize(("quantize", "offload", "message"), [("int3", False, "int8, int4"), ("int8", True, "--offload")])
def test_what_loading_refuses(quantize: str, offload: bool, message: str) -> None:
    with pytest.raises(BadOption, match=f"`--quantize {quantize}`.*{message}"):
        load(ModelSpec("digits", device="cpu", quantize=quantize, offload=offload))
