"""The Hopper path: tiles that end inside an expert, rings that wrap, weights read where they are."""

from collections.abc import Sequence

import pytest
import torch

from tests.cuda.calling import SEEDS, Device, chosen_path, run
from tests.kernels.reference import ACTIVATIONS, Case, assert_close_to_float64, random_case

pytestmark = pytest.mark.parametrize("device", ["emulated 9.0", pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])


def layer(
    rows: Sequence[int],
    *,
    hidden: int = 64,
    intermediate: int = 136,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    activation: str = "silu",
    biases: bool = False,
    interleaved: bool = False,
    transposed: bool = False,
) -> Case:
    """Expert e gets rows[e] tokens, which are among the others' in any order. Every pair is kept."""
    case = random_case(
        tokens=sum(rows), top_k=1, experts=len(rows), hidden=hidden, intermediate=intermediate, dtype=dtype,
        weight_dtype=dtype, tau=0.0, activation=activation, biases=biases, interleaved=interleaved, transposed=transposed,
        seed=seed,
    )  # fmt: skip
    ids = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows))
    return case.but(expert_ids=ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))][:, None])


def on_hopper(device: Device, case: Case, seed: int | None = None) -> torch.Tensor:
    if device.capability != (9, 0):
        pytest.skip(f"{device} is {device.capability}, the path needs 9.0")
    return run(device, case, path="hopper", seed=seed)


def test_rows_that_fill_tiles_and_that_do_not(device: Device) -> None:
    case = layer([1, 64, 0, 65, 128, 0, 129, 300, 0])
    assert_close_to_float64(on_hopper(device, case), case)


@pytest.mark.parametrize(("hidden", "intermediate"), [(64, 8), (72, 120), (200, 128), (520, 136), (8, 264), (264, 384)])
def test_columns_that_fill_tiles_and_that_do_not(device: Device, hidden: int, intermediate: int) -> None:
    case = layer([66, 0, 1], hidden=hidden, intermediate=intermediate)
    assert_close_to_float64(on_hopper(device, case), case)


@pytest.mark.parametrize("interleaved", [False, True], ids=["apart", "interleaved"])
@pytest.mark.parametrize("biases", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@HALVES
def test_variants(device: Device, dtype: torch.dtype, activation: str, biases: bool, interleaved: bool) -> None:
    case = layer([17, 0, 70], hidden=72, intermediate=136, dtype=dtype, activation=activation, biases=biases,
                 interleaved=interleaved)  # fmt: skip
    assert_close_to_float64(on_hopper(device, case), case)


@pytest.mark.parametrize("tokens", [1, 65, 150])
def test_thresholds_and_several_slots(device: Device, tokens: int) -> None:
    case = random_case(
        tokens=tokens, top_k=3, experts=5, hidden=136, intermediate=72, dtype=torch.bfloat16, weight_dtype=torch.bfloat16
    )
    assert_close_to_float64(on_hopper(device, case), case)


def test_nothing_kept(device: Device) -> None:
    case = layer([40, 60])
    assert not on_hopper(device, case.but(tau=torch.full_like(case.tau, torch.inf))).any()


@pytest.mark.parametrize("experts", [33, 1024])
def test_many_experts_with_few_rows(device: Device, experts: int) -> None:
    """Experts without rows, more of them in a row than a warp looks at, before, between and after."""
    rows = [0] * experts
    for e, count in ((0, 1), (1, 2), (experts // 2, 70), (experts - 2, 1)):
        rows[e] = count
    case = layer(rows, hidden=64, intermediate=16)
    assert_close_to_float64(on_hopper(device, case), case)


def test_same_bits_whatever_the_schedule(device: Device) -> None:
    case = layer([129, 0, 1], hidden=136, intermediate=136, biases=True)
    first = on_hopper(device, case)
    assert_close_to_float64(first, case)
    for seed in SEEDS:
        assert torch.equal(on_hopper(device, case, seed), first)


@pytest.mark.parametrize("path", ["mma", "plain"])
def test_agrees_with_the_other_paths(device: Device, path: str) -> None:
    """Closer than to float64: `inner` is rounded alike."""
    case = layer([3, 0, 66], hidden=136, intermediate=200)
    actual, other = on_hopper(device, case).float(), run(device, case, path=path).float()
    assert (actual - other).abs().max() <= 2**-7 * other.abs().max()


def test_a_nan_stays_in_its_token(device: Device) -> None:
    case = layer([70, 6], intermediate=72)
    x = case.x.clone()
    x[50, 3], x[60, 63] = torch.nan, torch.inf
    whole, broken = on_hopper(device, case), on_hopper(device, case.but(x=x))
    others = [t for t in range(len(x)) if t not in (50, 60)]
    assert broken[50].isnan().any()
    assert torch.equal(broken[others], whole[others])


def test_what_it_does_not_compute(device: Device) -> None:
    small = layer([3, 70])
    if device.capability != (9, 0):
        pytest.skip(f"{device} is {device.capability}, the path needs 9.0")
    assert chosen_path(device, small, path="hopper") == "hopper"
    assert chosen_path(device, small) == "hopper"
    misaligned = torch.empty(small.down.numel() + 1, dtype=small.down.dtype)[1:].view_as(small.down)
    others = {
        "transposed": layer([3, 70], transposed=True),
        "hidden": layer([3, 70], hidden=68),
        "intermediate": layer([3, 70], intermediate=12),
        "float32": layer([3, 70], dtype=torch.float32),
        "mixed": small.but(x=small.x.half(), expert_weights=small.expert_weights.half()),
        "misaligned": small.but(down=misaligned),
    }
    for name, case in others.items():
        assert "MODES_CUDA_PATH is `hopper`" in chosen_path(device, case, path="hopper"), name
        assert chosen_path(device, case) != "hopper", name


@pytest.mark.parametrize("tau", [0.0, 0.2])
def test_a_real_layer(device: Device, tau: float) -> None:
    """Sizes of Qwen3-VL-30B-A3B, every ring and every block many times around, against the portable kernels."""
    if device.emulated:
        pytest.skip("too large for an emulated device")
    case = random_case(
        tokens=4096, top_k=8, experts=128, hidden=2048, intermediate=768, dtype=torch.bfloat16,
        weight_dtype=torch.bfloat16, tau=tau,
    )  # fmt: skip
    actual, other = on_hopper(device, case), run(device, case, path="mma")
    assert (actual.float() - other.float()).abs().max() <= 2**-6 * other.float().abs().max()
    for _ in range(20):
        assert torch.equal(on_hopper(device, case), actual)
