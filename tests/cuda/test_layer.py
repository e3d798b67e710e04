"""The C interface on CUDA devices: the whole layer against its definition, its edges, and what it refuses."""

import ctypes
import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from modes_cli.runtime import interface
from tests.cuda.calling import (
    ALIGNMENT,
    BAD_ARGUMENT,
    BAD_SHAPE,
    BAD_WORKSPACE,
    NO_DEVICE,
    OK,
    SEEDS,
    Device,
    call,
    chosen_path,
    environment,
    load,
    on_device,
    run,
    workspace,
    workspace_size,
)
from tests.kernels.calling import arguments, at_byte_offset, beside_a_guard
from tests.kernels.reference import (
    ACTIVATIONS,
    Case,
    assert_close,
    assert_close_to_float64,
    expert,
    kept_pairs,
    random_case,
    skip_experts_float64,
)

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("path", ["plain", None])
@pytest.mark.parametrize(("dtype", "weight_dtype"), [*itertools.product(FLOATS, FLOATS)])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_dtype(device: Device, path: str | None, dtype: torch.dtype, weight_dtype: torch.dtype, transposed: bool) -> None:
    # more rows per expert than a tile holds, and sizes that are no multiple of anything
    case = random_case(tokens=75, hidden=45, intermediate=39, experts=3, dtype=dtype, weight_dtype=weight_dtype,
                       transposed=transposed, biases=True)  # fmt: skip
    assert_close(run(device, case, path=path), case)


