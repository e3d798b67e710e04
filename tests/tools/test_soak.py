"""tools/trust: many threads on one session for a few seconds, and what would show if an answer changed or memory leaked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modes_cli.runtime.session import session
from tests.export.bundles import shared_bundle
from tools.trust import fuzz, memory, soak


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_bundle(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def requests(bundle: Path) -> list[soak.Request]:
    return soak.make_requests(bundle)


def test_thirty_two_threads_change_no_answer(bundle: Path, requests: list[soak.Request]) -> None:
    found = soak.under_threads(session(bundle), requests, 3.0, 6)
    assert found["threads"] == 32
    assert found["answers_compared"] > 100
    assert found["answers_changed"] == found["refused_or_taken_wrongly"] == 0
    assert found["refused_as_they_should"] > 0
    opened = soak.open_and_close(bundle, requests[0], 6)
    assert opened["answers_changed"] == 0
    rows = dict(soak.rows({**found, "opened_and_closed": opened}))
    assert rows["answers changed"] == "0"


def test_one_bit_in_one_answer_is_seen(bundle: Path, requests: list[soak.Request]) -> None:
    expected = requests[0].expected
    assert expected is not None
    altered = [array.copy() for array in expected]
    altered[0].reshape(-1).view(np.uint8)[0] ^= 1
    found = soak.under_threads(session(bundle), [soak.Request(requests[0].feeds, altered)], 0.3, 6)
    assert found["answers_changed"] == found["requests"] > 0


def test_a_refusal_that_is_none_is_seen(bundle: Path, requests: list[soak.Request]) -> None:
    tally, quiet = soak.Tally(), soak.ort.RunOptions()
    quiet.log_severity_level = 4
    shared = session(bundle)
    soak.ask(shared, soak.Request(requests[0].feeds, None), tally, quiet)  # answered, and should not be
    soak.ask(shared, soak.Request(requests[-1].feeds, requests[0].expected), tally, quiet)  # refused, and should not be
    assert tally.wrongly == 2


def test_what_leaks_rises_and_what_trembles_or_steps_once_does_not() -> None:
    rng = np.random.default_rng(0)
    counts = range(0, 60_000, 1000)
    steady = [(n, 400_000_000 + int(rng.integers(-(10**5), 10**5)), 10**9) for n in counts]
    leaking = [(n, used + 50 * n, 10**9) for n, used, _ in steady]
    once = [(n, 400_000_000 + 5840 * (n >= 48_000), 10**9) for n in counts]
    for bounded in (steady, once):
        assert memory.growth(bounded)["leak"] == 0
    assert memory.growth(leaking)["leak"] == pytest.approx(50_000, rel=0.2)  # of each 1,000 requests


def test_the_arena_gives_back_what_no_answer_is_in(bundle: Path, requests: list[soak.Request]) -> None:
    """Many answers in the making at a time leave it larger for as long as the session is there, unless it is told."""
    shared = session(bundle)
    before = soak.under_threads(shared, requests[:1], 0.1, 4)["samples"][-1]["in_use"]
    after = soak.under_threads(shared, requests, 1.0, 4)["samples"][-1]["in_use"]
    assert abs(after - before) < 4 << 20


def test_memory_that_malloc_hands_out_is_counted() -> None:
    before = memory.in_use()
    held = np.ones(5 << 20, np.uint8)
    assert memory.in_use() - before >= held.nbytes


def test_rows_of_a_fuzz_run() -> None:
    report: dict[str, Any] = {"target": "a", "executions": 1500, "defects": {}}
    rows = dict(fuzz.rows({"targets": {"a": report, "b": {**report, "target": "b", "defects": {"x": {}}}}}))
    assert rows["executions"] == "3,000"
    assert rows["defects"] == "1"
    assert rows["`a`"] == "1,500 executions, 0 defects"
