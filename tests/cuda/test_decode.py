"""The path of few tokens: groups of 8 rows, weights shared by warps, and only the weights of experts that have rows."""

import pytest
import torch
from torch import Tensor

from tests.cuda.calling import SEEDS, Device, chosen_path, run
from tests.cuda.layers import layer
from tests.kernels.calling import at_byte_offset, python
from tests.kernels.reference import ACTIVATIONS, Case, assert_close, assert_close_to_float64, random_case

BF16, F16 = torch.bfloat16, torch.float16
DTYPES = pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
TRANSPOSED = pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
LAYOUTS = pytest.mark.parametrize(
    ("transposed", "interleaved"),
    [(False, False), (False, True), (True, False), (True, True)],
    ids=["rows", "rows_interleaved", "transposed", "transposed_interleaved"],
)


@LAYOUTS
@DTYPES
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 33, 64])
def test_numbers_of_tokens(device: Device, tokens: int, dtype: torch.dtype, transposed: bool, interleaved: bool) -> None:
    case = random_case(
        tokens=tokens, hidden=104, intermediate=56, dtype=dtype, weight_dtype=dtype, biases=tokens % 2 == 1, tau=0.2,
        transposed=transposed, interleaved=interleaved, activation=ACTIVATIONS[tokens % 3], seed=tokens,
    )  # fmt: skip
    assert_close(run(device, case, path="decode"), case)


@TRANSPOSED
@pytest.mark.parametrize(
    "rows",
    [(1,), (8,), (0, 64), (1, 2, 0, 7, 8, 9, 37), (24, 25, 15), (32, 31, 1), (48, 16), (33, 31)],
    ids=lambda rows: "_".join(map(str, rows)),
)
def test_numbers_of_rows(device: Device, rows: tuple[int, ...], transposed: bool) -> None:
    """Where the rows that are multiplied at once end: 8, 24 (transposed) and 32."""
    case = layer(rows, BF16, hidden=72, intermediate=40, biases=True, transposed=transposed)
    assert_close_to_float64(run(device, case, path="decode"), case)


@TRANSPOSED
def test_more_rows_than_tokens(device: Device, transposed: bool) -> None:
    """A token may have an expert several times."""
    case = random_case(
        tokens=8, top_k=5, experts=2, hidden=72, intermediate=40, dtype=F16, weight_dtype=F16, transposed=transposed, tau=0.0
    )
    case = case.but(expert_ids=torch.ones_like(case.expert_ids))
    assert_close(run(device, case, path="decode"), case)


@LAYOUTS
@pytest.mark.parametrize(
    ("hidden", "intermediate", "rows"),
    [(8, 8, (2,)), (2048, 16, (1, 0, 3)), (1096, 24, (3, 8)), (24, 1064, (2, 6)), (104, 1064, (9, 1))],
    ids=lambda value: "_".join(map(str, value)) if isinstance(value, tuple) else str(value),
)
def test_depths(
    device: Device, hidden: int, intermediate: int, rows: tuple[int, ...], transposed: bool, interleaved: bool
) -> None:
    """One step of k for all warps, exactly one batch of steps for each, and several that end inside a step."""
    case = layer(
        rows, F16, hidden=hidden, intermediate=intermediate, biases=True, transposed=transposed, interleaved=interleaved
    )
    assert_close_to_float64(run(device, case, path="decode"), case)


@LAYOUTS
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("biases", [False, True], ids=["plain", "biases"])
def test_activations(device: Device, activation: str, biases: bool, transposed: bool, interleaved: bool) -> None:
    case = layer(
        (5, 0, 6), BF16, hidden=40, intermediate=48, activation=activation, biases=biases,
        transposed=transposed, interleaved=interleaved,
    )  # fmt: skip
    assert_close_to_float64(run(device, case, path="decode"), case)


@TRANSPOSED
def test_all_pairs_skipped(device: Device, transposed: bool) -> None:
    case = random_case(
        tokens=5, hidden=64, intermediate=32, dtype=BF16, weight_dtype=BF16, transposed=transposed, tau=float("inf")
    )
    assert not run(device, case, path="decode").any()


@TRANSPOSED
def test_the_nan_of_a_token_stays_there(device: Device, transposed: bool) -> None:
    """Beside it in the same products, past its last k, and in the lanes that repeat the last row."""
    case = layer((11, 0, 2, 1), BF16, hidden=40, intermediate=72, transposed=transposed)
    expected = run(device, case, path="decode")
    for token, value in ((0, float("nan")), (6, float("inf")), (13, float("nan"))):
        x = case.x.clone()
        x[token] = value
        out = run(device, case.but(x=x), path="decode")
        assert out[token].isnan().any()
        others = torch.arange(len(x)) != token
        assert torch.equal(out[others], expected[others])


@TRANSPOSED
@pytest.mark.parametrize(("rows", "hidden"), [((3, 0, 2), 1096), ((30, 0, 3), 136)], ids=["few", "many"])
def test_every_schedule_gives_the_same_bits(device: Device, rows: tuple[int, ...], hidden: int, transposed: bool) -> None:
    case = layer(rows, F16, hidden=hidden, intermediate=72, transposed=transposed)
    first, *others = (run(device, case, path="decode", seed=seed) for seed in SEEDS)
    for other in others:
        assert torch.equal(first, other)


