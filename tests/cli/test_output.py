"""What commands print: one JSON object with the contract's keys, or tables; everything else on stderr, or nowhere."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modes_cli.requests import PASSES

# As documented for each command; `artifact` and `seconds` belong to all of them.
KEYS = {
    "profile digits": {"model", "family", "moe_layers", "experts", "top_k", "layers", "tokens"},
    "calibrate digits": {"importance", "samples", "forward_equivalents", "naive_forwards"},
    "search --target 0.5 --target 0.75": {"results", "frontier", "model_passes", "grid"},
    "export --format onnx": {"bundle", "files", "peak_rss"},
    "verify BUNDLE": {"ok", "checks"},
    "generate BUNDLE --prompt What?": {"text", "tokens", "skip_ratio", "prefill_seconds", "decode_seconds"},
    "evaluate": {
        "target",
        "decode_target",
        "full",
        "skipped",
        "retained",
        "interval",
        "skip_ratio",
        "per_task",
        "policies",
        "comparison",
        "left_out",
        "overlap",
    },
    "bench": {"cases", "machine"},
    "report": {"report"},
    "demo": {"full", "skipped", "retained", "skip_ratio", "speedup", "bundle", "report"},
    "doctor": {"versions", "devices", "kernels"},
}
INNER = {
    "layers": {"layer", "expert_usage_entropy", "update_angle", "seconds"},
    "results": {
        "target",
        "decode_target",
        "policy",
        "parameters",
        "tau",
        "skip_ratio",
        "skip_ratio_per_group",
        "kl",
        "kl_held_out",
        "predicted_skip_ratio",
        "distinct_experts",
    },
    "checks": {"name", "ok", "detail"},
    "cases": {"phase", "tokens", "batch", "runtime", "skip_ratio", "seconds", "speedup", "limit_fraction"},
}


def words(core: Any, line: str) -> list[str]:
    return line.replace("BUNDLE", str(core.run / "bundle")).split()


@pytest.mark.parametrize("line", KEYS)
def test_json_is_exactly_one_object_with_the_documented_keys(modes: Callable[..., Any], core: Any, line: str) -> None:
    ended = modes(*words(core, line), "--json")
    assert ended.code == 0, ended.err
    result = ended.json
    assert set(result) == KEYS[line] | {"artifact", "seconds"}
    assert result["artifact"] is None or Path(result["artifact"]).is_relative_to(core.run)
    for key, inner in INNER.items():
        for one in result.get(key, []):
            assert set(one) == inner


@pytest.mark.parametrize("line", KEYS)
def test_people_get_text_and_logs_stay_off_stdout(modes: Callable[..., Any], core: Any, line: str) -> None:
    ended = modes(*words(core, line))
    assert ended.code == 0, ended.err
    assert ended.out.strip()
    assert not ended.out.startswith("{")
    assert "a library prints" not in ended.out
    assert "\x1b" not in ended.out + ended.err  # neither colours nor a progress bar away from a terminal


@pytest.mark.parametrize("line", KEYS)
def test_quiet_has_no_progress(modes: Callable[..., Any], core: Any, line: str) -> None:
    ended = modes(*words(core, line), "--quiet")
    assert ended.code == 0
    assert "a stage" not in ended.err
    assert set(ended.err.splitlines()) <= {"a library prints on stdout"}


def test_progress_is_one_line_per_stage_without_a_terminal(modes: Callable[..., Any], core: Any) -> None:
    assert "a stage (10)\n" in modes("search").err


def test_importance_has_three_columns_per_layer(modes: Callable[..., Any], core: Any) -> None:
    importance = modes("calibrate", "digits", "--json").json["importance"]
    assert list(importance) == [str(layer) for layer in range(8)]
    assert all(set(columns) == {"all", "text", "vision"} for columns in importance.values())


def test_defaults_of_the_built_in_model(modes: Callable[..., Any], core: Any) -> None:
    modes("calibrate", "digits")
    data = core.requests["calibration"].data
    assert (data.source, data.split, data.samples, data.seed) == ("digits", "validation", 88, 0)
    modes("evaluate")
    data = core.requests["evaluation"].data
    assert (data.source, data.split, data.samples, data.seed) == ("digits", "test", 330, 0)
    modes("search")
    request = core.requests["thresholds"]
    assert (request.targets, request.policy, request.strategy, request.passes, request.grid) == (
        (0.75,),
        "auto",
        "frontier",
        PASSES,
        100,
    )


def test_defaults_of_another_model(modes: Callable[..., Any], core: Any) -> None:
    modes("profile", "org/model", "--dtype", "bfloat16", "--trust-remote-code")
    request = core.requests["profile"]
    assert (request.model.id, request.model.dtype, request.model.trust_remote_code) == ("org/model", "bfloat16", True)
    assert (request.data.source, request.data.samples) == ("gqa", 1024)


def test_options_reach_the_core(modes: Callable[..., Any], core: Any) -> None:
    modes(
        "search",
        "--target",
        "0.7",
        "--target",
        "0.5",
        "--target",
        "0.7",
        "--policy",
        "topk",
        "--strategy",
        "two-pointer",
        "--fresh",
    )
    request = core.requests["thresholds"]
    assert request.targets == (0.5, 0.7)
    assert (request.policy, request.strategy, request.fresh, request.run) == ("topk", "two-pointer", True, core.run)
    modes("generate", core.run / "bundle", "--prompt", "x", "--runtime", "torch", "--tau", "text=0.1", "--tau", "vision=0")
    request = core.requests["generate"]
    assert (request.runtime, request.tau) == ("torch", {"text": 0.1, "vision": 0.0})
    modes("bench", "--batch", "4", "--batch", "2")
    assert core.requests["bench"].batches == (4, 2)


def test_demo_tells_each_step_and_ends_with_the_numbers(modes: Callable[..., Any], core: Any) -> None:
    ended = modes("demo")
    steps = [line.split()[0] for line in ended.out.splitlines() if line and not line.startswith(" ")]
    assert steps[:8] == ["profile", "calibrate", "search", "export", "verify", "evaluate", "generate", "report"]
    for number in ("94.8%", "93.7%", "98.8%", "1.51x", "report.html"):
        assert number in ended.out
    assert (core.run / "question.png").read_bytes().startswith(b"\x89PNG")
    assert core.requests["generate"].images == (core.run / "question.png",)
    assert core.requests["evaluation"].bundle == core.run / "bundle"
    assert core.requests["export"].target == 0.75


CHATTER = """
import os, sys, warnings, logging
from types import ModuleType
fake = ModuleType("modes_cli.report")
def write_report(run):
    os.write(1, b"native chatter\\n")
    print("python chatter")
    warnings.warn("a warning")
    logging.getLogger("transformers").warning("a log")
    return "report.html"
