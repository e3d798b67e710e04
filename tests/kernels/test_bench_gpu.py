"""The GPU benchmark and check without a GPU: a whole run on the CPU, what hangs or breaks, claims, tables, the script."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.bench import gpu_check, gpu_parts, ort_gpu, supervise
from kernels.bench.bench_gpu import broke
from kernels.bench.cases import Shape, random_layers, random_routings, reference, relative_error
from kernels.bench.claims_gpu import claims
from kernels.bench.gpu_parts import Context, Ended, Part
from kernels.bench.measure_gpu import GpuPlan
from kernels.bench.peers_torch import grouped_moe, sort_pairs
from kernels.bench.table_gpu import as_text, sections

ROOT = Path(__file__).parents[2]
SHAPE = Shape(64, 32, 8, 2)
RATIOS = [0.0, 0.5, 0.88]
PLAN = GpuPlan(SHAPE, "bfloat16", [1, 9], [0.0, 0.88], 2, device="cpu", side=64, size=1 << 20)

Json = dict[str, Any]


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Json:
    """A run of the command on the CPU."""
    out = tmp_path_factory.mktemp("bench") / "new" / "gpu.json"
    command = [sys.executable, "kernels/bench/bench_gpu.py", "--device", "cpu", "--shape", str(SHAPE), "--json", str(out)]
    command += ["--tokens", "1", "--tokens", "9", "--repetitions", "2", "--seconds", "200", "--patience", "120"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert "One layer, bfloat16, ms" in done.stdout
    found: Json = json.loads(out.read_text())
    return found


def test_a_run_has_a_right_row_for_every_runtime_and_case(record: Json) -> None:
    assert (record["errors"], record["left_out"]) == ([], [])
    found = {(row["runtime"], row["tokens"], row["skip_ratio"]) for row in record["rows"]}
    expected = set()
    for tokens in (1, 9):
        for ratio in (0.0, 0.5, 0.75, 0.88):
            expected |= {("modes", tokens, ratio), ("torch grouped_mm", tokens, ratio)}
            expected.add(("transformers grouped_mm" + (", dropped" if ratio else ""), tokens, ratio))
    assert found == expected | {("transformers eager", 1, 0.0)}
    for row in record["rows"]:
        assert row["right"], row
        low, high = row["quartiles"]
        assert 0 < low <= row["seconds"] <= high
        kept = max(1, round(row["tokens"] * 2 * (1 - row["skip_ratio"])))
        assert row["skipped"] == pytest.approx(1 - kept / (row["tokens"] * 2))
        assert 1 <= row["experts"] <= min(kept, 8)
        assert row["flops_fraction"] > 0
        assert row["bandwidth_fraction"] > 0
    assert set(record["limits"]) == {"product", "product_gate_up", "product_down", "copy", "read"}
    assert str(ROOT) not in json.dumps(record)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 40])
def test_the_layer_by_hand_is_the_reference(dtype: torch.dtype, tokens: int) -> None:
    layer, routed = random_layers(SHAPE, dtype, 1)[0], random_routings(SHAPE, dtype, tokens, RATIOS, 1)[0]
    for ratio in RATIOS:
        out = grouped_moe(layer, routed.x, routed.ids, routed.weights, routed.tau[ratio])
        assert relative_error(out, reference(layer, routed, ratio)) < (1e-5 if dtype == torch.float32 else 3e-2)


def test_pairs_are_sorted_by_expert_with_the_skipped_last() -> None:
    routed = random_routings(SHAPE, torch.float32, 40, RATIOS, 1)[0]
    pairs = sort_pairs(routed.ids, routed.weights, routed.tau[0.5], 8)
    kept = routed.kept(0.5)
    assert int(pairs.ends[-1]) == kept
    assert bool((pairs.expert[:kept] == routed.ids.flatten()[pairs.order[:kept]]).all())
    assert bool((pairs.expert[kept:] == 8).all())
    assert bool(routed.keep[0.5].flatten()[pairs.order[:kept]].all())


def test_some_tokens_of_a_call_are_a_call() -> None:
    layer, routed = random_layers(SHAPE, torch.float32, 1)[0], random_routings(SHAPE, torch.float32, 40, RATIOS, 1)[0]
    some = torch.tensor([0, 7, 39])
    torch.testing.assert_close(reference(layer, routed.of_tokens(some), 0.5), reference(layer, routed, 0.5)[some])


@pytest.mark.parametrize("tokens", [2048, 8192])
def test_of_very_many_pairs_nearly_the_wanted_share_is_skipped(tokens: int) -> None:
    routed = random_routings(Shape(4, 4, 128, 8), torch.bfloat16, tokens, [0.0, 0.88], 1, 1)[0]
    assert routed.kept(0.88) == pytest.approx(tokens * 8 * 0.12, abs=tokens * 8 / 500 + 1)


# -- what hangs or breaks -------------------------------------------------------------------------------------------------


def process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str) -> None:
    """Let the measuring process be these lines: `say(kind, **content)` tells, `without` and `tokens` are the plan's."""
    script = tmp_path / "process.py"
    script.write_text(
        "import json, sys, time\n"
        "plan, lines = json.loads(sys.argv[1]), open(sys.argv[2], 'a', buffering=1)\n"
        "tokens, without = plan['tokens'], plan['without']\n"
        "def say(kind, **content):\n"
        "    lines.write(json.dumps({'kind': kind, 'content': content}) + '\\n')\n" + body
    )
    original = subprocess.Popen

    def popen(command: list[str], **options: Any) -> Any:
        return original([sys.executable, str(script), *command[3:]], **options)

    monkeypatch.setattr(supervise.subprocess, "Popen", popen)


