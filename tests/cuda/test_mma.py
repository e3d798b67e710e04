"""The tensor-core path of sm_80 and newer: tiles that end inside an expert, a layer or a stage; every layout."""

from pathlib import Path

import pytest
import torch

from tests.cuda.calling import SEEDS, Device, chosen_path, run
from tests.cuda.layers import layer
from tests.kernels.calling import at_byte_offset
from tests.kernels.reference import ACTIVATIONS, assert_close, assert_close_to_float64, random_case

# Two multiprocessors: the large tiles below are chosen because there is one for each.
pytestmark = pytest.mark.parametrize("device", ["emulated 8.0", pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)

BF16, F16 = torch.bfloat16, torch.float16
DTYPES = pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
LAYOUTS = pytest.mark.parametrize(
    ("transposed", "interleaved"),
    [(False, False), (False, True), (True, False), (True, True)],
    ids=["rows", "rows_interleaved", "transposed", "transposed_interleaved"],
)
ROWS = (0, 1, 63, 0, 64, 65, 129, 0)  # tiles of 64 rows, and experts without rows first, last and between
MANY_ROWS = (0, 1, 190, 0, 64, 65, 129, 128, 0)  # more than 64 an expert: tiles of 128, some of them half empty


@LAYOUTS
@DTYPES
def test_rows_columns_and_depths_that_end_inside_a_tile(
    device: Device, dtype: torch.dtype, transposed: bool, interleaved: bool
) -> None:
    case = layer(
        ROWS, dtype, hidden=136, intermediate=72, activation="swiglu_oai", biases=True,
        transposed=transposed, interleaved=interleaved,
    )  # fmt: skip
    assert_close_to_float64(run(device, case, path="mma"), case)


@LAYOUTS
@DTYPES
def test_large_tiles(device: Device, dtype: torch.dtype, transposed: bool, interleaved: bool) -> None:
    case = layer(MANY_ROWS, dtype, hidden=72, intermediate=136, biases=True, transposed=transposed, interleaved=interleaved)
    assert_close_to_float64(run(device, case, path="mma"), case)


@pytest.mark.parametrize(
    ("hidden", "intermediate"), [(8, 8), (8, 264), (264, 8), (32, 64), (96, 128), (520, 40)], ids=lambda v: str(v)
)
@pytest.mark.parametrize("rows", [(40, 1, 0, 70), (150, 120, 0, 2)], ids=["small", "large"])
def test_depths_shorter_and_longer_than_the_stages(
    device: Device, hidden: int, intermediate: int, rows: tuple[int, ...]
) -> None:
    case = layer(rows, BF16, hidden=hidden, intermediate=intermediate)
    assert_close_to_float64(run(device, case, path="mma"), case)


@pytest.mark.parametrize("biases", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@DTYPES
def test_activations_and_biases(device: Device, dtype: torch.dtype, activation: str, biases: bool) -> None:
    case = layer((9, 0, 21), dtype, hidden=40, intermediate=48, activation=activation, biases=biases)
    assert_close_to_float64(run(device, case, path="mma"), case)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gates_far_from_zero(device: Device, activation: str) -> None:
    """Where exp overflows, and where the square of a gate is large."""
    case = layer((17, 3), BF16, hidden=64, intermediate=64, activation=activation)
    case = case.but(x=case.x * torch.logspace(-3, 6, 20)[:, None].to(BF16))
    assert_close_to_float64(run(device, case, path="mma"), case)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gates_whose_squares_are_infinite(device: Device, activation: str) -> None:
    case = layer((17, 3), BF16, hidden=64, intermediate=64, activation=activation)
    gate, up = case.gate_up.chunk(2, dim=1)
    case = case.but(gate_up=torch.cat([gate * 1e20, up * 1e-10], dim=1))
    assert_close_to_float64(run(device, case, path="mma"), case)


@pytest.mark.parametrize("experts", [1, 31, 33, 100])
def test_skipped_pairs_and_many_experts(device: Device, experts: int) -> None:
    case = random_case(
        tokens=40, top_k=min(experts, 4), experts=experts, hidden=64, intermediate=32, dtype=BF16, weight_dtype=BF16, tau=0.2
    )
    assert_close(run(device, case, path="mma"), case)


def test_all_pairs_skipped(device: Device) -> None:
    case = random_case(tokens=5, hidden=64, intermediate=32, dtype=BF16, weight_dtype=BF16, tau=float("inf"))
    assert not run(device, case, path="mma").any()


@pytest.mark.parametrize("rows", [ROWS, MANY_ROWS], ids=["small", "large"])
def test_the_nan_of_a_token_stays_there(device: Device, rows: tuple[int, ...]) -> None:
    case = layer(rows, BF16, hidden=40, intermediate=136)
    x = case.x.clone()
    x[7, 3] = float("nan")
    out = run(device, case.but(x=x), path="mma")
    assert out[7].isnan().all()
    others = torch.arange(len(x)) != 7
    assert torch.equal(out[others], run(device, case, path="mma")[others])


@pytest.mark.parametrize("rows", [ROWS, MANY_ROWS], ids=["small", "large"])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
def test_every_schedule_gives_the_same_bits(device: Device, rows: tuple[int, ...], transposed: bool) -> None:
    case = layer(rows, F16, hidden=136, intermediate=72, transposed=transposed)
    first, *others = (run(device, case, path="mma", seed=seed) for seed in SEEDS)
    for other in others:
        assert torch.equal(first, other)


@DTYPES
def test_as_the_plain_path(device: Device, dtype: torch.dtype) -> None:
    """Both round the inner values to 16 bits, after sums in another order."""
    case = layer((30, 0, 35), dtype, hidden=64, intermediate=40, biases=True)
    mma, plain = (run(device, case, path=path).double() for path in ("mma", "plain"))
    unit = {BF16: 2.0**-8, F16: 2.0**-11}[dtype]
    assert (mma - plain).abs().max() <= 2 * unit * plain.abs().max()


@pytest.mark.parametrize("capability", [(8, 6), (8, 9), (9, 0), (12, 0)], ids=str)
def test_other_devices(device: Device, emulated_library: Path, capability: tuple[int, int]) -> None:
    if not device.emulated:
        pytest.skip("there is one GPU")
    other = Device("emulated {}.{}".format(*capability), emulated_library, torch.device("cpu"), capability)
    case = layer((150, 150), BF16, hidden=72, intermediate=40)
    assert capability == (9, 0) or chosen_path(other, case) == "mma"
    assert_close_to_float64(run(other, case, path="mma"), case)


@pytest.mark.parametrize(
    ("hidden", "intermediate", "dtype", "weight_dtype"),
    [(68, 40, BF16, BF16), (72, 44, BF16, BF16), (72, 40, BF16, F16), (72, 40, F16, torch.float32)],
    ids=["hidden", "intermediate", "weights of another type", "float32 weights"],
)
def test_refuses_what_it_does_not_compute(
    device: Device, hidden: int, intermediate: int, dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    case = random_case(tokens=70, hidden=hidden, intermediate=intermediate, dtype=dtype, weight_dtype=weight_dtype)
    assert "`mma`, which does not compute this layer" in chosen_path(device, case, path="mma")


@pytest.mark.parametrize(("name", "offset"), [("x", 2), ("gate_up", 8), ("down", 1), ("gate_up_bias", 1), ("down_bias", 1)])
def test_refuses_tensors_that_are_not_aligned(device: Device, name: str, offset: int) -> None:
    if not device.emulated:
        pytest.skip("pointers into host memory")
    case = layer((40, 30), BF16, hidden=72, intermediate=40, biases=True)
    assert chosen_path(device, case, path="mma") == "mma"
    case = case.but(**{name: at_byte_offset(getattr(case, name), offset)})
    assert "`mma`, which does not compute this layer" in chosen_path(device, case, path="mma")


def test_biases_aligned_to_their_elements_only(device: Device) -> None:
    if not device.emulated:
        pytest.skip("pointers into host memory")
    case = layer((20, 45), F16, hidden=72, intermediate=40, biases=True)
    biases = {name: at_byte_offset(getattr(case, name), 2) for name in ("gate_up_bias", "down_bias")}
    assert torch.equal(run(device, case.but(**biases), path="mma"), run(device, case, path="mma"))
