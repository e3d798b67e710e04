"""What a user meets when something is wrong: exit code, at most two lines, a hint, and the same as an object."""

import errno
import json
import sys
from collections.abc import Callable
from typing import Any

import pytest

from modes_cli.errors import BadModel, GateFailed, KernelError, StaleArtifact, UnreachableTarget
from modes_cli.requests import Check


def no_space() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device", "thresholds.json")


class OutOfMemoryError(RuntimeError):
    """Named like torch's."""


Fail = type("Fail", (Exception,), {"__module__": "onnxruntime.capi.onnxruntime_pybind11_state"})


@pytest.mark.parametrize(
    ("error", "code", "kind", "says", "hints"),
    [
        (BadModel("`x` has no MoE layers", hint="another model"), 1, "bad_model", "`x`", "another model"),
        (UnreachableTarget(0.99, 0.931, "modes"), 1, "unreachable_target", "`0.9310`", "--target 0.93"),
        (
            StaleArtifact("a.json", "seed", 1, 2, "modes search --fresh"),
            1,
            "stale_artifact",
            "seed `1`",
            "modes search --fresh",
        ),
        (GateFailed("too low"), 3, "gate_failed", "too low", None),
        (KernelError("no library"), 2, "kernel_error", "no library", None),
        (MemoryError(), 1, "out_of_memory", "out of memory", "--batch-size"),
        (
            OutOfMemoryError("CUDA out of memory. Tried to allocate\nlots"),
            1,
            "out_of_memory",
            "CUDA out of memory",
            "--batch-size",
        ),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            1,
            "out_of_memory",
            "allocate",
            "--batch-size",
        ),
        (RuntimeError("could not create a primitive"), 1, "out_of_memory", "a primitive", "--batch-size"),
        (RuntimeError("could not create a primitive descriptor for a matmul"), 2, "unexpected", "descriptor", "--debug"),
        (Fail("modes.SkipExperts: no memory for 64 bytes of workspace"), 1, "out_of_memory", "no memory", "--batch-size"),
        (RuntimeError("can't start new thread"), 1, "out_of_memory", "new thread", "--batch-size"),
        (no_space(), 1, "disk_full", "`thresholds.json`", "free some space"),
        (ZeroDivisionError("oops\nmore"), 2, "unexpected", "ZeroDivisionError: oops", "--debug"),
        (KeyboardInterrupt(), 130, "interrupted", "interrupted", "same command continues"),
    ],
    ids=lambda value: value.__class__.__name__ if isinstance(value, BaseException) else None,
)
def test_each_error_has_its_code_its_lines_and_its_object(
    modes: Callable[..., Any], core: Any, error: BaseException, code: int, kind: str, says: str, hints: str | None
) -> None:
    core.raises = error

    ended = modes("search", "--quiet")
    assert ended.code == code
    assert ended.out == ""
    lines = ended.err.splitlines()[1:]  # the first is what the fake library printed
    assert len(lines) == (2 if hints else 1)
    assert lines[0].startswith("error: ")
    assert says in lines[0]
    assert not hints or (lines[1].startswith("hint: ") and hints in lines[1])

    ended = modes("search", "--quiet", "--json")
    assert ended.code == code
    assert set(ended.json) == {"error"}
    assert set(ended.json["error"]) == {"kind", "message", "hint"}
    assert ended.json["error"]["kind"] == kind
    assert says in ended.json["error"]["message"]


def test_debug_shows_the_traceback(modes: Callable[..., Any], core: Any) -> None:
    core.raises = ZeroDivisionError("oops")
    assert "Traceback" not in modes("search").err
    ended = modes("search", "--debug")
    assert ended.code == 2
    assert "Traceback" in ended.err
    assert "in answer" in ended.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["serch"],
        ["profile"],
        ["profile", "digits", "--dtype", "int3"],
        ["profile", "digits", "--device", "tpu"],
        ["profile", "digits", "--samples", "0"],
        ["calibrate", "digits", "--batch-size", "0"],
        ["search", "--target", "much"],
        ["search", "--strategy", "guess"],
        ["search", "--passes", "0"],
        ["export", "--format", "pickle"],
        ["bench", "--batch", "0"],
        ["generate", "bundle"],
        ["search", "--no-such-option"],
    ],
)
def test_usage_errors_end_with_2(modes: Callable[..., Any], core: Any, arguments: list[str]) -> None:
    ended = modes(*arguments)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("error: ")
    assert "hint: `modes" in ended.err
    ended = modes(*arguments, "--json")
    assert ended.code == 2
    assert ended.json["error"]["kind"] == "usage"
    assert core.requests == {}