BREAKS = """
for t in tokens:
    for runtime in ("good", "bad"):
        if runtime not in without:
            say("start", runtime=runtime, tokens=t)
            if runtime == "bad" and t == 9:
                {how}
            say("row", runtime=runtime, tokens=t)
    say("done", tokens=t)
"""


@pytest.mark.parametrize(
    ("how", "reason"),
    [("time.sleep(60)", "nothing happened for 2 s"), ("sys.exit('illegal memory access')", "illegal memory access")],
)
def test_what_hangs_or_breaks_costs_only_its_own_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str, reason: str
) -> None:
    process(monkeypatch, tmp_path, BREAKS.format(how=how))
    found = supervise.supervised(PLAN, seconds=60, patience=2, say=lambda _text: None)
    rows = [(row["runtime"], row["tokens"]) for row in found.rows]
    assert rows == [("good", 1), ("bad", 1), ("good", 9)]
    (error,) = found.errors
    assert (error["runtime"], error["tokens"]) == ("bad", 9)
    assert reason in error["reason"]


def test_when_the_time_is_up_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    process(monkeypatch, tmp_path, "say('start', runtime='slow', tokens=1)\ntime.sleep(60)\n")
    started = time.monotonic()
    found = supervise.supervised(PLAN, seconds=1, patience=50, say=lambda _text: None)
    assert time.monotonic() - started < 20
    assert [error["reason"].split(":")[0] for error in found.errors] == ["no time left", "not measured", "not measured"]


def test_a_plan_survives_its_way_to_the_process() -> None:
    plan = GpuPlan(SHAPE, "float16", [1], [0.0], 3, without=frozenset({"b", "a"}))
    assert supervise._plan(supervise._as_text(plan)) == plan


# -- claims and tables on made-up rows ------------------------------------------------------------------------------------


def row(runtime: str, ms: float, *, tokens: int = 8192, ratio: float = 0.0, right: bool = True, **more: Any) -> Json:
    case = {"runtime": runtime, "path": None, "dtype": "bfloat16", "tokens": tokens, "skip_ratio": ratio, "seconds": ms / 1e3}
    return case | {"flops_fraction": 0.65, "bandwidth_fraction": 0.3, "error": 0.004, "right": right} | more


ROWS = [
    row("modes", 1.0, path="hopper"),
    row("modes", 0.5, ratio=0.88, bandwidth_fraction=0.8, path="hopper"),
    row("torch grouped_mm", 1.5),
    row("triton fused", 0.9),
    row("transformers grouped_mm", 0.4, right=False, error=0.7),
    row("modes", 4.0, tokens=32768),
    row("modes", 1.0, tokens=32768, ratio=0.88),
    row("modes", 0.03, tokens=1, bandwidth_fraction=0.72, path="decode"),
]


def case(runtime: str, seconds: float, ratio: float, phase: str = "prefill", batch: int = 8) -> Json:
    return {
        "phase": phase, "batch": batch, "runtime": runtime, "skip_ratio": ratio, "seconds": seconds, "speedup": 1.0,
        "limit_fraction": 0.55,
    }  # fmt: skip


CASES = [
    case("transformers", 0.3, 0.0),
    case("transformers (graph)", 0.1, 0.0),
    case("transformers+modes (graph)", 0.05, 0.8815),
    case("transformers (graph)", 0.012, 0.0, "decode", 1),
    case("transformers+modes", 0.01, 0.875, "decode", 1),
]


