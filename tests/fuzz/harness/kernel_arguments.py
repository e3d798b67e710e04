"""Arguments of the C interface: any sizes, enumerators, ids, values, null and odd pointers. A status comes back, always.

The bytes are the numbers of a call. Where the sizes are small, memory of exactly these sizes is given, so that a library built
with the address sanitizer sees a step outside; where they are large, only the workspace is asked for, which reads no memory.
"""

import ctypes
from random import Random

from modes_cli.errors import KernelError
from modes_cli.runtime import interface, kernels
from tests.fuzz.mutate import any_bytes as mutate
from tests.kernels import calling

__all__ = ["calling", "mutate", "one", "seeds"]  # `calling`: it takes the library that MODES_TEST_LIBRARY names

SIZES = (0, 1, 2, 3, 5, 16, 31, 32, 33, 64, 65)
HUGE = (-1, -(1 << 63), 1 << 31, 1 << 32, 1 << 40, (1 << 62) + 1, (1 << 63) - 1)
ODD = ("x", "expert_ids", "expert_weights", "group", "tau", "score_scale", "score", "out", "kept")  # those that are aligned
MOST = 1 << 22  # bytes of one tensor


def seeds() -> list[bytes]:
    return [Random(number).randbytes(48) for number in range(8)]


def one(data: bytes) -> None:
    rng = Random(data)  # the structure is what counts; libFuzzer's coverage cannot see into the library anyway
    args, memory = arguments(rng)
    size, message = ctypes.c_size_t(), interface.Message()
    library = kernels.load()
    status = library.modes_cpu_workspace_size(ctypes.byref(args), ctypes.byref(size), ctypes.byref(message))
    assert 0 <= status <= 7, f"status {status}"
    assert (status == 0) == (not message.text), f"status {status} with message {message.text!r}"
    if memory is None:
        if status != 0:
            raise KernelError(str(message))
        return
    offered: tuple[object, int] = (None, 0)
    workspace = None
    if rng.random() < 0.3 and status == 0:
        given = max(0, size.value + rng.choice([0, 0, -1, 64]))
        workspace = ctypes.create_string_buffer(given + 64)
        address = ctypes.addressof(workspace)
        offered = (address + (-address % 64) + rng.choice([0, 0, 0, 1]), given if given < size.value else size.value)
    ran = library.modes_cpu_skip_experts(ctypes.byref(args), None, *offered, ctypes.byref(message))
    assert 0 <= ran <= 7, f"status {ran}"
    assert (ran == 0) == (not message.text), f"status {ran} with message {message.text!r}"
    assert status == 0 or ran != 0, "sizes that were refused ran"
    if ran != 0:
        raise KernelError(str(message))


def arguments(rng: Random) -> tuple[interface.Args, dict[str, object] | None]:
    """A call, and the memory that it needs; None: too much, or the sizes make no sense."""
    values = {name: rng.choice(SIZES) for name in ("tokens", "hidden", "intermediate", "experts", "top_k", "groups")}
    if rng.random() < 0.2:
        values[rng.choice(list(values))] = rng.choice(HUGE)
    enums = {"activation_dtype": 3, "weight_dtype": 5, "id_dtype": 2, "activation": 3, "transposed": 2, "interleaved": 2,
             "score_scale_per_expert": 2}  # fmt: skip
    chosen = {name: rng.randrange(count) for name, count in enums.items()}
    if rng.random() < 0.1:
        chosen[rng.choice(list(enums))] = rng.choice([-1, 5, 99, -(1 << 31), (1 << 31) - 1])
    if chosen["weight_dtype"] in (3, 4) and rng.random() < 0.9:
        chosen["transposed"] = 0
    block = rng.choice([32, 32, 64, 0, -32, 31, 33, 1 << 40, (1 << 63) - 32])
    floats = (float("nan"), float("inf"), -1.0, 0.0, 1e38, 1.702, 7.0)
    args = interface.Args(struct_size=interface.SIZE if rng.random() < 0.97 else rng.choice([0, 8, interface.SIZE - 8]),
                          alpha=rng.choice(floats), limit=rng.choice(floats), threads=rng.choice([0, 1, 2, -1]), block=block,
                          **values, **chosen)  # fmt: skip
    need = sizes(args)
    if need is None:
        return args, None
    memory = {}
    for name, count in need.items():
        if rng.random() < 0.02 or (name in ("score", "kept", "gate_up_bias", "down_bias") and rng.random() < 0.5):
            continue  # null
        memory[name] = content(rng, name, count, args)
        skew = 1 if name in ODD and rng.random() < 0.01 else 0  # refused before it is read
        setattr(args, name, ctypes.addressof(memory[name]) + skew)
    return args, memory


def sizes(args: interface.Args) -> dict[str, int] | None:
    """Bytes of each tensor."""
    T, H, I, E, k, G = args.tokens, args.hidden, args.intermediate, args.experts, args.top_k, args.groups  # noqa: E741
    if min(T, H, I, E, k, G) < 0 or not 0 <= args.weight_dtype <= 4 or not 0 <= args.activation_dtype <= 2:
        return None
    a, w = (4, 2, 2)[args.activation_dtype], (4, 2, 2, 1, 1)[args.weight_dtype]
    quantised, halves = args.weight_dtype >= 3, args.weight_dtype == 4

    def stored(depth: int) -> int:
        filled = -(-depth // 32) * 32 if quantised else depth
        return filled // 2 if halves else filled

    block = args.block if args.block > 0 else 1
    bias = 4 if quantised else w
    found = {
        "x": T * H * a, "expert_ids": T * k * (8 if args.id_dtype == 0 else 4), "expert_weights": T * k * a, "group": T * 4,
        "tau": G * 4, "score_scale": G * (E if args.score_scale_per_expert else 1) * 4, "score": T * k * 4,
        "gate_up": E * 2 * I * stored(H) * w, "down": E * H * stored(I) * w, "gate_up_bias": E * 2 * I * bias,
        "down_bias": E * H * bias, "out": T * H * a, "kept": G * 8, "gate_up_scales": E * 2 * I * -(-H // block) * 2,
        "down_scales": E * H * -(-I // block) * 2,
    }  # fmt: skip
    return None if max(found.values()) > MOST else found


def content(rng: Random, name: str, count: int, args: interface.Args) -> ctypes.Array[ctypes.c_char]:
    """Exactly so many bytes: ids and groups that fit, mostly; anything else at random."""
    memory = (ctypes.c_char * count)()
    if name in ("expert_ids", "group"):
        wide = name == "expert_ids" and args.id_dtype == 0
        kind, width = (ctypes.c_int64, 8) if wide else (ctypes.c_int32, 4)
        limit = args.experts if name == "expert_ids" else args.groups
        numbers = (kind * (count // width)).from_buffer(memory) if count else []
        for index in range(len(numbers)):
            numbers[index] = rng.randrange(max(1, limit))
        if len(numbers) and rng.random() < 0.2:
            numbers[rng.randrange(len(numbers))] = rng.choice([-1, limit, (1 << (8 * width - 1)) - 1, -(1 << (8 * width - 1))])
    elif rng.random() < 0.7:
        piece = rng.randbytes(min(count, 512))
        memory.raw = (piece * (count // max(1, len(piece)) + 1))[:count]
    return memory
