"""How the kernel tests call the library: through the package, through the C interface, in a process of its own.

MODES_TEST_LIBRARY names the library to test instead of the installed one. Only tests read it: a variable that made the
product load another library would let whoever sets it run code.
"""

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from modes_cli.runtime import interface, kernels, libraries
from tests.kernels.reference import ALPHA, LIMIT, Case

ROOT = Path(__file__).parents[2]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
MODES_BAD_ARGUMENT = 1
PREAMBLE = """
import os, sys
import torch
from tests.kernels import calling
from tests.kernels.reference import random_case

def in_a_child(work):  # its exit code
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            work()
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""
UNDER_TEST = os.environ.get("MODES_TEST_LIBRARY")

if UNDER_TEST:
    assert kernels.load.cache_info().currsize == 0, "the installed library is loaded already"
    kernels.library_path = libraries.library_path = lambda _name=libraries.CPU: Path(UNDER_TEST)


def library() -> Path:
    path = kernels.library_path()
    assert path is not None
    return path


def sanitized() -> bool:
    """Whether the library under test is built with the address sanitizer."""
    return b"__asan_init" in library().read_bytes()


def run(case: Case, *, kept: Tensor | None = None, threads: int | None = None) -> Tensor:
    return kernels.skip_experts(
        case.x, case.expert_ids, case.expert_weights, case.group, case.tau, case.score_scale, case.gate_up, case.down,
        case.gate_up_bias, case.down_bias, case.activation, ALPHA, LIMIT, case.transposed, case.interleaved,
        score=case.score, gate_up_scales=case.gate_up_scales, down_scales=case.down_scales, block=case.block, kept=kept,
        threads=threads,
    )  # fmt: skip


def arguments(case: Case, out: Tensor, /, **changes: object) -> interface.Args:
    """The C structure of a call; `changes` replace fields. Tensors must live until the call returns."""
    T, H = case.x.shape
    fields: dict[str, object] = {
        "struct_size": ctypes.sizeof(interface.Args),
        "tokens": T,
        "hidden": H,
        "intermediate": case.down.shape[1 if case.transposed else 2],
        "experts": case.down.shape[0],
        "top_k": case.expert_ids.shape[1],
        "groups": case.tau.shape[0],
        "activation_dtype": interface.DTYPES[case.x.dtype],
        "weight_dtype": interface.DTYPES[case.gate_up.dtype],
        "id_dtype": interface.ID_DTYPES[case.expert_ids.dtype],
        "activation": interface.ACTIVATIONS[case.activation],
        "alpha": ALPHA,
        "limit": LIMIT,
        "transposed": case.transposed,
        "interleaved": case.interleaved,
        "score_scale_per_expert": case.score_scale.dim() == 2,
        "threads": 1,
        "out": out.data_ptr(),
    }
    for name in ("x", "expert_ids", "expert_weights", "group", "tau", "score_scale", "score", "gate_up", "down",
                 "gate_up_bias", "down_bias"):  # fmt: skip
        tensor = getattr(case, name)
        fields[name] = None if tensor is None else tensor.data_ptr()
    return interface.Args(**{**fields, **changes})


def call(args: interface.Args, workspace: Tensor | None = None) -> tuple[int, str]:
    """Status and message of modes_cpu_skip_experts."""
    message = interface.Message()
    memory = (None, 0) if workspace is None else (workspace.data_ptr(), workspace.numel())
    status = kernels.load().modes_cpu_skip_experts(ctypes.byref(args), None, *memory, ctypes.byref(message))
    return status, message.text.decode()


def workspace_bytes(args: interface.Args) -> int:
    size, message = ctypes.c_size_t(), interface.Message()
    status = kernels.load().modes_cpu_workspace_size(ctypes.byref(args), ctypes.byref(size), ctypes.byref(message))
    assert status == 0, message.text
    return size.value


def beside_a_guard(tensor: Tensor, *, after: bool) -> Tensor:
    """A copy whose first byte follows, or whose last byte precedes, a page that nobody may touch."""
    size = tensor.numel() * tensor.element_size()
    page = mmap.PAGESIZE
    inside = -(-size // page) * page
    memory = mmap.mmap(-1, inside + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for guard in (start, start + page + inside):
        assert protect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
    offset = page if after else page + inside - size
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)
    return copy.copy_(tensor)


def at_byte_offset(tensor: Tensor, offset: int) -> Tensor:
    """A copy whose address is `offset` bytes past a multiple of 64."""
    memory = mmap.mmap(-1, tensor.numel() * tensor.element_size() + offset)
    return torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape).copy_(tensor)


def python(code: str, *, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own, with the library under test. Fails with what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", f"{PREAMBLE}\n{code}"],
        env={**os.environ, **environment},
        timeout=250,
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if check and done.returncode != 0:
        raise AssertionError(f"exit code {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done
