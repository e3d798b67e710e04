"""The CPU benchmark: a whole run on a tiny layer, its inputs, its claims and its tables."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.bench import bench_cpu
from kernels.bench.cases import Layer, Shape, random_layers, random_routings, reference
from kernels.bench.claims import claims
from kernels.bench.table import markdown, sections
from tests.kernels.reference import Case, skip_experts

ROOT = Path(__file__).parents[2]
SHAPE = Shape(64, 32, 8, 2)
RATIOS = [0.0, 0.5, 0.88]
FEW, ALL = 1, 9


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The JSON of a run, and the file it was written to."""
    out = tmp_path_factory.mktemp("bench") / "new" / "cpu.json"
    command = [sys.executable, "kernels/bench/bench_cpu.py", "--shape", str(SHAPE), "--tokens", str(FEW), "--tokens", str(ALL)]
    command += ["--threads", "1", "--repetitions", "2", "--json", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout), out


def test_a_run_has_a_row_for_every_runtime_and_case(run: tuple[dict[str, Any], Path]) -> None:
    record, out = run
    assert json.loads(out.read_text()) == record
    assert record["left_out"] == []
    found = {(row["runtime"], row["dtype"], row["tokens"], row["skip_ratio"]) for row in record["rows"]}
    assert len(found) == len(record["rows"])
    expected = set()
    for dtype, stock in (("float32", ("onnxruntime MoE", "float32")), ("bfloat16", ("onnxruntime QMoE", "float16/int8"))):
        for tokens in (FEW, ALL):
            for ratio in RATIOS:
                expected |= {("modes", dtype, tokens, ratio), (*stock, tokens, ratio)}
                for peer in ("eager", "grouped_mm", *(["batched_mm"] if tokens == FEW else [])):
                    expected.add((f"transformers {peer}" + (", dropped" if ratio else ""), dtype, tokens, ratio))
    assert found == expected
    assert "--out" not in record["command"]
    assert str(ROOT) not in json.dumps(record)


def test_a_row_says_what_was_measured(run: tuple[dict[str, Any], Path]) -> None:
    record, _ = run
    for row in record["rows"]:
        assert (row["hidden"], row["intermediate"], row["experts"], row["top_k"]) == (64, 32, 8, 2)
        assert (row["threads"], row["repetitions"]) == (1, 2)
        low, high = row["quartiles"]
        assert 0 < low <= row["seconds"] <= high < 10
        assert 0 < row["flops_fraction"] < 1
        assert 0 < row["bandwidth_fraction"] < 1
        kept = max(1, round(row["tokens"] * 2 * (1 - row["skip_ratio"])))
        assert row["skipped"] == pytest.approx(1 - kept / (row["tokens"] * 2))
    limits = {(limit["limit"], limit["dtype"]): limit for limit in record["limits"]}
    assert set(limits) == {("flops", "float32"), ("flops", "bfloat16"), ("read_bandwidth", None)}
    for limit in limits.values():
        assert limit["threads"] == 1
        assert 1e8 < limit["median"] <= limit["best"] < 1e14


def test_all_runtimes_compute_the_same_layer(run: tuple[dict[str, Any], Path]) -> None:
    record, _ = run
    assert {(e["runtime"], e["dtype"]) for e in record["errors"]} == {(row["runtime"], row["dtype"]) for row in record["rows"]}
    assert all(e["right"] for e in record["errors"]), record["errors"]
    held = {claim["claim"]: claim["holds"] for claim in record["claims"]}
    assert held["float32: error against float64"] is True
    assert held["bfloat16: error against float64"] is True
    assert list(held.values()).count(None) == len(held) - 2  # the rest is about another shape


def test_the_page_is_made_from_the_json(run: tuple[dict[str, Any], Path], capsys: pytest.CaptureFixture[str]) -> None:
    record, out = run
    bench_cpu.main(table=out)
    assert capsys.readouterr().out == markdown(record)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_token_keeps_one_pair_of_eight_and_meets_other_experts_each_time(dtype: torch.dtype) -> None:
    shape = Shape(16, 8, 64, 8)
    routings = random_routings(shape, dtype, 1, RATIOS, 2)
    assert len(routings) == 13
    assert [routed.kept(0.88) for routed in routings] == [1] * 13
    assert [routed.kept(0.5) for routed in routings] == [4] * 13
    for layer in (0, 1):
        seen = torch.cat([routed.ids.flatten() for routed in routings if routed.layer == layer])
        assert len(seen.unique()) == len(seen)