fake.write_report = write_report
sys.modules["modes_cli.report"] = fake
from modes_cli.app import main
main(sys.argv[1:])
"""


def test_what_libraries_write_to_descriptor_1_goes_to_stderr() -> None:
    done = subprocess.run([sys.executable, "-c", CHATTER, "report", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('{"report": "report.html"')
    assert done.stdout.count("\n") == 1
    assert done.stderr == "native chatter\npython chatter\n"


WORKING = """
import sys, time
from types import ModuleType
fake = ModuleType("modes_cli.search")
def find_thresholds(request):
    request.progress.start("a stage", 3)
    for _ in range(3):
        request.progress.advance()
        time.sleep(0.15)
    raise MemoryError
fake.find_thresholds = find_thresholds
sys.modules["modes_cli.search"] = fake
from modes_cli.app import main
main(sys.argv[1:])
"""


def on_terminal(*options: str, **environment: str) -> str:
    """What a command with progress writes when stdout and stderr are one terminal."""
    import pty

    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", **environment}
    process = subprocess.Popen([sys.executable, "-c", WORKING, "search", *options], stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    written = b""
    try:
        while piece := os.read(ours, 4096):
            written += piece
    except OSError:  # Linux says so when the other end is closed
        pass
    os.close(ours)
    assert process.wait(60) == 1
    return written.decode()


COLOR = re.compile(r"\x1b\[[0-9;]*3[0-9]")


@pytest.mark.skipif(sys.platform == "win32", reason="needs pseudo terminals")
def test_a_terminal_gets_a_bar_in_color_unless_it_asks_for_none() -> None:
    plain_environment = {"NO_COLOR": ""}  # the standard: empty means not set
    shown = on_terminal(**plain_environment)
    assert "a stage" in shown
    assert "3/3" in shown
    assert COLOR.search(shown)
    shown = on_terminal(NO_COLOR="1")
    assert "3/3" in shown
    assert not COLOR.search(shown)
    assert "3/3" not in on_terminal("--quiet")
    assert "3/3" not in on_terminal(TERM="dumb")


@pytest.mark.skipif(sys.platform == "win32", reason="pipes")
def test_a_reader_that_leaves_is_no_error() -> None:
    process = subprocess.Popen([sys.executable, "-m", "modes_cli", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read().decode()
    process.stderr.close()
    process.wait(60)
    assert "Traceback" not in errors
    assert "error:" not in errors