@pytest.mark.parametrize("path", ["plain", None])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("transposed", "interleaved"), [*itertools.product([False, True], [False, True])])
@pytest.mark.parametrize("biases", [False, True])
def test_every_layout(
    device: Device, path: str | None, activation: str, transposed: bool, interleaved: bool, biases: bool
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        case = random_case(tokens=20, hidden=72, intermediate=40, dtype=dtype, weight_dtype=dtype, activation=activation,
                           transposed=transposed, interleaved=interleaved, biases=biases)  # fmt: skip
        assert_close(run(device, case, path=path), case)


def terms(case: Case) -> torch.Tensor:
    """[T, 1]: what a token's outputs are the sum of, without signs: act(...) is rounded to 16 bits, and terms may cancel."""
    E, I = case.down.shape[0], case.down.shape[1 if case.transposed else 2]  # noqa: E741
    inner = case.but(gate_up=case.gate_up.double(), down=torch.eye(I, dtype=torch.float64).expand(E, I, I), down_bias=None)
    total = torch.zeros(case.x.shape, dtype=torch.float64)
    for j in range(case.expert_ids.shape[1]):
        for t, e in enumerate(case.expert_ids[:, j].tolist()):
            down = case.down[e].double().abs()
            value = expert(inner, e, case.x[t].double()).abs() @ (down if case.transposed else down.T)
            if case.down_bias is not None:
                value = value + case.down_bias[e].double().abs()
            total[t] += case.expert_weights[t, j].double().abs() * value
    return total.amax(-1, keepdim=True)


@given(
    tokens=st.integers(0, 40),
    hidden=st.integers(1, 50),
    intermediate=st.integers(1, 50),
    experts=st.integers(1, 9),
    top_k=st.integers(1, 5),
    groups=st.integers(1, 3),
    dtype=st.sampled_from(FLOATS),
    weight_dtype=st.sampled_from(FLOATS),
    activation=st.sampled_from(ACTIVATIONS),
    flags=st.tuples(*[st.booleans()] * 5),
    id_dtype=st.sampled_from([torch.int64, torch.int32]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_shapes(device: Device, flags: tuple[bool, ...], seed: int, **sizes: object) -> None:
    transposed, interleaved, biases, per_expert, explicit_score = flags
    case = random_case(transposed=transposed, interleaved=interleaved, biases=biases, per_expert=per_expert,
                       explicit_score=explicit_score, seed=seed, **sizes)  # type: ignore[arg-type]  # fmt: skip
    expected, tolerance = skip_experts_float64(case), ROUNDING[case.x.dtype] * (1 + terms(case))
    for path in ("plain", None):
        kept = torch.full_like(case.tau, -1, dtype=torch.int64)
        out = run(device, case, kept=kept, path=path, seed=seed % 5)
        assert ((out.double() - expected).abs() <= tolerance).all()
        assert torch.equal(kept, kept_pairs(case))


def test_sizes_around_a_tile(device: Device) -> None:
    for tokens, hidden, intermediate in itertools.product((31, 32, 33), (31, 32, 33), (32, 33)):
        case = random_case(tokens=tokens, hidden=hidden, intermediate=intermediate, experts=1, top_k=1, tau=0.0)
        assert_close(run(device, case, path="plain"), case)


@pytest.mark.parametrize("path", ["plain", None])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_broken_token_shows_in_its_own_output_only(device: Device, path: str | None, bad: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        case = random_case(tokens=40, hidden=32, intermediate=32, tau=0.0, dtype=dtype, weight_dtype=dtype)
        whole = run(device, case, path=path)
        x = case.x.clone()
        x[7, 3] = bad
        out = run(device, case.but(x=x), path=path)
        others = torch.arange(40) != 7
        assert torch.equal(out[others], whole[others])
        assert not out[7].isfinite().all()


@pytest.mark.parametrize("offset", [1, 2, 6, 8])
@pytest.mark.parametrize("weight_dtype", FLOATS)
def test_weights_of_any_alignment(device: Device, offset: int, weight_dtype: torch.dtype) -> None:
    if not device.emulated:
        pytest.skip("memory of a GPU is not mapped from files")
    case = random_case(tokens=12, hidden=16, intermediate=16, dtype=torch.bfloat16, weight_dtype=weight_dtype, biases=True)
    names = ("gate_up", "down", "gate_up_bias", "down_bias")
    moved = case.but(**{name: at_byte_offset(getattr(case, name), offset) for name in names})
    assert_close(run(device, moved), case)


@pytest.mark.parametrize("path", ["plain", None])
@pytest.mark.parametrize("after", [False, True])
def test_nothing_outside_the_arguments_is_touched(device: Device, path: str | None, after: bool) -> None:
    if not device.emulated:
        pytest.skip("compute-sanitizer sees it on a GPU")
    for dtype, hidden, tokens in ((torch.float32, 7, 5), (torch.bfloat16, 64, 40), (torch.float16, 72, 150)):
        case = random_case(tokens=tokens, hidden=hidden, intermediate=24, dtype=dtype, weight_dtype=dtype, biases=True)
        tensors = {name: getattr(case, name) for name in case.__dataclass_fields__}
        guarded = case.but(
            **{name: beside_a_guard(t, after=after) for name, t in tensors.items() if isinstance(t, torch.Tensor)}
        )
        out = beside_a_guard(torch.empty_like(case.x), after=after)
        kept = beside_a_guard(torch.zeros(2, dtype=torch.int64), after=after)
        args = arguments(guarded, out, kept=kept.data_ptr())
        memory = workspace(device, workspace_size(device, args))
        guarded_memory = beside_a_guard(memory, after=after)  # its size is a multiple of its alignment
        assert call(device, args, guarded_memory, path=path) == (OK, "")
        assert_close(out, case)
        assert torch.equal(kept, kept_pairs(case))


def test_the_same_bits_whatever_the_schedule(device: Device) -> None:
    for dtype, tokens in itertools.product(FLOATS, (5, 70)):
        case = random_case(tokens=tokens, hidden=64, intermediate=32, experts=3, dtype=dtype, weight_dtype=dtype, biases=True)
        first = run(device, case)
        for seed in SEEDS[:2]:
            assert torch.equal(run(device, case, seed=seed), first)


@pytest.mark.parametrize("top_k", [1, 2])
def test_more_tokens_than_one_round(device: Device, top_k: int) -> None:
    """A round has 32,768 tokens at most; two of about equal size are done here."""
    case = random_case(tokens=33_000, hidden=2, intermediate=1, experts=3, top_k=top_k, tau=0.9 / top_k)
    one_round = random_case(tokens=32_768, hidden=2, intermediate=1, experts=3, top_k=top_k)
    sizes = [workspace_size(device, arguments(c, c.x)) for c in (case, one_round)]
    assert sizes[0] == sizes[1]
    kept = torch.zeros(2, dtype=torch.int64)
    assert_close_to_float64(run(device, case, kept=kept), case)
    assert torch.equal(kept, kept_pairs(case))


def test_the_workspace_never_shrinks_with_more_tokens(device: Device) -> None:
    case = random_case()
    args = arguments(case, case.x, hidden=4096, intermediate=14336, experts=8)
    last = 0
    for tokens in (0, 1, 8, 683, 684, 5000, 32_768, 32_769, 40_000, 1_000_000):
        args.tokens = tokens
        size = workspace_size(device, args)
        assert last <= size < 5 << 29  # 2.5 GiB
        last = size


def test_a_workspace_that_does_not_do_is_refused(device: Device) -> None:
    case = on_device(device, random_case())
    out = torch.empty_like(case.x)
    args = arguments(case, out)
    size = workspace_size(device, args)
    memory = workspace(device, size + ALIGNMENT)
    assert call(device, args, None) == (BAD_WORKSPACE, f"the workspace is null, needs {size} bytes")
    for bad in (memory[: size - 1], memory[64 : 64 + size]):
        status, message = call(device, args, bad)
        assert status == BAD_WORKSPACE
        assert f"the workspace has `{bad.numel()}` bytes" in message
        assert message.endswith(f"needs {size} aligned to 256")
    assert call(device, args, memory[:size]) == (OK, "")


def test_no_tokens_need_no_memory_and_clear_the_counts(device: Device) -> None:
    case = on_device(device, random_case(tokens=0))
    kept = torch.full((2,), 7, dtype=torch.int64, device=device.memory)
    assert call(device, arguments(case, case.x, kept=kept.data_ptr()), None) == (OK, "")
    assert kept.tolist() == [0, 0]
    nothing = dict.fromkeys(("x", "expert_ids", "expert_weights", "group", "out"))
    assert call(device, arguments(case, case.x, **nothing), None) == (OK, "")


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"struct_size": 8}, BAD_ARGUMENT, "modes_args has 8 bytes"),
        ({"tokens": -1}, BAD_SHAPE, "tokens is `-1`, must be at least 0"),
        ({"experts": 1025}, BAD_SHAPE, "experts is `1025`, must be at most 1024 on a CUDA device"),
        ({"top_k": 65}, BAD_SHAPE, "top_k is `65`, must be at most 64 on a CUDA device"),
        ({"hidden": 2**20 + 1}, BAD_SHAPE, "hidden is `1048577`, must be at most 1048576 on a CUDA device"),
        ({"intermediate": 2**21}, BAD_SHAPE, "intermediate is `2097152`, must be at most 1048576 on a CUDA device"),
        ({"tokens": 2**30}, BAD_SHAPE, "tokens * top_k is `3221225472`, must be below 2^31 on a CUDA device"),
        ({"activation_dtype": 3}, BAD_ARGUMENT, "activation_dtype is `3`, must be 0..2"),
        ({"weight_dtype": 3, "block": 32}, BAD_ARGUMENT, "quantised weights are not on CUDA yet; they run on the CPU"),
        ({"gate_up": None}, BAD_ARGUMENT, "gate_up is null"),
        ({"tau": 2}, BAD_ARGUMENT, "tau is not aligned to 4 bytes"),
    ],
)
def test_wrong_arguments_are_refused_with_their_value(
    device: Device, changes: dict[str, object], status: int, message: str
) -> None:
    case = on_device(device, random_case())
    args = arguments(case, torch.empty_like(case.x), **changes)
    got, text = call(device, args, workspace(device, 1 << 16))
    assert got == status
    assert message in text


