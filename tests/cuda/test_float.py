"""The float32 path: the same edges as the tensor-core path, and sums as exact as float32 is."""

import pytest
import torch

from tests.cuda.calling import SEEDS, Device, chosen_path, run
from tests.cuda.layers import layer
from tests.kernels.calling import at_byte_offset
from tests.kernels.reference import ACTIVATIONS, assert_close, assert_close_to_float64, error, random_case

pytestmark = pytest.mark.parametrize("device", ["emulated 9.0", pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)

F32 = torch.float32
ROWS = (0, 1, 63, 0, 64, 65, 129, 0)
LAYOUTS = pytest.mark.parametrize(
    ("transposed", "interleaved"),
    [(False, False), (False, True), (True, False), (True, True)],
    ids=["rows", "rows_interleaved", "transposed", "transposed_interleaved"],
)


@LAYOUTS
@pytest.mark.parametrize("biases", [False, True], ids=["plain", "biases"])
def test_rows_columns_and_depths_that_end_inside_a_tile(
    device: Device, transposed: bool, interleaved: bool, biases: bool
) -> None:
    case = layer(ROWS, F32, hidden=132, intermediate=68, biases=biases, transposed=transposed, interleaved=interleaved)
    out = run(device, case, path="float")
    assert_close_to_float64(out, case)
    assert error(out, case) < 2e-6


@pytest.mark.parametrize("activation", ACTIVATIONS)
@LAYOUTS
def test_activations(device: Device, activation: str, transposed: bool, interleaved: bool) -> None:
    case = layer(
        (9, 0, 21), F32, hidden=20, intermediate=36, activation=activation, biases=True,
        transposed=transposed, interleaved=interleaved,
    )  # fmt: skip
    assert_close_to_float64(run(device, case, path="float"), case)


@pytest.mark.parametrize(("hidden", "intermediate"), [(4, 4), (4, 132), (132, 4), (16, 64), (48, 128)], ids=lambda v: str(v))
def test_depths_shorter_and_longer_than_the_stages(device: Device, hidden: int, intermediate: int) -> None:
    case = layer((70, 1, 0, 40), F32, hidden=hidden, intermediate=intermediate)
    assert_close_to_float64(run(device, case, path="float"), case)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gates_far_from_zero(device: Device, activation: str) -> None:
    case = layer((17, 3), F32, hidden=64, intermediate=64, activation=activation)
    case = case.but(x=case.x * torch.logspace(-3, 6, 20)[:, None])
    assert_close_to_float64(run(device, case, path="float"), case)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gates_whose_squares_are_infinite(device: Device, activation: str) -> None:
    case = layer((17, 3), F32, hidden=64, intermediate=64, activation=activation)
    gate, up = case.gate_up.chunk(2, dim=1)
    case = case.but(gate_up=torch.cat([gate * 1e20, up * 1e-10], dim=1))
    assert_close_to_float64(run(device, case, path="float"), case)


@pytest.mark.parametrize("experts", [1, 33, 100])
def test_skipped_pairs_and_many_experts(device: Device, experts: int) -> None:
    case = random_case(tokens=40, top_k=min(experts, 4), experts=experts, hidden=36, intermediate=20, tau=0.2)
    assert_close(run(device, case, path="float"), case)


def test_the_nan_of_a_token_stays_there(device: Device) -> None:
    case = layer(ROWS, F32, hidden=20, intermediate=36)
    x = case.x.clone()
    x[7, 3] = float("nan")
    out = run(device, case.but(x=x), path="float")
    assert out[7].isnan().all()
    others = torch.arange(len(x)) != 7
    assert torch.equal(out[others], run(device, case, path="float")[others])


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
def test_every_schedule_gives_the_same_bits(device: Device, transposed: bool) -> None:
    case = layer(ROWS, F32, hidden=68, intermediate=36, transposed=transposed)
    first, *others = (run(device, case, path="float", seed=seed) for seed in SEEDS)
    for other in others:
        assert torch.equal(first, other)


def test_is_chosen_for_float32(device: Device) -> None:
    case = layer((150, 150), F32, hidden=20, intermediate=12)
    assert chosen_path(device, case) == "float"
    out = run(device, case)
    assert_close_to_float64(out, case)
    assert torch.allclose(out, run(device, case, path="plain"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("hidden", "intermediate", "weight_dtype"),
    [(18, 12, F32), (20, 14, F32), (20, 12, torch.bfloat16)],
    ids=["hidden", "intermediate", "weights of another type"],
)
def test_refuses_what_it_does_not_compute(device: Device, hidden: int, intermediate: int, weight_dtype: torch.dtype) -> None:
    case = random_case(tokens=70, hidden=hidden, intermediate=intermediate, weight_dtype=weight_dtype)
    assert "`float`, which does not compute this layer" in chosen_path(device, case, path="float")


@pytest.mark.parametrize(("name", "offset"), [("x", 4), ("gate_up", 8), ("down", 1), ("gate_up_bias", 2), ("down_bias", 1)])
def test_refuses_tensors_that_are_not_aligned(device: Device, name: str, offset: int) -> None:
    if not device.emulated:
        pytest.skip("pointers into host memory")
    case = layer((40, 30), F32, hidden=20, intermediate=12, biases=True)
    assert chosen_path(device, case, path="float") == "float"
    case = case.but(**{name: at_byte_offset(getattr(case, name), offset)})
    assert "`float`, which does not compute this layer" in chosen_path(device, case, path="float")
