"""Filling and writing evaluation.json, whoever answered."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from modes_cli.artifacts import Evaluation
from modes_cli.artifacts.base import DataInfo
from modes_cli.artifacts.evaluation import ChangedAnswer, Interval, LeftOut, PolicyAccuracy, TaskAccuracy
from modes_cli.data.overlap import overlap
from modes_cli.evaluation.answering import Side
from modes_cli.evaluation.subject import Subject
from modes_cli.models.loading import versions
from modes_cli.requests import EvaluateRequest, Outcome
from modes_cli.run_folder import RunFolder


@dataclass(frozen=True)
class Accuracies:
    """What was measured. `full`, `skipped`: accuracy of all samples, 0..1. `comparison`: with `--policies`."""

    full: float
    skipped: float
    per_task: Mapping[str, TaskAccuracy]
    interval: Interval | None = None
    changed: Sequence[ChangedAnswer] = ()
    comparison: Sequence[PolicyAccuracy] = ()
    left_out: Sequence[LeftOut] = field(default=())


def write(
    request: EvaluateRequest,
    run: RunFolder,
    subject: Subject,
    data: DataInfo,
    options: dict[str, str | int | float | bool | None],
    sides: tuple[Side, Side],
    digests: Sequence[str],
    found: Accuracies,
) -> Outcome[Evaluation]:
    """Write evaluation.json. `sides`: with all experts, and skipping. `digests`: of the samples."""
    full, skipped = sides
    at = subject.target, subject.decode_target
    policies = {one.policy: one.accuracy for one in found.comparison if (one.target, one.decode_target) == at}
    artifact = Evaluation(
        model=subject.model,
        data=data,
        options=options,
        versions=versions(),
        runtime=subject.runtime,
        thresholds=subject.thresholds,
        target=subject.target,
        decode_target=subject.decode_target,
        full=found.full,
        skipped=found.skipped,
        retained=retained(found.full, found.skipped),
        interval=found.interval,
        skip_ratio=skipped.skip_ratio,
        per_task=dict(found.per_task),
        policies=policies or {subject.policy: found.skipped},
        comparison=list(found.comparison),
        left_out=list(found.left_out),
        changed=list(found.changed),
        overlap=None if subject.calibrated_on is None else overlap(digests, subject.calibrated_on),
        full_seconds=full.seconds,
        skipped_seconds=skipped.seconds,
    )
    warn(request, artifact)
    return Outcome(artifact, run.write(artifact))


def reused(request: EvaluateRequest, run: RunFolder, kept: Evaluation) -> Outcome[Evaluation]:
    """What is there already."""
    warn(request, kept)
    return Outcome(kept, run.file(Evaluation.FILE), reused=True)


def warn(request: EvaluateRequest, artifact: Evaluation) -> None:
    """Say how many samples were calibrated on, if any were."""
    if artifact.overlap:
        request.progress.note(
            f"warning: `{artifact.overlap}` of the {artifact.data.samples} samples were calibrated on too: "
            "accuracy on them says little about others; choose another `--split` or other `--data`"
        )


def retained(full: float, other: float) -> float:
    """The share of accuracy that is left; 0 where there was none."""
    return other / full if full else 0.0


def by_task(tasks: Sequence[str], full: Sequence[bool], skipped: Sequence[bool]) -> dict[str, TaskAccuracy]:
    """Accuracy of each task, by name; the arguments are in the order of the samples."""
    right: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for task, one, other in zip(tasks, full, skipped, strict=True):
        right[task].append((one, other))
    return {
        task: TaskAccuracy(
            full=sum(f for f, _ in pairs) / len(pairs), skipped=sum(s for _, s in pairs) / len(pairs), samples=len(pairs)
        )
        for task, pairs in sorted(right.items())
    }
