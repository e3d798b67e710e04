"""`--lmms-tasks`: what is asked of the core, and what goes together with nothing."""

from collections.abc import Callable
from typing import Any

import pytest


def test_tasks_replace_the_data(modes: Callable[..., Any], core: Any) -> None:
    ended = modes("evaluate", "--lmms-tasks", "chartqa, mmstar", "--samples", 5)
    assert ended.code == 0, ended.err
    asked = core.requests["evaluation"]
    assert asked.lmms_tasks == ("chartqa", "mmstar")
    assert (asked.data.source, asked.data.samples) == ("lmms-eval: chartqa,mmstar", 5)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--lmms-tasks", ","), "`--lmms-tasks ,` names no task"),
        (("--lmms-tasks", "chartqa", "--data", "digits"), "brings its own data"),
        (("--lmms-tasks", "chartqa", "--answer-column", "a"), "brings its own data"),
    ],
)
def test_other_data_beside_tasks_is_refused(more: tuple[str, ...], says: str, modes: Callable[..., Any], core: Any) -> None:
    ended = modes("evaluate", *more)
    assert ended.code == 1
    assert says in ended.err
    assert core.requests == {}
