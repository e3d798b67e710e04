"""A few hundred inputs for each parser, the same each time: only errors of ours come out, in time and within memory.

The plain loop without coverage, whether or not atheris is there; `make fuzz` is the long run, with it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.cli.process import content
from tests.fuzz import engine, mutate, runs

EXECUTIONS = 200
ROOT = Path(__file__).parents[2]


def fuzz(out: Path, engine_name: str, *targets: str) -> None:
    words = [sys.executable, "-m", "tests.fuzz", *targets, "--engine", engine_name, "--executions", str(EXECUTIONS),
             "--seconds", "3600", "--out", str(out)]  # fmt: skip
    done = subprocess.run(
        words, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1), done.stderr[-3000:]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files to begin from."""
    out = tmp_path_factory.mktemp("fuzz")
    runs.prepare_files(out)
    return out


@pytest.fixture(scope="module")
def reports(out: Path) -> dict[str, dict[str, Any]]:
    """One process for all targets: it forks for each, so that what one does is not another's."""
    fuzz(out, "plain")
    return {
        name: json.loads((out / f"{name}.json").read_text("utf-8"))
        for name in engine.TARGETS
        if (out / f"{name}.json").exists()
    }


@pytest.mark.parametrize("target", engine.TARGETS)
def test_only_errors_of_ours_come_out(reports: dict[str, dict[str, Any]], target: str) -> None:
    assert target in reports, "its process did not end as it should"
    report = reports[target]
    assert not report["defects"], next(iter(report["defects"].values()))["traceback"]
    assert report["executions"] == EXECUTIONS
    assert report["engine"] == "plain"
    assert report["accepted"], "nothing gets through: the seeds are stale"
    assert report["refused"] or target == "unfinished", "nothing is refused: the inputs are not changed"


def test_the_files_to_begin_from_are_the_same_anywhere(out: Path, tmp_path: Path) -> None:
    runs.prepare_files(tmp_path / "another" / "place")
    first, second = (content(place / "files") for place in (out, tmp_path / "another" / "place"))
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    assert {"bundle/bundle.json", "bundle/decoder.onnx", "checkpoint/config.json"} <= first.keys()


def test_every_harness_is_a_target() -> None:
    found = {path.stem for path in (Path(__file__).parent / "harness").glob("*.py")}
    assert found == set(engine.TARGETS)


def test_the_same_seed_gives_the_same_inputs() -> None:
    change, data = mutate.as_json, b'{"a": [1, 2, {"b": "c"}], "d": 0.5}'
    first, second = ([change(data, Random(number)) for number in range(200)] for _ in range(2))
    assert first == second
    assert len(set(first)) > 100


@pytest.mark.skipif(not runs.has_atheris(), reason="atheris is not installed")
@pytest.mark.parametrize("target", ["thresholds_rule", "parquet_table"])
def test_atheris_repeats_its_inputs_in_a_new_folder(out: Path, tmp_path: Path, target: str) -> None:
    found = []
    for name in ("first", "second"):
        shutil.copytree(out / "files", tmp_path / name / "files")
        fuzz(tmp_path / name, "atheris", target)
        report = json.loads((tmp_path / name / f"{target}.json").read_text("utf-8"))
        kept = {file.name: file.read_bytes() for file in (tmp_path / name / "corpus" / target).iterdir()}
        found.append(([report[key] for key in ("engine", "executions", "accepted", "refused", "defects")], kept))
    assert found[0][0][:2] == ["atheris", EXECUTIONS]
    assert found[0] == found[1]


class Harness:
    """Stands in for a module of tests/fuzz/harness."""

    mutate = staticmethod(mutate.any_bytes)

    @staticmethod
    def seeds() -> list[bytes]:
        return [b"ab"]

    @staticmethod
    def one(data: bytes) -> None:
        if data.startswith(b"a"):
            raise ValueError("a defect")
        if len(data) > 30:
            raise AssertionError("another one")


def test_a_defect_is_counted_once_and_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.importlib, "import_module", lambda _name: Harness)
    watched = engine.Watched("harness", "plain", tmp_path / "last")
    engine.plain(watched, 500, 60.0, 0)
    report = watched.report
    assert report.executions == 500
    assert {name.split(" at ")[0] for name in report.defects} == {"ValueError", "AssertionError"}
    shown = next(found for name, found in report.defects.items() if name.startswith("ValueError"))
    assert bytes.fromhex(shown["input"]).startswith(b"a")


DEADLY = """
import os, sys
from pathlib import Path
from tests.fuzz import engine, runs
import tests.fuzz.harness.jsonl_rows as harness

engine.CPU_SECONDS = 0.2
for act in (lambda: os.kill(os.getpid(), 11), lambda: [0 for _ in iter(int, 1)], lambda: bytearray(64 << 30)):
    calls = []
    harness.one = lambda data: act() if calls else calls.append(data)
    print("; ".join(runs.run("jsonl_rows", runs.Limits("plain", 60.0, 20), Path(sys.argv[1]))["defects"]))
"""


def test_what_ends_a_process_or_takes_too_much_is_a_defect(tmp_path: Path) -> None:
    """The first call, which `inside` makes before limits hold, does nothing."""
    done = subprocess.run(
        [sys.executable, "-c", DEADLY, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True, timeout=300
    )
    first, second, third = done.stdout.splitlines()
    assert first == "the process ended with -11"
    assert "TooSlow" in second
    assert "MemoryError" in third


def test_atheris_is_there_or_it_is_said(tmp_path: Path) -> None:
    """Never the plain loop in its place."""
    if runs.has_atheris():
        pytest.skip("atheris is installed; the long run uses it")
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "atheris is not installed" in done.stderr
