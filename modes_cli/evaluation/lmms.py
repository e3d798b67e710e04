"""`modes evaluate --lmms-tasks`: the run's model or a bundle in lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval).

lmms-eval brings tasks, prompts and metrics; answers come from our runtime, once with nothing skipped and once with thresholds.
"""

import hashlib
import importlib.metadata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL.Image import Image

from modes_cli.artifacts import Evaluation
from modes_cli.artifacts.base import DataInfo, flatten
from modes_cli.artifacts.evaluation import TaskAccuracy
from modes_cli.data.images import Unusable, decode_image
from modes_cli.data.overlap import sample_digest
from modes_cli.data.sample import Sample
from modes_cli.data.videos import encoded_frames, require_decoder
from modes_cli.errors import BadOption, ModesError, first_line
from modes_cli.evaluation.answering import Side
from modes_cli.evaluation.artifact import Accuracies, reused, write
from modes_cli.evaluation.subject import Answer, Subject
from modes_cli.models.loading import versions
from modes_cli.requests import EvaluateRequest, Outcome
from modes_cli.run_folder import RunFolder

DEFAULT_NEW_TOKENS = 16  # lmms-eval's own, where a task does not say
_WITHOUT = ("data.samples", "data.digest")  # known only when the tasks have been read


@dataclass
class Asked:
    """What the tasks asked for in one run."""

    side: Side = field(default_factory=Side)
    digests: list[str] = field(default_factory=list)


def evaluate_tasks(request: EvaluateRequest, run: RunFolder, subject: Subject) -> Outcome[Evaluation]:
    """Run lmms-eval's tasks twice. `full` and `skipped` are means over tasks of the mean of each task's metrics.

    Raises:
        BadOption: lmms-eval is not installed, there is no such task, or one that needs what our runtimes do not do
            (likelihoods, several rounds, sounds, sampling), or that has no metric from 0 to 1 where higher is better.
    """
    version = _installed()
    options = subject.options(batch_size=request.batch_size, lmms_eval=version, limit=request.data.samples)
    source = f"lmms-eval: {','.join(request.lmms_tasks)}"
    if not request.fresh and run.exists(Evaluation):
        kept = run.read(Evaluation)
        data = DataInfo(source=source, split=None, samples=1, seed=0, digest="0" * 64)
        expected = flatten(subject.model, data, versions(), options)
        same = {name: value for name, value in kept.identity().items() if name not in _WITHOUT}
        expected = {name: value for name, value in expected.items() if name not in _WITHOUT}
        run.require_same(Evaluation, same, expected, renew=f"modes evaluate{run.option} --fresh")
        return reused(request, run, kept)
    names, manager = _tasks(request.lmms_tasks)
    answer = subject.open()
    request.progress.start("evaluate", 2)
    scores, asked = [], []
    for skip in (False, True):
        found = Asked()
        scores.append(_run(names, manager, request, _Answering(answer, request, subject.text_only, skip, found)))
        asked.append(found)
        request.progress.advance()
    per_task = {
        f"{task}/{metric}": TaskAccuracy(full=value, skipped=scores[1][task].metrics[metric], samples=one.samples)
        for task, one in scores[0].items()
        for metric, value in one.metrics.items()
    }
    full, skipped = (_mean(_mean(one.metrics.values()) for one in side.values()) for side in scores)
    digests = asked[0].digests
    data = DataInfo(
        source=source,
        split=None,
        samples=len(digests),
        seed=0,
        digest=hashlib.sha256("".join(digests).encode()).hexdigest(),
    )
    sides = asked[0].side, asked[1].side
    return write(request, run, subject, data, options, sides, digests, Accuracies(full, skipped, per_task))


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _installed() -> str:
    try:
        version = importlib.metadata.version("lmms_eval")
        import lmms_eval.evaluator  # noqa: F401
    except ImportError as error:
        hint = "`pip install 'modes[eval]'`" if isinstance(error, importlib.metadata.PackageNotFoundError) else None
        raise BadOption(
            f"`--lmms-tasks` needs the package `lmms_eval`: {first_line(error)}", hint=hint or "install what it needs"
        ) from error
    return version


def _tasks(wanted: Sequence[str]) -> tuple[list[str], Any]:
    """Names of tasks, and lmms-eval's index of them, which includes the folders of those that are .yaml files."""
    import yaml  # type: ignore[import-untyped,unused-ignore]
    from lmms_eval.tasks import TaskManager
    from loguru import logger

    logger.disable("lmms_eval")  # the core shows nothing by itself
    names, folders = [], []
    for one in wanted:
        if not one.endswith((".yaml", ".yml")):
            names.append(one)
            continue
        try:
            lines = Path(one).read_text("utf-8").splitlines()
            # Only the name: tags such as `!function` are for lmms-eval.
            name = next(yaml.safe_load(line)["task"] for line in lines if line.startswith("task:"))
        except (OSError, UnicodeDecodeError, StopIteration, yaml.YAMLError) as error:
            raise BadOption(
                f"`{one}` is no task of lmms-eval: {first_line(error)}", hint="it needs a line `task: NAME`"
            ) from error
        names.append(str(name))
        folders.append(str(Path(one).resolve().parent))
    only_files = len(folders) == len(names)  # the index of the thousand others takes a while
    manager = TaskManager("ERROR", include_path=folders or None, include_defaults=not only_files)
    for name in names:
        if name not in manager.all_tasks:
            raise BadOption(
                f"lmms-eval has no task `{name}`", hint="`python -m lmms_eval tasks` lists them; or give a .yaml file"
            )
    return names, manager


