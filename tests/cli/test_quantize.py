"""`--quantize` of `calibrate` and `export`."""

from collections.abc import Callable
from typing import Any

import pytest


@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
def test_how_experts_are_stored_reaches_the_core(modes: Callable[..., Any], core: Any, scheme: str | None) -> None:
    options = () if scheme is None else ("--quantize", scheme)
    assert modes("calibrate", "digits", *options).code == 0
    assert core.requests["calibration"].model.quantize == scheme
    assert modes("export", *options).code == 0
    assert core.requests["export"].quantize == scheme


@pytest.mark.parametrize("command", [("calibrate", "digits"), ("export",)])
def test_another_word_is_a_wrong_command_line(modes: Callable[..., Any], core: Any, command: tuple[str, ...]) -> None:
    ended = modes(*command, "--quantize", "int3")
    assert (ended.code, core.requests) == (2, {})
    assert "`int3`" in ended.err
