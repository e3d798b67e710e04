"""Threads: the same bits for any number of them, calls at the same time, a fork in between."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from modes_cli.runtime import kernels
from tests.kernels.calling import FLOATS, python, run
from tests.kernels.reference import assert_close_to_float64, random_case

THREADS = (2, 3, 4, 7, 16)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("dtype", "weight_dtype"), [*itertools.product(FLOATS, FLOATS)])
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype, weight_dtype: torch.dtype, transposed: bool) -> None:
    # large enough for tasks to be handed out in each step, experts of few rows and of many
    for tokens, experts in ((120, 7), (20, 7), (150, 1), (5, 1)):
        case = random_case(tokens=tokens, hidden=250, intermediate=140, experts=experts, dtype=dtype,
                           weight_dtype=weight_dtype, transposed=transposed)  # fmt: skip
        alone = run(case, threads=1)
        for threads in THREADS:
            assert torch.equal(run(case, threads=threads), alone)
        assert_close_to_float64(alone, case)


@pytest.mark.parametrize("dtype", FLOATS)
def test_same_bits_when_one_expert_of_many_has_all_rows(dtype: torch.dtype) -> None:
    case = random_case(tokens=300, hidden=256, intermediate=192, experts=8, top_k=1, dtype=dtype, weight_dtype=dtype, tau=0.0)
    case = case.but(expert_ids=torch.full((300, 1), 5))
    alone = run(case, threads=1)
    for threads in THREADS:
        for _ in range(3):
            assert torch.equal(run(case, threads=threads), alone)
    assert_close_to_float64(alone, case)


@pytest.mark.parametrize("dtype", FLOATS)
def test_same_bits_for_the_same_call_again(dtype: torch.dtype) -> None:
    """Scratch memory is used again: what is left in it from larger and smaller calls shows in none."""
    sizes = ((90, 33, 65), (4, 97, 17), (300, 40, 23), (13, 200, 120))
    cases = [random_case(tokens=t, hidden=h, intermediate=i, dtype=dtype, weight_dtype=dtype) for t, h, i in sizes]
    first = [run(case) for case in cases]
    poison = [case.but(x=torch.full_like(case.x, float("nan"))) for case in cases]
    for index in (3, 0, 2, 1, 1, 2, 0, 3):
        run(poison[(index + 1) % 4])
        assert torch.equal(run(cases[index]), first[index])


def test_calls_from_many_threads_at_once() -> None:
    cases = [random_case(tokens=60, hidden=128, intermediate=128, dtype=FLOATS[seed % 3], seed=seed) for seed in range(8)]
    alone = [run(case, threads=1) for case in cases]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for out, expected in zip(pool.map(lambda case: run(case, threads=3), cases), alone, strict=True):
                assert torch.equal(out, expected)


def test_works_in_a_forked_child_of_its_own_process() -> None:
    python("""
case = random_case(tokens=60, hidden=128, intermediate=128)
before = calling.run(case, threads=3)
def work():
    assert calling.run(case, threads=3).equal(before)

assert in_a_child(work) == 0
assert calling.run(case, threads=3).equal(before)
""")


def test_the_number_of_threads_is_what_was_set_last() -> None:
    library = kernels.load()
    default = library.modes_cpu_threads()
    assert default >= 1
    library.modes_cpu_set_threads(5)
    assert library.modes_cpu_threads() == 5
    case = random_case(tokens=60, hidden=128, intermediate=128)
    assert torch.equal(run(case, threads=0), run(case, threads=1))
    library.modes_cpu_set_threads(0)
    assert library.modes_cpu_threads() == default