@dataclass(frozen=True)
class _Scores:
    samples: int
    metrics: dict[str, float]


def _run(names: list[str], manager: Any, request: EvaluateRequest, model: "_Answering") -> dict[str, _Scores]:
    """Scores by task."""
    from lmms_eval.evaluator import simple_evaluate

    try:
        found = simple_evaluate(
            model=_adapter(model),
            tasks=names,
            task_manager=manager,
            limit=request.data.samples,
            log_samples=False,
            bootstrap_iters=0,
            verbosity="ERROR",
        )
    except (ModesError, MemoryError):
        raise
    except Exception as error:  # tasks are code of many hands, and read data from the network
        raise BadOption(
            f"lmms-eval failed with `{','.join(names)}`: {type(error).__name__}: {first_line(error)}",
            hint="is its data set within reach? `--debug` shows the traceback",
        ) from error
    scores = {}
    for task, counts in found["n-samples"].items():
        better = found["higher_is_better"].get(task) or {}
        metrics = {
            name: float(value)
            for key, value in found["results"][task].items()
            if (name := key.split(",")[0]) in better
            and better[name]
            and isinstance(value, (int, float))
            and 0.0 <= value <= 1.0
        }
        if not metrics:
            raise BadOption(f"task `{task}` has no metric from 0 to 1 where higher is better", hint="choose another task")
        scores[task] = _Scores(int(counts["effective"]), metrics)
    return scores


@dataclass(frozen=True)
class _Answering:
    """Answers lmms-eval's requests with one of our runtimes."""

    answer: Answer
    request: EvaluateRequest
    text_only: bool
    skip: bool
    asked: Asked

    def generate(self, requests: Sequence[Any], documents: Any) -> list[str]:
        """One text for each request. `documents`: {task: {split: rows}}."""
        texts: list[str] = [""] * len(requests)
        kinds: dict[int, list[int]] = {}
        for index, one in enumerate(requests):
            kinds.setdefault(self._most_tokens(one.args[1], one.args[4]), []).append(index)
        for most, indices in sorted(kinds.items()):
            for at in range(0, len(indices), self.request.batch_size):
                part = indices[at : at + self.request.batch_size]
                samples = [self._sample(requests[index].args, documents) for index in part]
                self.asked.digests += [sample_digest(sample) for sample in samples]
                answers = self.answer(samples, self.skip, most)
                self.asked.side.add(answers)
                for index, text in zip(part, answers.texts, strict=True):
                    texts[index] = _until(text, requests[index].args[1].get("until"))
        return texts

    def _most_tokens(self, options: dict[str, Any], task: str) -> int:
        sampled = options.get("do_sample") or (options.get("temperature") or 0) > 0 or (options.get("num_beams") or 1) > 1
        if sampled:
            raise BadOption(
                f"task `{task}` asks for sampled answers or beams", hint="answers are greedy here; choose another task"
            )
        return int(options.get("max_new_tokens") or DEFAULT_NEW_TOKENS)

    def _sample(self, arguments: tuple[Any, ...], documents: Any) -> Sample:
        context, _, visual, number, task, split = arguments[:6]
        shown = visual(documents[task][split][number]) or []
        images: list[Image] = []
        for one in shown if isinstance(shown, (list, tuple)) else [shown]:
            if isinstance(one, Image):
                images.append(one.convert("RGB"))
            elif isinstance(one, str) and one.endswith(".mp4"):
                images += () if self.text_only else _video(one, task)
            else:
                kind = type(one).__name__
                raise BadOption(f"task `{task}` shows a `{kind}`, not images", hint="of videos .mp4 files are taken; no sounds")
        return Sample(f"{task}/{number}", () if self.text_only else tuple(images), context, "-", task)


def _video(path: str, task: str) -> list[Image]:
    """FRAMES frames of a video, as images.

    Raises:
        BadOption: PyAV is not installed, or the file cannot be read.
    """
    require_decoder(f"task {task}")
    try:
        with open(path, "rb") as file:
            return [decode_image(frame) for frame in encoded_frames(file)]
    except (OSError, Unusable) as error:
        raise BadOption(
            f"task `{task}` shows the video `{path}`, which {'cannot be read: ' if isinstance(error, OSError) else ''}"
            f"{first_line(error)}",
            hint="fetch the task's videos again",
        ) from error


def _until(text: str, ends: str | Sequence[str] | None) -> str:
    """The text before the first of some strings; an empty one, which some tasks name, ends nothing."""
    for end in [ends] if isinstance(ends, str) else ends or ():
        if end:
            text = text.split(end)[0]
    return text


def _adapter(model: _Answering) -> Any:
    """An instance of lmms-eval's own model class."""
    from lmms_eval.api.model import lmms

    class Modes(lmms):
        def generate_until(self, requests: list[Any]) -> list[str]:
            return model.generate(requests, self.task_dict)

        def loglikelihood(self, requests: list[Any]) -> Any:
            raise self._refused(requests, "likelihoods of given answers")

        def generate_until_multi_round(self, requests: list[Any]) -> Any:
            raise self._refused(requests, "several rounds")

        def _refused(self, requests: list[Any], what: str) -> BadOption:
            task = requests[0].task_name if requests else "?"
            return BadOption(f"task `{task}` needs {what}, which is not supported", hint="choose one that generates its answer")

    return Modes()
