"""Sizes at which a kernel changes its way through the work: rows of an expert, tokens, odd widths; and its rounding."""

import itertools

import pytest
import torch

from tests.kernels.calling import FLOATS, run
from tests.kernels.reference import (
    ACTIVATIONS,
    Case,
    assert_close,
    assert_close_to_float64,
    error,
    keep_mask,
    kept_pairs,
    random_case,
)

# Every number of rows that could be a tile, a panel, or one more or less than a few of them.
ROWS = (*range(14), 15, 16, 17, 23, 24, 25, 31, 32, 33, 36, 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129, 200)
ODD = (1, 3, 17, 31, 33, 95, 97, 1023)
LAYOUTS = tuple(itertools.product([False, True], [False, True]))


def with_rows(rows: tuple[int, ...], **sizes: object) -> Case:
    """Expert e is the only expert of rows[e] tokens; the tokens of all experts are shuffled."""
    case = random_case(tokens=sum(rows), experts=len(rows), top_k=1, tau=0.0, **sizes)  # type: ignore[arg-type]
    ids = torch.arange(len(rows)).repeat_interleave(torch.tensor(rows))
    return case.but(expert_ids=ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(1))][:, None])


@pytest.mark.parametrize(("transposed", "interleaved"), LAYOUTS)
@pytest.mark.parametrize(("dtype", "weight_dtype"), [*itertools.product(FLOATS, FLOATS)])
def test_any_number_of_rows_of_an_expert(
    dtype: torch.dtype, weight_dtype: torch.dtype, transposed: bool, interleaved: bool
) -> None:
    layout = {"dtype": dtype, "weight_dtype": weight_dtype, "transposed": transposed, "interleaved": interleaved}
    for hidden, intermediate in ((40, 23), (33, 64)):
        case = with_rows(ROWS, hidden=hidden, intermediate=intermediate, biases=True, **layout)
        assert_close_to_float64(run(case), case)


@pytest.mark.parametrize("rows", [1, 2, 12, 13, 25, 64, 65, 200])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_one_expert_has_all_rows(rows: int, activation: str, dtype: torch.dtype) -> None:
    for transposed, interleaved in LAYOUTS:
        case = with_rows((0, rows, 0), hidden=96, intermediate=97, dtype=dtype, weight_dtype=dtype, activation=activation,
                         transposed=transposed, interleaved=interleaved)  # fmt: skip
        assert_close_to_float64(run(case), case)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("weight_dtype", FLOATS)
@pytest.mark.parametrize("hidden", ODD)
def test_odd_sizes(hidden: int, weight_dtype: torch.dtype, transposed: bool) -> None:
    dtype = torch.bfloat16 if weight_dtype == torch.bfloat16 else torch.float32
    for intermediate in ODD if hidden < 1023 else ODD[:-1]:
        case = with_rows((3, 14), hidden=hidden, intermediate=intermediate, dtype=dtype, weight_dtype=weight_dtype,
                         transposed=transposed, interleaved=intermediate % 3 == 0, biases=True)  # fmt: skip
        # of the layer's largest: one output alone may be what is left of large terms
        assert error(run(case), case) < (1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 255, 256, 257, 2048, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_tokens(tokens: int, dtype: torch.dtype) -> None:
    case = random_case(tokens=tokens, hidden=20, intermediate=12, experts=5, top_k=2, dtype=dtype, weight_dtype=dtype)
    kept = torch.full((2,), -1, dtype=torch.int64)
    assert_close_to_float64(run(case, kept=kept), case)
    assert torch.equal(kept, kept_pairs(case))


@pytest.mark.parametrize("dtype", FLOATS)
def test_no_tokens_and_no_kept_pairs(dtype: torch.dtype) -> None:
    for tokens in (0, 1, 13, 300):
        case = random_case(tokens=tokens, dtype=dtype, weight_dtype=dtype, biases=True, tau=float("inf"))
        kept = torch.full((2,), -1, dtype=torch.int64)
        assert torch.equal(run(case, kept=kept), torch.zeros_like(case.x))
        assert kept.tolist() == [0, 0]


def test_many_experts_of_which_few_have_rows() -> None:
    case = random_case(tokens=60, hidden=33, intermediate=17, experts=300, top_k=1, tau=0.0)
    case = case.but(expert_ids=torch.tensor([299, 0, 7]).repeat(20)[:, None])
    assert_close(run(case), case)


def test_one_token_may_name_an_expert_twice() -> None:
    for tokens in (1, 30):
        case = random_case(tokens=tokens, top_k=4, tau=0.1)
        case = case.but(expert_ids=torch.tensor([[2, 2, 5, 2]]).expand(tokens, 4))
        assert_close(run(case), case)


def test_skipped_pairs_leave_the_rows_of_others_in_place() -> None:
    case = random_case(tokens=400, hidden=24, intermediate=24, experts=4, top_k=4, groups=3, tau=0.25)
    share = keep_mask(case).float().mean()
    assert 0.2 < share < 0.8
    assert_close_to_float64(run(case), case)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "tokens", "most"),
    [
        (torch.float32, torch.float32, 512, 1e-5),
        (torch.float32, torch.bfloat16, 64, 1e-5),  # the weights are exact, whatever they are stored as
        (torch.float32, torch.float16, 64, 1e-5),
        (torch.float16, torch.float16, 64, 1e-3),
        (torch.bfloat16, torch.bfloat16, 512, 6e-3),
        (torch.bfloat16, torch.float32, 64, 6e-3),
    ],
)
def test_rounding_of_a_layer_of_real_size(
    dtype: torch.dtype, weight_dtype: torch.dtype, tokens: int, most: float, transposed: bool
) -> None:
    case = random_case(tokens=tokens, hidden=1024, intermediate=384, experts=8 if tokens == 512 else 2, top_k=2, groups=1,
                       tau=0.3, dtype=dtype, weight_dtype=weight_dtype, transposed=transposed)  # fmt: skip
    assert error(run(case), case) < most
    few = case.but(**{name: getattr(case, name)[:7] for name in ("x", "expert_ids", "expert_weights", "group")})
    assert error(run(few), few) < most
