"""Answer held-out questions with nothing skipped and with thresholds, and compare."""

from collections.abc import Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any

from modes_cli import files
from modes_cli.artifacts import Evaluation
from modes_cli.artifacts.base import flatten
from modes_cli.artifacts.evaluation import LeftOut, PolicyAccuracy
from modes_cli.data import open_source
from modes_cli.data.sample import SampleSource
from modes_cli.errors import BadOption
from modes_cli.evaluation import bootstrap
from modes_cli.evaluation.answering import Answered, Way, answered
from modes_cli.evaluation.artifact import Accuracies, by_task, reused, write
from modes_cli.evaluation.changed import changed_answers
from modes_cli.evaluation.comparison import compared, contest, interval, named
from modes_cli.evaluation.subject import Searched, Subject, subject_of
from modes_cli.fingerprint import fingerprint
from modes_cli.locks import one_writer
from modes_cli.models.identity import data_info
from modes_cli.models.loading import Loaded, versions
from modes_cli.requests import EvaluateRequest, Outcome
from modes_cli.run_folder import RunFolder
from modes_cli.search.memory import Memory
from modes_cli.unfinished import Unfinished, file_name

UNFINISHED = file_name(Evaluation.FILE)
COMPARISON = file_name("comparison")  # what the search with other policies found; its answers are in the first one
FULL, SKIPPED = "full", "skipped"


def evaluate(request: EvaluateRequest) -> Outcome[Evaluation]:
    """Exact-match accuracy of the run's model (PyTorch) or of a bundle (ONNX Runtime), full and skipped; with `policies`, of
    every one of them at every target that was searched.

    Raises:
        MissingArtifact, StaleArtifact, BadArtifact: nothing to evaluate, or not what was searched.
        BadOption: no such target or policy, or options that do not go together.
        BadData: samples that cannot be read.
        RunLocked: another command writes in the run folder.
    """
    run = RunFolder(request.run)
    with one_writer(run.path, "evaluate"):
        return _evaluate(request, run)


def _evaluate(request: EvaluateRequest, run: RunFolder) -> Outcome[Evaluation]:
    if request.policies and request.lmms_tasks:
        raise BadOption("`--policies` needs answers sample by sample", hint="leave out `--lmms-tasks`, or `--policies`")
    subject = subject_of(request, run)
    if request.lmms_tasks:
        from modes_cli.evaluation.lmms import evaluate_tasks

        return evaluate_tasks(request, run, subject)
    names = named(request.policies)
    source = open_source(request.data, text_only=subject.text_only, progress=request.progress)
    options = subject.options(
        batch_size=request.batch_size, max_new_tokens=request.max_new_tokens, policies=",".join(names) or None
    )
    data = data_info(source)
    expected = flatten(subject.model, data, versions(), options)
    if not request.fresh:
        kept = run.read_if_same(Evaluation, expected, renew=f"modes evaluate{run.option} --fresh")
        if kept is not None:
            _clear(run)
            return reused(request, run, kept)
    work = _Work(request, run, subject, source, expected)
    if names:
        assert subject.searched is not None  # refused for bundles
        skipped, heard, comparison, left_out = _compare(work, subject.searched, names)
    else:
        skipped, heard = SKIPPED, _answer(work)
        comparison, left_out = [], []
    sides = heard.sides[FULL], heard.sides[skipped]
    right = heard.right(FULL), heard.right(skipped)
    found = Accuracies(
        full=sum(right[0]) / len(right[0]),
        skipped=sum(right[1]) / len(right[1]),
        per_task=by_task(heard.tasks, *right),
        interval=interval(bootstrap.retained(*bootstrap.resampled(right, request.data.seed))),
        changed=changed_answers(source, (sides[0].texts, sides[1].texts), right),
        comparison=comparison,
        left_out=left_out,
    )
    outcome = write(request, run, subject, data, options, sides, heard.digests, found)
    _clear(run)
    return outcome


def _clear(run: RunFolder) -> None:
    for name in (UNFINISHED, COMPARISON):
        files.remove(run.file(name))


@dataclass(frozen=True)
class _Work:
    """One evaluation. `identity`: of the artifact, flat."""

    request: EvaluateRequest
    run: RunFolder
    subject: Subject
    source: SampleSource
    identity: dict[str, Any]

    @property
    def fingerprint(self) -> dict[str, Any]:
        return fingerprint(self.identity, *self.subject.place())

    def answered(self, ways: dict[Hashable, Way]) -> Answered:
        request = self.request
        unfinished = Unfinished(self.run.file(UNFINISHED), self.fingerprint, request.progress)
        return answered(self.source, ways, request.batch_size, request.progress, unfinished, fresh=request.fresh)

    def memory(self, loaded: Loaded) -> Memory:
        unfinished = Unfinished(self.run.file(COMPARISON), self.fingerprint, self.request.progress)
        return Memory(unfinished, fresh=self.request.fresh)


def _answer(work: _Work) -> Answered:
    """With all experts, and skipping."""
    answer, most = work.subject.open(), work.request.max_new_tokens
    ways: dict[Hashable, Way] = {
        FULL: lambda samples: answer(samples, False, most),
        SKIPPED: lambda samples: answer(samples, True, most),
    }
    return work.answered(ways)


def _compare(
    work: _Work, searched: Searched, names: list[str]
) -> tuple[Hashable, Answered, list[PolicyAccuracy], list[LeftOut]]:
    """Which of the ways is the subject's own, the answers in every way, the table, and what is missing there."""
    request, subject = work.request, work.subject
    with contest(searched, names, request.progress, work.memory) as found:
        answer = partial(found.runtime.answer, max_new_tokens=request.max_new_tokens)
        ways: dict[Hashable, Way] = {FULL: partial(answer, rule=None)}
        ways |= {key: partial(answer, rule=rule) for key, rule in found.rules.items()}
        heard = work.answered(ways)
    own = next(
        one.rule.key
        for one in found.contenders
        if one.chosen and (one.target, one.decode_target) == (subject.target, subject.decode_target)
    )
    table = compared(
        found.contenders,
        heard.right(FULL),
        {key: heard.right(key) for key in found.rules},
        {key: heard.sides[key].skip_ratio for key in found.rules},
        searched.thresholds.groups,
        request.data.seed,
    )
    return own, heard, table, list(found.left_out)