def test_null_arguments_are_refused(device: Device) -> None:
    library, message = load(device.library), interface.Message()
    assert library.modes_cuda_skip_experts(None, None, None, 0, None) == BAD_ARGUMENT
    assert library.modes_cuda_workspace_size(None, None, ctypes.byref(message)) == BAD_ARGUMENT
    assert str(message) == "bytes is null"
    assert library.modes_cuda_devices(None, ctypes.byref(message)) == BAD_ARGUMENT
    assert str(message) == "count is null"


def test_a_path_can_be_forced(device: Device) -> None:
    case = random_case()
    assert chosen_path(device, case, path="plain") == "plain"
    assert chosen_path(device, case) in ("hopper", "decode", "mma", "float")
    refused = chosen_path(device, case, path="triton")
    assert refused.startswith("MODES_CUDA_PATH is `triton`, expected one of ")
    assert set(refused.rpartition(" of ")[2].split(", ")) == {"hopper", "decode", "mma", "float", "plain"}
    half = random_case(hidden=23, dtype=torch.float16, weight_dtype=torch.float32)
    assert chosen_path(device, half) == "plain"
    for path in ("hopper", "float"):
        assert chosen_path(device, half, path=path).startswith(f"MODES_CUDA_PATH is `{path}`, which does not compute this")
    own = on_device(device, half)
    args = arguments(own, torch.empty_like(own.x))
    assert call(device, args, workspace(device, workspace_size(device, args)), path="float")[0] == BAD_ARGUMENT


def test_devices_are_counted(device: Device) -> None:
    count, message = ctypes.c_int32(-1), interface.Message()
    assert load(device.library).modes_cuda_devices(ctypes.byref(count), ctypes.byref(message)) == OK
    assert count.value >= 1


@pytest.mark.parametrize("device", ["emulated 8.0"], indirect=True)
def test_without_a_device_the_library_says_so(device: Device) -> None:
    count, message, library = ctypes.c_int32(-1), interface.Message(), load(device.library)
    case = random_case()
    args = arguments(case, torch.empty_like(case.x))
    memory = workspace(device, workspace_size(device, args))
    with environment(MODES_EMULATED_DEVICE="none"):
        assert library.modes_cuda_devices(ctypes.byref(count), ctypes.byref(message)) == OK
        assert count.value == 0
        status = library.modes_cuda_skip_experts(
            ctypes.byref(args), None, memory.data_ptr(), memory.numel(), ctypes.byref(message)
        )
    assert status == NO_DEVICE
    assert str(message).startswith("no CUDA device (")