@pytest.mark.parametrize("tokens", [8, 64])
def test_the_skip_ratio_is_exact(tokens: int) -> None:
    for routed in random_routings(Shape(16, 8, 16, 4), torch.bfloat16, tokens, RATIOS, 1):
        for ratio in RATIOS:
            assert routed.kept(ratio) == round(tokens * 4 * (1 - ratio))


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_reference_is_the_operators_definition(ratio: float) -> None:
    layer: Layer = random_layers(SHAPE, torch.float32, 1)[0]
    routed = random_routings(SHAPE, torch.float32, 20, RATIOS, 1)[0]
    case = Case(routed.x, routed.ids, routed.weights, routed.group, routed.tau[ratio], routed.scale, layer.gate_up, layer.down)
    torch.testing.assert_close(reference(layer, routed, ratio).float(), skip_experts(case), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("text", ["", "1x2x3", "4x4x2x3", "0x1x1x1", "axbxcxd"])
def test_a_shape_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"HxIxExK|invalid literal"):
        Shape.parse(text)


# -- claims and tables on made-up rows ------------------------------------------------------------------------------------


def row(
    runtime: str, seconds: float, *, tokens: int = 512, ratio: float = 0.0, threads: int = 1, **more: Any
) -> dict[str, Any]:
    sizes = {"runtime": runtime, "hidden": 1024, "intermediate": 384, "experts": 64, "top_k": 8, "dtype": "float32"}
    measured = {"tokens": tokens, "skip_ratio": ratio, "threads": threads, "seconds": seconds}
    return sizes | measured | {"flops_fraction": 0.7, "bandwidth_fraction": 0.1} | more


ROWS = [
    row("modes", 0.010),
    row("modes", 0.005, threads=2),  # thread counts take turns in a record
    row("modes", 0.002, ratio=0.88),
    row("transformers eager", 0.030),
    row("transformers grouped_mm", 0.019),
    row("transformers grouped_mm, dropped", 0.008, ratio=0.88),
    row("onnxruntime MoE", 0.012),
    row("onnxruntime MoE", 0.004, ratio=0.88),
]


def answers(rows: list[dict[str, Any]], errors: list[dict[str, Any]]) -> dict[str, tuple[float | None, bool | None]]:
    return {claim["claim"]: (claim["measured"], claim["holds"]) for claim in claims(rows, errors)}


def error(runtime: str, size: float, right: bool) -> dict[str, Any]:
    return {"runtime": runtime, "hidden": 1024, "dtype": "float32", "skip_ratio": 0.0, "error": size, "right": right}


def test_claims_are_ratios_to_the_fastest_peer() -> None:
    found = answers(ROWS, [error("modes", 2e-5, True)])
    assert found["float32 T=512, 0% skipped: over transformers' best, nothing skipped"] == (pytest.approx(1.9), False)
    assert found["float32 T=512, 88% skipped: over transformers' best, nothing skipped"] == (pytest.approx(9.5), True)
    assert found["float32 T=512, 0% skipped: over ONNX Runtime's MoE skipping the same"] == (pytest.approx(1.2), True)
    assert found["float32 T=512, 88% skipped: over ONNX Runtime's MoE skipping the same"] == (pytest.approx(2.0), False)
    assert found["float32 T=512: share of the measured peak FLOP/s"] == (0.7, True)
    assert found["float32 T=512: 2 threads over 1"] == (pytest.approx(2.0), True)
    assert found["float32: error against float64"] == (2e-5, False)
    assert found["bfloat16 T=1, 0% skipped: over transformers' best, nothing skipped"] == (None, None)


def test_a_peer_with_a_wrong_output_is_not_compared_with() -> None:
    found = answers(ROWS, [error("transformers grouped_mm", 0.5, False), error("onnxruntime MoE", math.nan, False)])
    assert found["float32 T=512, 0% skipped: over transformers' best, nothing skipped"] == (pytest.approx(3.0), True)
    assert found["float32 T=512, 0% skipped: over ONNX Runtime's MoE skipping the same"] == (None, None)


def test_a_table_has_times_ratios_and_the_nearer_limit() -> None:
    first, second = sections({"rows": ROWS, "errors": [], "claims": []})
    assert first.title == "H=1024 I=384 E=64 top-8, float32, 1 thread"
    assert dict(zip(first.header, first.rows[0], strict=False)) == {
        "T": "512",
        "transformers": "19.0 grouped_mm",
        "onnxruntime MoE": "12.0 (1.6x)",
        "modes": "10.0 (1.9x)",
        "of the limit": "70% FLOP/s",
        "modes at 88%": "2.00 (9.5x)",
        "transformers at 88%": "8.00 (2.4x) grouped_mm",
        "onnxruntime MoE at 88%": "4.00 (4.8x)",
    }
    assert second.title.endswith("2 threads")
    assert second.rows == [["512", "-", "-", "5.00", "70% FLOP/s"]]