@pytest.mark.parametrize("share", ["1.5", "-0.1", "nan", "inf", "88"])
def test_a_target_outside_0_to_1_is_refused_and_the_largest_is_named(modes: Callable[..., Any], core: Any, share: str) -> None:
    ended = modes("search", f"--target={share}", "--json")
    assert ended.code == 1
    assert ended.json["error"]["kind"] == "bad_option"
    assert "at most `0.8765`" in ended.json["error"]["hint"]  # 1 - 616 special tokens of 4988 in the example
    assert core.requests == {}


def test_a_target_is_refused_without_a_calibration_too(modes: Callable[..., Any], core: Any) -> None:
    (core.run / "calibration.json").unlink()
    ended = modes("search", "--target", "2")
    assert ended.code == 1
    assert "`--target 2`" in ended.err


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (["export", "--target", "2"], "bad_option"),
        (["evaluate", "--target", "nan"], "bad_option"),
        (["evaluate", "--min-retained", "nan"], "bad_option"),
        (["bench", "--target=-1"], "bad_option"),
        (["generate", "RUN/bundle", "--prompt", "x", "--tau", "text"], "bad_option"),
        (["generate", "RUN/bundle", "--prompt", "x", "--tau", "text=-1"], "bad_option"),
        (["generate", "RUN/bundle", "--prompt", "x", "--tau", "text=1", "--tau", "text=2"], "bad_option"),
        (["generate", "RUN/bundle", "--prompt", "x", "--image", "RUN/no.png"], "bad_data"),
        (["generate", "RUN/none", "--prompt", "x"], "missing_artifact"),
        (["verify", "RUN/none"], "missing_artifact"),
        (["evaluate", "--bundle", "RUN/none"], "missing_artifact"),
    ],
)
def test_bad_values_end_with_1_before_anything_is_loaded(
    modes: Callable[..., Any], core: Any, arguments: list[str], kind: str
) -> None:
    ended = modes(*(argument.replace("RUN", str(core.run)) for argument in arguments), "--json")
    assert ended.code == 1
    assert ended.json["error"]["kind"] == kind
    assert core.requests == {}


@pytest.mark.parametrize("command", ["evaluate", "bench"])
def test_steps_out_of_order_name_the_step_before(modes: Callable[..., Any], core: Any, command: str) -> None:
    (core.run / "calibration.json").unlink()
    ended = modes(command)
    assert ended.code == 1
    assert f"hint: make it first: `modes calibrate MODEL --run {core.run}`" in ended.err


def test_a_gate_fails_after_the_result_is_printed(modes: Callable[..., Any], core: Any) -> None:
    assert modes("evaluate", "--min-retained", "0.9").code == 0
    ended = modes("evaluate", "--min-retained", "0.999")
    assert ended.code == 3
    assert "Accuracy" in ended.out
    assert "`0.9884`" in ended.err
    ended = modes("evaluate", "--min-retained", "0.999", "--json")
    assert ended.code == 3
    assert ended.json["error"]["kind"] == "gate_failed"
    assert ended.json["retained"] == pytest.approx(0.937 / 0.948)


def test_a_bundle_that_does_not_verify_ends_with_1(modes: Callable[..., Any], core: Any) -> None:
    core.checks.append(Check("kernels", False, "`libmodes_cpu.so` is missing"))
    ended = modes("verify", core.run / "bundle", "--json")
    assert ended.code == 1
    assert ended.json["ok"] is False
    assert ended.json["error"]["kind"] == "bad_artifact"
    assert "libmodes_cpu.so" in ended.json["error"]["message"]
    assert "WRONG  kernels" in modes("verify", core.run / "bundle").out


def test_an_import_that_fails_is_reported_like_any_error(
    modes: Callable[..., Any], core: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "modes_cli.search", None)
    ended = modes("search", "--json")
    assert ended.code == 2
    assert json.loads(ended.out)["error"]["kind"] == "unexpected"