def answers(rows: list[Json], decoder: Json | None) -> dict[str, tuple[float | None, bool | None]]:
    return {claim["claim"]: (claim["measured"], claim["holds"]) for claim in claims(rows, decoder)}


def test_claims_are_the_issues() -> None:
    found = answers(ROWS, {"cases": CASES})
    assert found["layer, 8192 tokens: share of the matmul ceiling"] == (0.65, True)
    assert found["layer, 8192 tokens: over torch grouped_mm"] == (pytest.approx(1.5), True)
    assert found["layer, 8192 tokens: over triton fused"] == (pytest.approx(0.9), False)
    assert found["layer, 8192 tokens: over transformers grouped_mm"] == (None, None)  # its output is wrong
    assert found["layer, 8192 tokens, 88% skipped: share of the copy bandwidth"] == (0.8, True)
    assert found["layer, 8192 tokens, 88% skipped: over our own unskipped"] == (pytest.approx(2.0), True)
    assert found["layer, 32768 tokens, 88% skipped: over our own unskipped"] == (pytest.approx(4.0), False)
    assert found["layer, 1 tokens, 0% skipped: share of the copy bandwidth"] == (0.72, True)
    assert found["layer, 8 tokens, 0% skipped: share of the copy bandwidth"] == (None, None)
    share = " (55% of the limit)"
    assert found[f"decoder, prefill, 88% skipped: over transformers{share}"] == (pytest.approx(6.0), True)
    assert found[f"decoder, prefill, 88% skipped: over transformers (graph){share}"] == (pytest.approx(2.0), False)
    assert found[f"decoder, decode, batch 1, 88% skipped: over transformers (graph){share}"] == (pytest.approx(1.2), False)
    assert found["decoder, decode, batch 8, 88% skipped: over transformers (graph)"] == (None, None)


def test_tables_say_what_is_wrong() -> None:
    layer, claimed = sections({"rows": ROWS, "claims": claims(ROWS, None)})
    first = dict(zip(layer.header, layer.rows[0], strict=True))
    assert first == {
        "T": "8192", "skipped": "0%", "modes": "1.00", "path": "hopper", "FLOP/s": "65%", "bytes/s": "30%",
        "torch grouped_mm": "1.50 (1.5x)", "triton fused": "0.900 (0.9x)", "transformers grouped_mm": "wrong by 7.0e-01",
    }  # fmt: skip
    assert ["layer, 8192 tokens: over transformers grouped_mm", "-", ">= 1", "not measured"] in claimed.rows
    lines = as_text(layer).splitlines()
    assert lines[0] == "One layer, bfloat16, ms; shares of the measured limits"
    assert lines[1].split()[:6] == ["T", "skipped", "modes", "path", "FLOP/s", "bytes/s"]
    assert lines[2].index("0%") + 2 == lines[1].index("skipped") + len("skipped")


def test_only_what_is_ours_fails_a_run() -> None:
    right: Json = {"rows": ROWS, "errors": []}
    assert not broke(right)
    assert not broke(right | {"errors": [{"runtime": "triton fused", "reason": "x"}]})
    assert broke(right | {"errors": [{"runtime": "modes-hopper", "reason": "x"}]})
    assert broke(right | {"errors": [{"tokens": 1, "reason": "no time left"}]})
    assert broke({"rows": [*ROWS, row("modes", 1.0, right=False)], "errors": []})
    assert broke({"rows": [row("triton fused", 1.0)], "errors": []})


# -- the check ------------------------------------------------------------------------------------------------------------


def test_the_script_is_shell_and_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    script = ROOT / "kernels" / "bench" / "gpu_check.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)
    lacking = tmp_path / "nvidia-smi"
    lacking.write_text("#!/bin/sh\nexit 9\n")
    lacking.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([str(script)], capture_output=True, text=True, env=environment, timeout=20)
    assert (done.returncode, done.stdout) == (1, "")
    assert "error: no NVIDIA GPU on this machine" in done.stderr
    assert "hint: " in done.stderr


def test_parts_that_fail_are_reported_and_the_rest_runs(tmp_path: Path) -> None:
    seen: list[float] = []

    def good(context: Context, part: Part) -> None:
        part.results["x"] = dict(context.ok)
        seen.append(part.left())

    def bad(_context: Context, _part: Part) -> None:
        raise OSError("no such thing")

    parts = [("first", 100.0, 10.0, bad), ("second", 100.0, 5.0, good), ("third", 8.0, 3.0, good)]
    said: list[str] = []
    done = gpu_check.run_parts(parts, Context(tmp_path, time.monotonic() + 60), said.append)
    assert [part.ok for part in done] == [False, True, True]
    assert done[0].notes == ["OSError: no such thing"]
    assert done[1].results == {"x": {"first": False}}
    assert 50 < seen[0] <= 57  # what the third needs is kept for it
    assert seen[1] <= 8
    assert "first: FAILED in 0 s\n  OSError: no such thing" in said
    late = gpu_check.run_parts(parts[1:], Context(tmp_path, time.monotonic() - 1), said.append)
    assert [part.notes for part in late] == [["no time left"]] * 2


