"""What the library reads and writes: nothing outside its arguments, at any alignment, and of no other token or expert."""

import ctypes
import itertools
import mmap
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kernels.calling import (
    FLOATS,
    MODES_BAD_ARGUMENT,
    arguments,
    at_byte_offset,
    beside_a_guard,
    call,
    python,
    run,
    sanitized,
    workspace_bytes,
)
from tests.kernels.reference import Case, assert_close_to_float64, random_case

INF, NAN = float("inf"), float("nan")
INPUTS = ("x", "expert_ids", "expert_weights", "group", "tau", "score_scale", "score")
WEIGHTS = ("gate_up", "down", "gate_up_bias", "down_bias")
LAYOUTS = tuple(itertools.product([False, True], [False, True]))
PACKED, IN_PLACE = 100, 4  # tokens: with three experts, rows of an expert above and below the 12 that decide


def moved(case: Case, names: tuple[str, ...], move: object) -> Case:
    return case.but(**{name: move(getattr(case, name)) for name in names if getattr(case, name) is not None})  # type: ignore[operator]


def run_beside_guards(after: bool) -> None:
    """Every dtype and layout with every array of a call, its output and its workspace next to a page without access."""
    for hidden, intermediate, tokens in ((1, 1, 3), (45, 39, 3), (45, 39, 70), (97, 17, 40), (64, 96, 70), (33, 100, 13)):
        for dtype, weight_dtype, (transposed, interleaved) in itertools.product(FLOATS, FLOATS, LAYOUTS):
            case = random_case(tokens=tokens, hidden=hidden, intermediate=intermediate, experts=2, top_k=2, dtype=dtype,
                               weight_dtype=weight_dtype, transposed=transposed, interleaved=interleaved,
                               biases=tokens != 40, explicit_score=tokens == 13)  # fmt: skip
            print(hidden, intermediate, tokens, dtype, weight_dtype, transposed, interleaved, flush=True)
            expected = run(case)
            beside = moved(case, INPUTS + WEIGHTS, lambda tensor: beside_a_guard(tensor, after=after))
            out = beside_a_guard(torch.full_like(case.x, NAN), after=after)
            kept = beside_a_guard(torch.zeros(2, dtype=torch.int64), after=after)
            args = arguments(beside, out, kept=kept.data_ptr())
            size = workspace_bytes(args)
            # the library aligns its workspace: before a guard it can only end within 64 bytes of it
            workspace = beside_a_guard(torch.zeros(-(-size // 64) * 64, dtype=torch.uint8), after=after)[:size]
            assert call(args, workspace) == (0, "")
            assert torch.equal(out, expected)


@pytest.mark.parametrize("after", [False, True], ids=["ends at a guard page", "begins after one"])
def test_nothing_outside_the_arrays_is_touched_in_its_own_process(after: bool) -> None:
    python(f"from tests.kernels.test_memory import run_beside_guards; run_beside_guards({after})")


# In each child one array is an element shorter than the call says. `memory(tensor)` is where it begins.
ONE_ELEMENT_TOO_MANY = """
import ctypes
case = random_case(tokens=40, hidden=45, intermediate=39)
out = torch.empty_like(case.x)
for name in ("x", "gate_up", "down", "out"):
    tensor = out if name == "out" else getattr(case, name)
    code = in_a_child(lambda: calling.call(calling.arguments(case, out, **{name: memory(tensor)})))
    print(name, code)
"""


def test_guard_pages_do_catch_one_element_too_many_in_its_own_process() -> None:
    code = """
alive = []
def memory(tensor):
    alive.append(calling.beside_a_guard(tensor, after=False))
    return alive[-1].data_ptr() + 4
"""
    done = python(code + ONE_ELEMENT_TOO_MANY)
    crash = 1 if sanitized() else -signal.SIGSEGV
    assert done.stdout.splitlines() == [f"{name} {crash}" for name in ("x", "gate_up", "down", "out")], done.stderr


def test_the_sanitizer_does_catch_one_element_too_many_in_its_own_process() -> None:
    if not sanitized():
        pytest.skip("the library under test has no sanitizer: `make sanitize`")
    code = """
def memory(tensor):
    size = ctypes.c_size_t(tensor.numel() * 4 - 4)
    allocate = ctypes.CDLL(None).malloc
    allocate.restype = ctypes.c_void_p
    short = allocate(size)
    ctypes.memset(short, 0, size)
    return short
"""
    done = python(code + ONE_ELEMENT_TOO_MANY)
    assert done.stdout.splitlines() == [f"{name} 1" for name in ("x", "gate_up", "down", "out")], done.stderr
    assert done.stderr.count("ERROR: AddressSanitizer: heap-buffer-overflow") == 4
    assert done.stderr.count("READ of size") == 3
    assert done.stderr.count("WRITE of size") == 1


@pytest.mark.parametrize("offset", [1, 2, 3, 5])
@pytest.mark.parametrize("weight_dtype", FLOATS)
@pytest.mark.parametrize("tokens", [PACKED, IN_PLACE])
def test_weights_may_have_any_alignment(tokens: int, weight_dtype: torch.dtype, offset: int) -> None:
    for dtype, (transposed, interleaved) in itertools.product((torch.float32, torch.bfloat16), LAYOUTS):
        case = random_case(tokens=tokens, hidden=70, intermediate=50, experts=3, dtype=dtype, weight_dtype=weight_dtype,
                           transposed=transposed, interleaved=interleaved, biases=True)  # fmt: skip
        assert case.gate_up.data_ptr() % 4 == 0
        shifted = moved(case, WEIGHTS, lambda tensor: at_byte_offset(tensor, offset))
        assert shifted.gate_up.data_ptr() % 4 == offset % 4
        assert torch.equal(run(shifted), run(case))


def test_weights_may_be_read_from_a_mapped_file(tmp_path: Path) -> None:
    case = random_case(tokens=PACKED, hidden=70, intermediate=50, weight_dtype=torch.bfloat16)
    weights = {name: getattr(case, name) for name in ("gate_up", "down")}
    data = b"{}}" + b"".join(w.view(torch.uint8).numpy().tobytes() for w in weights.values())  # an odd offset
    (tmp_path / "weights").write_bytes(data)
    with (tmp_path / "weights").open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    at = 3
    for name, weight in weights.items():
        weights[name] = torch.frombuffer(memory, dtype=weight.dtype, count=weight.numel(), offset=at).view(weight.shape)
        at += weight.numel() * 2
    assert torch.equal(run(case.but(**weights)), run(case))


@pytest.mark.parametrize("name", ["x", "expert_ids", "expert_weights", "group", "tau", "score_scale", "score", "out"])
def test_other_arrays_must_be_aligned(name: str) -> None:
    case = random_case(explicit_score=True)
    out = torch.empty_like(case.x)
    pointer = (out if name == "out" else getattr(case, name)).data_ptr()
    status, message = call(arguments(case, out, **{name: pointer + 1}))
    assert status == MODES_BAD_ARGUMENT
    assert message.startswith(f"{name} is not aligned")


def dtype_pairs() -> list[tuple[torch.dtype, torch.dtype]]:
    return [*itertools.product(FLOATS, FLOATS)]


def break_token(x: Tensor, token: int, value: float) -> Tensor:
    x = x.clone()
    x[token, x.shape[1] // 2] = value
    return x


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("tokens", [PACKED, IN_PLACE])
@pytest.mark.parametrize(("dtype", "weight_dtype"), dtype_pairs())
def test_a_broken_token_stays_alone(dtype: torch.dtype, weight_dtype: torch.dtype, tokens: int, value: float) -> None:
    for transposed, interleaved in LAYOUTS:
        case = random_case(tokens=tokens, hidden=30, intermediate=35, experts=3, dtype=dtype, weight_dtype=weight_dtype,
                           transposed=transposed, interleaved=interleaved, tau=0.0)  # fmt: skip
        sound = run(case)
        assert sound.isfinite().all()
        for token in {0, tokens // 2, tokens - 1}:
            out = run(case.but(x=break_token(case.x, token, value)))
            others = torch.arange(tokens) != token
            assert torch.equal(out[others], sound[others])
            assert not out[token].isfinite().all()
            if value != value:
                assert out[token].isnan().all()


@pytest.mark.parametrize("tokens", [PACKED, IN_PLACE])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_token_with_nan_routing_weights_is_nan_and_stays_alone(dtype: torch.dtype, tokens: int) -> None:
    case = random_case(tokens=tokens, experts=3, dtype=dtype, weight_dtype=dtype, tau=0.0)
    weights = case.expert_weights.clone()
    weights[tokens - 1] = NAN
    out = run(case.but(expert_weights=weights))
    assert out[-1].isnan().all()
    assert torch.equal(out[:-1], run(case)[:-1])


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("tokens", [PACKED, IN_PLACE])
def test_a_broken_expert_breaks_its_own_tokens_only(tokens: int, name: str, value: float) -> None:
    for (dtype, weight_dtype), (transposed, interleaved) in itertools.product(dtype_pairs(), LAYOUTS):
        case = random_case(tokens=tokens, hidden=30, intermediate=35, experts=3, top_k=2, dtype=dtype, biases=True,
                           weight_dtype=weight_dtype, transposed=transposed, interleaved=interleaved, tau=0.0)  # fmt: skip
        sound = run(case)
        weight = getattr(case, name).clone()
        weight[1].view(-1)[[0, -1]] = value
        out = run(case.but(**{name: weight}))
        whole = (case.expert_ids != 1).all(-1)
        assert torch.equal(out[whole], sound[whole])
        if value != value:  # an infinity may come out as 0, through the sigmoid
            assert not out[~whole].isfinite().all(-1).any()


def test_values_too_large_for_the_output_become_infinite() -> None:
    for dtype, (transposed, interleaved) in itertools.product(FLOATS, LAYOUTS):
        case = random_case(tokens=PACKED, dtype=dtype, transposed=transposed, interleaved=interleaved, tau=0.0)
        out = run(case.but(down=case.down * 1e38))
        assert out.isinf().any()
        assert_close_to_float64(run(case.but(x=case.x * 0)), case.but(x=case.x * 0))


@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32])
def test_a_wrong_expert_id_is_reported_before_anything_is_read(id_dtype: torch.dtype) -> None:
    bits = 62 if id_dtype == torch.int64 else 30
    for tokens, bad in itertools.product((PACKED, IN_PLACE), (3, -1, 2**bits, -(2**bits))):
        case = random_case(tokens=tokens, experts=3, id_dtype=id_dtype, tau=INF)  # though no pair is kept
        case.expert_ids[tokens - 1, 1] = bad
        out = torch.full_like(case.x, 7.0)
        # weights at an address that cannot be read
        status, message = call(arguments(case, out, gate_up=ctypes.c_void_p(64), down=ctypes.c_void_p(64)))
        assert status == 3
        assert message == f"expert id `{bad}` of token {tokens - 1}, slot 1 is not in 0..2"
