"""Tasks of lmms-eval: a local one through the installed package, against our own evaluation of the same samples."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]
import pyarrow.parquet as pq  # type: ignore[import-untyped,unused-ignore]
import pytest

from modes_cli.calibration import calibrate
from modes_cli.data import open_source
from modes_cli.data.sample import DataSpec, Sample
from modes_cli.data.videos import FRAMES
from modes_cli.errors import BadOption, StaleArtifact
from modes_cli.evaluation import evaluate, lmms
from modes_cli.evaluation.lmms import _installed, _until
from modes_cli.requests import EvaluateRequest
from modes_cli.search import find_thresholds
from tests.data.mp4 import encode
from tests.runs import calibration_request, search_request

installed = pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="lmms_eval is not installed: modes[eval]")
quiet = pytest.mark.filterwarnings("ignore")  # the package's own
SAMPLES = 6

TASK = """task: local_digits
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: answer
process_results: !function utils.score
generation_kwargs:
  max_new_tokens: 6
  until: ["\\n\\n"]
metric_list:
  - metric: right
    aggregation: mean
    higher_is_better: true
  - metric: letters
    aggregation: mean
    higher_is_better: false
metadata:
  - version: 0.0
"""

UTILS = """
import io
from PIL import Image

def visual(row):
    return [Image.open(io.BytesIO(row["picture"]))]

def text(row):
    return row["question"]

def score(row, results):
    return {"right": float(results[0].strip().lower() == row["answer"].lower()), "letters": float(len(results[0]))}

def video(row):
    return ["FILM"]

def sound(row):
    return [{"array": [0.0], "sampling_rate": 16000}]
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of the first digits of the test split."""
    folder = tmp_path_factory.mktemp("task")
    rows = []
    for sample in open_source(DataSpec("digits", "test", SAMPLES)):
        picture = io.BytesIO()
        sample.images[0].save(picture, "PNG")
        rows.append({"picture": picture.getvalue(), "question": sample.question, "answer": sample.answer})
    pq.write_table(pa.Table.from_pylist(rows), folder / "test.parquet")
    (folder / "utils.py").write_text(UTILS)
    (folder / "local.yaml").write_text(TASK.format(data=folder / "test.parquet"))
    return folder / "local.yaml"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """The built-in model, calibrated on the samples that the task scores."""
    run = tmp_path_factory.mktemp("run")
    request = calibration_request("digits", run, samples=SAMPLES)
    calibrate(type(request)(request.model, DataSpec("digits", "test", SAMPLES), run, SAMPLES))
    find_thresholds(search_request(run, 0.4, policy="modes", passes=4))
    return run


def request(run: Path, *tasks: str, **more: Any) -> EvaluateRequest:
    source = DataSpec("lmms-eval", None, more.pop("samples", None))
    return EvaluateRequest(source, run, None, 0.4, 4, 6, "cpu", lmms_tasks=tasks, **more)


@installed
@quiet
def test_a_local_task_gives_what_our_own_evaluation_gives(run: Path, task: Path) -> None:
    found = evaluate(request(run, str(task), fresh=True)).artifact
    assert list(found.per_task) == ["local_digits/right"]  # fewer letters are no better answer
    assert found.per_task["local_digits/right"].samples == found.data.samples == SAMPLES
    assert found.overlap == SAMPLES

    own = evaluate(EvaluateRequest(DataSpec("digits", "test", SAMPLES), run, None, 0.4, 4, 6, "cpu", fresh=True)).artifact
    assert (found.full, found.skipped, found.retained) == (own.full, own.skipped, own.retained)
    assert found.full > 0.5  # the built-in model can do this
    assert found.skip_ratio == own.skip_ratio
    assert found.skip_ratio["all"] > 0.2


@installed
@quiet
def test_is_reused_limited_and_refused_when_it_is_of_something_else(run: Path, task: Path) -> None:
    assert evaluate(request(run, str(task), fresh=True, samples=2)).artifact.data.samples == 2
    assert evaluate(request(run, str(task), samples=2)).reused
    with pytest.raises(StaleArtifact, match="limit"):
        evaluate(request(run, str(task)))


@installed
@quiet
@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("output_type: generate_until\n", "output_type: loglikelihood\n", "likelihoods of given answers"),
        ("  max_new_tokens: 6", "  temperature: 0.7\n  do_sample: true", "sampled answers"),
        ("utils.visual", "utils.sound", "shows a `dict`, not images"),
        ("utils.visual", "utils.video", r"shows the video `.*\.mp4`, which cannot be read: .*No such file"),
        ("  - metric: right\n    aggregation: mean\n    higher_is_better: true\n", "", "has no metric from 0 to 1"),
        ("test.parquet", "nothing.parquet", "lmms-eval failed with `local_digits`"),
    ],
)
def test_what_cannot_be_done_is_refused(old: str, new: str, says: str, run: Path, task: Path, tmp_path: Path) -> None:
    text = task.read_text()
    assert old in text
    text = text.replace(old, new)
    if "loglikelihood" in new:  # such a task has no options for generating
        text = text.replace('generation_kwargs:\n  max_new_tokens: 6\n  until: ["\\n\\n"]\n', "")
    (tmp_path / "utils.py").write_text(UTILS.replace("FILM", str(tmp_path / "film.mp4")))
    (tmp_path / "other.yaml").write_text(text)
    with pytest.raises(BadOption, match=says):
        evaluate(request(run, str(tmp_path / "other.yaml"), fresh=True, samples=2))


@installed
@quiet
def test_a_task_with_a_video_shows_its_frames(run: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "film.mp4").write_bytes(encode(range(10, 250, 20), (48, 48)))
    (tmp_path / "utils.py").write_text(UTILS.replace("FILM", str(tmp_path / "film.mp4")))
    (tmp_path / "video.yaml").write_text(task.read_text().replace("utils.visual", "utils.video"))
    asked: list[Sample] = []
    digest = lmms.sample_digest
    monkeypatch.setattr(lmms, "sample_digest", lambda sample: asked.append(sample) or digest(sample))
    found = evaluate(request(run, str(tmp_path / "video.yaml"), fresh=True, samples=1)).artifact
    assert found.data.samples == 1
    assert len(asked) == 2  # full, and skipped
    greys = [image.getpixel((9, 9))[0] for image in asked[0].images]
    assert len(greys) == FRAMES
    assert greys == sorted(set(greys))
    (tmp_path / "film.mp4").write_bytes(b"no video")
    with pytest.raises(BadOption, match=r"shows the video `.*\.mp4`, which cannot be decoded"):
        evaluate(request(run, str(tmp_path / "video.yaml"), fresh=True, samples=1))


@installed
@quiet
def test_tasks_that_do_not_exist(run: Path, task: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("dataset_path: parquet\n")
    for name, says in ((str(tmp_path / "empty.yaml"), "is no task"), (str(tmp_path / "none.yaml"), "is no task")):
        with pytest.raises(BadOption, match=says):
            evaluate(request(run, name, fresh=True))


@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is not None, reason="lmms_eval is installed")
def test_without_the_package_the_hint_installs_it() -> None:
    with pytest.raises(BadOption, match="needs the package `lmms_eval`") as caught:
        _installed()
    assert caught.value.hint == "`pip install 'modes[eval]'`"


@pytest.mark.parametrize(
    ("ends", "rest"), [(None, "a\n\nb"), ("\n\n", "a"), (["b", "\n"], "a"), ([""], "a\n\nb"), (["x"], "a\n\nb")]
)
def test_answers_end_where_the_task_says(ends: Any, rest: str) -> None:
    assert _until("a\n\nb", ends) == rest
