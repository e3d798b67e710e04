"""`--special` of `profile` and `calibrate`."""

from collections.abc import Callable
from typing import Any

import pytest

STEPS = {"profile": "profile", "calibrate": "calibration"}


@pytest.mark.parametrize("step", STEPS)
def test_what_becomes_of_special_tokens_reaches_the_core(modes: Callable[..., Any], core: Any, step: str) -> None:
    for options, expected in (((), "keep"), (("--special", "keep"), "keep"), (("--special", "skip"), "skip")):
        assert modes(step, "digits", *options).code == 0
        model = core.requests[STEPS[step]].model
        assert (model.special, model.family, model.offload, model.device_map) == (expected, "known", False, None)


@pytest.mark.parametrize("step", STEPS)
def test_another_word_is_a_wrong_command_line(modes: Callable[..., Any], core: Any, step: str) -> None:
    ended = modes(step, "digits", "--special", "drop")
    assert (ended.code, core.requests) == (2, {})
    assert "`drop`" in ended.err
