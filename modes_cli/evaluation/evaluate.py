"""Answer held-out questions twice, with nothing skipped and with thresholds, and compare."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from modes_cli import files
from modes_cli.artifacts import Bundle, Calibration, Evaluation, Thresholds
from modes_cli.artifacts.base import ModelInfo, flatten
from modes_cli.artifacts.bundle import FILE as BUNDLE_FILE
from modes_cli.artifacts.evaluation import ChangedAnswer, TaskAccuracy
from modes_cli.data import batches, open_source
from modes_cli.data.overlap import overlap, sample_digest
from modes_cli.data.sample import Sample, SampleSource
from modes_cli.errors import BadOption
from modes_cli.models.groups import SKIPPABLE
from modes_cli.models.identity import data_info
from modes_cli.models.loading import versions
from modes_cli.requests import EvaluateRequest, Outcome
from modes_cli.run_folder import RunFolder, read_json
from modes_cli.runtime.answers import Answers
from modes_cli.search.calibrated import model_spec
from modes_cli.search.selection import found_in, select
from modes_cli.skipping.statistics import PairCounts

CHANGED_KEPT = 24  # questions whose answer changed that the artifact remembers

# (samples, skip?, most new tokens) -> answers
Answer = Callable[[Sequence[Sample], bool, int], Answers]


@dataclass(frozen=True)
class Subject:
    """What is evaluated, known before anything heavy is loaded."""

    runtime: Literal["torch", "ort"]
    model: ModelInfo
    policy: str
    target: float
    thresholds: str
    text_only: bool
    calibrated_on: Sequence[str] | None  # digests of the calibration's samples; None: unknown
    open: Callable[[], Answer]


def evaluate(request: EvaluateRequest) -> Outcome[Evaluation]:
    """Exact-match accuracy of the run's model (PyTorch) or of a bundle (ONNX Runtime), full and skipped.

    Raises:
        MissingArtifact, StaleArtifact, BadArtifact: nothing to evaluate, or not what was searched.
        BadData: samples that cannot be read.
    """
    run = RunFolder(request.run)
    subject = _bundle(request, run, request.bundle) if request.bundle else _run(request, run)
    if request.lmms_tasks:
        from modes_cli.evaluation.lmms import evaluate_tasks

        return evaluate_tasks(request, run, subject)
    source = open_source(request.data, text_only=subject.text_only, progress=request.progress)
    options: dict[str, str | int | float | bool | None] = {
        "runtime": subject.runtime,
        "target": subject.target,
        "batch_size": request.batch_size,
        "max_new_tokens": request.max_new_tokens,
        "thresholds": subject.thresholds,
    }
    data = data_info(source)
    if not request.fresh:
        expected = flatten(subject.model, data, versions(), options)
        kept = run.read_if_same(Evaluation, expected, renew=f"modes evaluate{run.option} --fresh")
        if kept is not None:
            warn(request, kept)
            return Outcome(kept, run.file(Evaluation.FILE), reused=True)
    answer = subject.open()
    request.progress.start("evaluate", 2 * len(source))
    full = Side()
    skipped = Side()
    seen: list[str] = []
    for samples in batches(source, request.batch_size):
        seen += [sample_digest(sample) for sample in samples]
        for side, skip in ((full, False), (skipped, True)):
            side.add(answer(samples, skip, request.max_new_tokens))
            request.progress.advance(len(samples))
    per_task, changed = _compare(source, full.texts, skipped.texts)
    total = sum(task.samples for task in per_task.values())
    accuracy = sum(task.full * task.samples for task in per_task.values()) / total
    retained = sum(task.skipped * task.samples for task in per_task.values()) / total
    counts = skipped.counts
    artifact = Evaluation(
        model=subject.model,
        data=data,
        options=options,
        versions=versions(),
        runtime=subject.runtime,
        thresholds=subject.thresholds,
        target=subject.target,
        full=accuracy,
        skipped=retained,
        retained=retained / accuracy if accuracy else 0.0,
        skip_ratio={"all": counts.skip_ratio(), **counts.per_group()} if counts else {"all": 0.0},
        per_task=per_task,
        policies={subject.policy: retained},
        changed=changed,
        overlap=None if subject.calibrated_on is None else overlap(seen, subject.calibrated_on),
        full_seconds=full.seconds,
        skipped_seconds=skipped.seconds,
    )
    warn(request, artifact)
    return Outcome(artifact, run.write(artifact))


def warn(request: EvaluateRequest, artifact: Evaluation) -> None:
    """Say how many samples were calibrated on, if any were."""
    if artifact.overlap:
        request.progress.note(
            f"warning: `{artifact.overlap}` of the {artifact.data.samples} samples were calibrated on too: "
            "accuracy on them says little about others; choose another `--split` or other `--data`"
        )


def _run(request: EvaluateRequest, run: RunFolder) -> Subject:
    thresholds, calibration = found_in(run)
    result = select(thresholds, request.target)
    spec = model_spec(calibration, request.device, request.trust_remote_code, request.device_map, request.offload)

    def open_it() -> Answer:
        from modes_cli.runtime.torch_model import open_model

        runtime = open_model(spec, run.path, result.target)
        return lambda samples, skip, most: runtime.answer(samples, most, runtime.rule if skip else None)

    digest, known = files.sha256(run.file(Thresholds.FILE)), calibration.sample_digests
    return Subject("torch", calibration.model, result.policy, result.target, digest, spec.text_only, known, open_it)


def _bundle(request: EvaluateRequest, run: RunFolder, folder: Path) -> Subject:
    if not (folder / BUNDLE_FILE).is_file():
        raise BadOption(f"`{folder}` is no bundle: it has no {BUNDLE_FILE}", hint="`modes export` makes one")
    bundle = read_json(folder / BUNDLE_FILE, Bundle)
    if request.target is None or request.target == bundle.target:
        target, tau = bundle.target, None
    else:
        points = {point.target: point.tau for point in bundle.points}
        if request.target not in points:
            raise BadOption(
                f"the bundle has no point for target `{request.target:g}`", hint=f"it has {', '.join(f'{t:g}' for t in points)}"
            )
        target, tau = request.target, points[request.target]

    def open_it() -> Answer:
        from modes_cli.runtime.ort_model import OrtModel

        model = OrtModel(folder, request.device)
        nothing = dict.fromkeys(SKIPPABLE, 0.0)
        return lambda samples, skip, most: model.generate(
            [sample.images for sample in samples],
            [sample.question for sample in samples],
            most,
            tau if skip else nothing,
        )

    digest = files.sha256(folder / BUNDLE_FILE)
    return Subject("ort", bundle.model, bundle.policy, target, digest, False, _calibrated_on(run, bundle), open_it)


def _calibrated_on(run: RunFolder, bundle: Bundle) -> Sequence[str] | None:
    """A bundle does not carry the digests; they are known where the run folder has the calibration it was made with."""
    if not run.exists(Calibration):
        return None
    calibration = run.read(Calibration)
    same = (calibration.model, calibration.data) == (bundle.model, bundle.calibration_data)
    return calibration.sample_digests if same else None


class Side:
    """One way of answering: texts in order, pairs counted, seconds spent in the model."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.seconds = 0.0
        self.counts: PairCounts | None = None

    def add(self, answers: Answers) -> None:
        self.texts += answers.texts
        self.seconds += answers.prefill_seconds + answers.decode_seconds
        if self.counts is None:
            self.counts = PairCounts(answers.counts.layers)
        self.counts.kept += answers.counts.kept
        self.counts.total += answers.counts.total


def is_right(given: str, wanted: str) -> bool:
    """Exact match, but for case, surrounding and repeated white space."""
    return " ".join(given.split()).casefold() == " ".join(wanted.split()).casefold()


def _compare(source: SampleSource, full: list[str], skipped: list[str]) -> tuple[dict[str, TaskAccuracy], list[ChangedAnswer]]:
    right: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    changed: list[ChangedAnswer] = []
    for sample, one, other in zip(source, full, skipped, strict=True):
        pair = is_right(one, sample.answer), is_right(other, sample.answer)
        right[sample.task].append(pair)
        if one != other and len(changed) < CHANGED_KEPT:
            changed.append(
                ChangedAnswer(
                    id=sample.id, task=sample.task, question=sample.question, answer=sample.answer, full=one, skipped=other
                )
            )
    per_task = {
        task: TaskAccuracy(
            full=sum(f for f, _ in pairs) / len(pairs), skipped=sum(s for _, s in pairs) / len(pairs), samples=len(pairs)
        )
        for task, pairs in sorted(right.items())
    }
    return per_task, changed