def test_a_command_is_stopped_with_what_it_started(tmp_path: Path) -> None:
    started = time.monotonic()
    ended = gpu_parts.run(["bash", "-c", "echo begun; sleep 60 & sleep 60"], 1.0, tmp_path)
    assert time.monotonic() - started < 10
    assert (ended.code, ended.last) == (None, "begun")


def test_reports_of_tests_are_read(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "@pytest.mark.gpu\n@pytest.mark.parametrize('x', [1, 2])\ndef test_equal(x):\n    assert x == 1\n"
        "@pytest.mark.gpu\ndef test_skipped():\n    pytest.skip('no')\n"
        "def test_not_for_a_gpu():\n    assert False\n"
    )
    context = Context(tmp_path, time.monotonic() + 100)
    found = gpu_parts.test_file(context, tmp_path / "test_some.py", 100)
    assert (found["passed"], found["skipped"], len(found["failures"])) == (1, 1, 1)
    assert "test_equal[2]" in found["failures"][0]
    (tmp_path / "test_broken.py").write_text("import no_such_module\n")
    (failure,) = gpu_parts.test_file(context, tmp_path / "test_broken.py", 100)["failures"]
    assert "test_broken" in failure


def test_every_file_with_tests_for_a_gpu_is_found() -> None:
    found = {path.name for path in ROOT.glob("tests/**/test_*.py") if gpu_parts._has_gpu_tests(path)}
    assert found >= {path.name for path in (ROOT / "tests" / "cuda").glob("test_*.py")}


@pytest.mark.parametrize(
    ("output", "code", "said"),
    [
        ("========= COMPUTE-SANITIZER\n6 layers are right\n========= ERROR SUMMARY: 0 errors\n", 0, "ERROR SUMMARY: 0 errors"),
        ("========= Invalid __global__ write of size 4\n========= ERROR SUMMARY: 1 error\n", 9,
         "ERROR SUMMARY: 1 error; Invalid __global__ write of size 4"),
        ("========= Error: Device not supported\n", 1, "Error: Device not supported"),
        ("", None, "stopped: it took too long"),
    ],
)  # fmt: skip
def test_what_the_sanitizer_says(output: str, code: int | None, said: str) -> None:
    assert gpu_parts.sanitizer_said(Ended(code, output)) == said


def test_the_record_is_named_after_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    (tmp_path / "out").mkdir()
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    parts = [{"part": "build", "ok": False, "seconds": 3.0, "said": ["no compiler"]}]
    layer = {"rows": ROWS, "errors": []}
    record: Json = {"machine": {"gpu": "NVIDIA H200"}, "parts": parts, "layer": layer, "decoder": {"cases": CASES}}
    record["claims"] = gpu_check.claims(record)
    written = gpu_check.write(record)
    assert written == tmp_path / "docs" / "benchmarks" / "gpu-nvidia-h200.json"
    assert (tmp_path / "out" / written.name).read_text() == written.read_text()
    titles = [section.title.split(",")[0] for section in gpu_check.sections(record)]
    assert titles == ["One layer", "A whole decoder", "What is claimed", "Parts"]
    bare: Json = {"machine": {}, "parts": parts, "claims": []}
    assert [section.title for section in gpu_check.sections(bare)] == ["Parts"]


def test_sessions_of_the_operator_and_of_onnxruntimes_own(tmp_path: Path) -> None:
    layer, routed = random_layers(SHAPE, torch.float16, 1)[0], random_routings(SHAPE, torch.float16, 9, [0.0, 0.88], 1, 1)[0]
    cpu = "CPUExecutionProvider"
    for ratio in (0.0, 0.88):
        assert ort_gpu._row("modes", ort_gpu._ours(layer, cpu), layer, routed, ratio)["right"]
    for name, operator in (("onnxruntime MoE", "MoE"), ("onnxruntime QMoE", "QMoE")):
        assert ort_gpu._row(name, ort_gpu._stock(layer, operator, cpu, SHAPE), layer, routed, 0.0)["right"]
