"""One set of kernels for each instruction set: all that this machine has are tested, each in a process of its own."""

import os
import platform
from pathlib import Path

import pytest

from modes_cli.runtime import kernels
from tests.kernels.calling import MODES_BAD_ARGUMENT, library, python, sanitized

KNOWN = ("avx512_bf16", "avx512", "avx2", "baseline")  # widest first
# The tests that need no process of their own, and what others would start one for: a crash fails this one as well.
EVERYTHING = """
import pytest
from tests.kernels.test_memory import run_beside_guards
for after in (False, True):
    run_beside_guards(after)
files = [f"tests/kernels/test_{name}.py" for name in ("shapes", "memory", "threads")]
left_out = "not own_process and not number_of_threads and not number_of_tokens"  # how work is split is the same for all
raise SystemExit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-k", left_out, *files]))
"""
FORCED = os.environ.get("MODES_ISA")


def this_machine() -> tuple[str, ...]:
    """What the processor says, widest first."""
    found = ["baseline"]
    if platform.machine() in ("x86_64", "AMD64"):
        text = Path("/proc/cpuinfo").read_text("ascii").split("flags", 1)[1].splitlines()[0]
        flags = set(text.split())
        for isa, needed in (
            ("avx2", {"avx2", "fma", "f16c"}),
            ("avx512", {"avx512f", "avx512bw", "avx512vl", "avx512dq"}),
            ("avx512_bf16", {"avx512_bf16"}),
        ):
            if not needed <= flags:
                break
            found.insert(0, isa)
    return tuple(found)


def test_the_widest_of_the_machine_is_chosen() -> None:
    assert python("print(calling.kernels.isa())", MODES_ISA="").stdout.strip() == this_machine()[0]
    assert kernels.isa() in this_machine()


@pytest.mark.skipif(bool(FORCED), reason="this run is already for one instruction set")
@pytest.mark.parametrize("isa", KNOWN)
def test_each_instruction_set(isa: str) -> None:
    if isa not in this_machine():
        pytest.skip(f"this machine has no {isa}")
    assert python("print(calling.kernels.isa())", MODES_ISA=isa).stdout.strip() == isa
    if isa == kernels.isa():
        return  # what every other test of this folder has run
    python(EVERYTHING, MODES_ISA=isa)


def test_an_instruction_set_that_is_unknown_or_missing_fails_every_call() -> None:
    """Nothing falls back in silence: whoever measures avx512 must not be given avx2."""
    refused = ["avx1024", "AVX2", "avx2 ", "none", *(isa for isa in KNOWN if isa not in this_machine())]
    code = f"""
def work():
    os.environ["MODES_ISA"] = isa
    for tokens in (3, 0, 40):
        case = random_case(tokens=tokens)
        print(*calling.call(calling.arguments(case, case.x.clone())))
    print(calling.kernels.isa())

for isa in {refused!r}:
    assert in_a_child(work) == 0
"""
    lines = iter(python(code, MODES_ISA="").stdout.splitlines())
    for isa in refused:
        for _ in range(3):
            line = next(lines)
            assert line.startswith(f"{MODES_BAD_ARGUMENT} MODES_ISA is `{isa}`, ")
            for name in this_machine():
                assert name in line
        assert next(lines) == this_machine()[0]
    assert next(lines, None) is None


def test_the_library_under_test_is_the_one_that_is_loaded() -> None:
    assert kernels.load()._name == str(library())
    assert sanitized() == ("libasan" in os.environ.get("LD_PRELOAD", ""))