@TRANSPOSED
@DTYPES
def test_as_the_plain_path(device: Device, dtype: torch.dtype, transposed: bool) -> None:
    """Both round the inner values to 16 bits, after sums in another order."""
    case = layer((20, 0, 13), dtype, hidden=64, intermediate=40, biases=True, transposed=transposed)
    decode, plain = (run(device, case, path=path).double() for path in ("decode", "plain"))
    unit = {BF16: 2.0**-8, F16: 2.0**-11}[dtype]
    assert (decode - plain).abs().max() <= 2 * unit * plain.abs().max()


READS_ONLY_KEPT = """
import ctypes, mmap, signal
from pathlib import Path
from tests.cuda.calling import Device, run

def hidden_but(weights, kept):  # a copy in memory that nobody may touch, but for those experts
    size = weights[0].numel() * weights.element_size()
    assert size % mmap.PAGESIZE == 0
    memory = mmap.mmap(-1, len(weights) * size)
    copy = torch.frombuffer(memory, dtype=weights.dtype).view(weights.shape).copy_(weights)
    for expert in set(range(len(weights))) - set(kept):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(copy[expert].data_ptr()), ctypes.c_size_t(size), 0) == 0
    return copy

device = Device("emulated 9.0", Path(sys.argv[1]), torch.device("cpu"), (9, 0))
for tokens in (1, 20):
    for transposed in (False, True):
        case = random_case(tokens=tokens, top_k=2, experts=7, hidden=128, intermediate=64, dtype=torch.bfloat16,
                           weight_dtype=torch.bfloat16, explicit_score=True, transposed=transposed)
        case.expert_ids[0] = torch.tensor([2, 5])
        case = case.but(tau=torch.full_like(case.tau, 0.5), score=torch.isin(case.expert_ids, torch.tensor([2, 5])).float())
        expected = run(device, case, path="decode")
        assert expected[0].all()

        def again(kept):
            alone = case.but(gate_up=hidden_but(case.gate_up, kept), down=hidden_but(case.down, kept))
            assert torch.equal(run(device, alone, path="decode"), expected)

        assert in_a_child(lambda: again([2, 5])) == 0
        assert in_a_child(lambda: again([2])) == -signal.SIGSEGV
"""


def test_reads_the_weights_of_kept_experts_only(emulated_library: object) -> None:
    python(READS_ONLY_KEPT.replace("sys.argv[1]", repr(str(emulated_library))))


@pytest.mark.parametrize(
    ("tokens", "path"), [(1, "decode"), (64, "decode"), (65, "mma")], ids=["one token", "most tokens", "more tokens"]
)
@pytest.mark.parametrize("device", ["emulated 8.0", "emulated 12.0"], indirect=True)
def test_is_chosen_for_few_tokens(device: Device, tokens: int, path: str) -> None:
    case = random_case(tokens=tokens, hidden=72, intermediate=40, dtype=BF16, weight_dtype=BF16)
    assert chosen_path(device, case) == path


@pytest.mark.parametrize(
    ("hidden", "intermediate", "dtype", "weight_dtype"),
    [(68, 40, BF16, BF16), (72, 44, BF16, BF16), (72, 40, BF16, F16), (72, 40, torch.float32, torch.float32)],
    ids=["hidden", "intermediate", "weights of another type", "float32"],
)
def test_refuses_what_it_does_not_compute(
    device: Device, hidden: int, intermediate: int, dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    case = random_case(tokens=7, hidden=hidden, intermediate=intermediate, dtype=dtype, weight_dtype=weight_dtype)
    assert "`decode`, which does not compute this layer" in chosen_path(device, case, path="decode")


def _moved(case: Case, name: str, offset: int) -> Case:
    tensor: Tensor = getattr(case, name)
    return case.but(**{name: at_byte_offset(tensor, offset)})


@pytest.mark.parametrize(("name", "offset"), [("x", 2), ("gate_up", 8), ("down", 1), ("gate_up_bias", 1), ("down_bias", 1)])
@pytest.mark.parametrize("device", ["emulated 9.0"], indirect=True)
def test_refuses_tensors_that_are_not_aligned(device: Device, name: str, offset: int) -> None:
    case = layer((4, 3), BF16, hidden=72, intermediate=40, biases=True)
    assert chosen_path(device, case, path="decode") == "decode"
    assert "`decode`, which does not compute this layer" in chosen_path(device, _moved(case, name, offset), path="decode")


@pytest.mark.parametrize("device", ["emulated 9.0"], indirect=True)
def test_biases_aligned_to_their_elements_only(device: Device) -> None:
    case = layer((4, 3), F16, hidden=72, intermediate=40, biases=True)
    moved = _moved(_moved(case, "gate_up_bias", 2), "down_bias", 2)
    assert torch.equal(run(device, moved, path="decode"), run(device, case, path="decode"))
