"""The report on registers and spills: how it is read, and what the one in docs says."""

import json
from pathlib import Path

import pytest

from kernels.bench.ptxas import ARCHITECTURES, KERNELS, ONLY, parse, readable

REPORT = KERNELS.parent / "docs" / "benchmarks" / "cuda-ptxas.json"
SAID = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4downILi2EEvPf' for 'sm_90a'
ptxas info    : Function properties for _Z4downILi2EEvPf
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 154 registers, used 1 barriers, 1024 bytes smem
ptxas info    : Function properties for _Z6helperv
    32 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function '_Z5routePi' for 'sm_90a'
ptxas info    : Function properties for _Z5routePi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, 352 bytes cmem[0]
"""


def test_reads_what_the_compiler_says() -> None:
    down, route = parse("some.cu", SAID)
    assert (down.kernel, down.architecture, down.registers) == ("_Z4downILi2EEvPf", "90a", 154)
    assert (down.shared_bytes, down.stack_bytes, down.spill_bytes) == (1024, 16, 12)
    assert (route.kernel, route.registers, route.shared_bytes, route.spill_bytes) == ("_Z5routePi", 12, 0, 0)


def test_names_are_readable() -> None:
    if readable(["_Z5routePi"]) == {"_Z5routePi": "_Z5routePi"}:
        pytest.skip("no c++filt here")
    assert readable(["_ZN5modes3gpu5routeEPi", "_Z4downILi2EEvPf"]) == {
        "_ZN5modes3gpu5routeEPi": "route",
        "_Z4downILi2EEvPf": "down<2>",
    }


def test_the_report_covers_every_kernel_file_and_shows_no_spills() -> None:
    found = json.loads(REPORT.read_text("utf-8"))["kernels"]
    covered = {(row["file"], row["architecture"]) for row in found}
    files = {path.name for path in Path(KERNELS, "cuda").glob("*.cu")}
    assert covered == {(name, architecture) for name in files for architecture in ONLY.get(name, ARCHITECTURES)}
    assert not [row for row in found if row["spill_bytes"]]
