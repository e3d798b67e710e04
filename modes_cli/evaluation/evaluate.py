"""Answer held-out questions with nothing skipped and with thresholds, and compare."""

from collections.abc import Hashable
from functools import partial

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
from modes_cli.models.identity import data_info
from modes_cli.models.loading import versions
from modes_cli.requests import EvaluateRequest, Outcome
from modes_cli.run_folder import RunFolder

FULL, SKIPPED = "full", "skipped"


def evaluate(request: EvaluateRequest) -> Outcome[Evaluation]:
    """Exact-match accuracy of the run's model (PyTorch) or of a bundle (ONNX Runtime), full and skipped; with `policies`, of
    every one of them at every target that was searched.

    Raises:
        MissingArtifact, StaleArtifact, BadArtifact: nothing to evaluate, or not what was searched.
        BadOption: no such target or policy, or options that do not go together.
        BadData: samples that cannot be read.
    """
    run = RunFolder(request.run)
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
    if not request.fresh:
        expected = flatten(subject.model, data, versions(), options)
        kept = run.read_if_same(Evaluation, expected, renew=f"modes evaluate{run.option} --fresh")
        if kept is not None:
            return reused(request, run, kept)
    if names:
        assert subject.searched is not None  # refused for bundles
        skipped, heard, comparison, left_out = _compare(request, subject.searched, subject, names, source)
    else:
        skipped, heard = SKIPPED, _answer(request, subject, source)
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
    return write(request, run, subject, data, options, sides, heard.digests, found)


def _answer(request: EvaluateRequest, subject: Subject, source: SampleSource) -> Answered:
    """With all experts, and skipping."""
    answer, most = subject.open(), request.max_new_tokens
    ways: dict[Hashable, Way] = {
        FULL: lambda samples: answer(samples, False, most),
        SKIPPED: lambda samples: answer(samples, True, most),
    }
    return answered(source, ways, request.batch_size, request.progress)


def _compare(
    request: EvaluateRequest, searched: Searched, subject: Subject, names: list[str], source: SampleSource
) -> tuple[Hashable, Answered, list[PolicyAccuracy], list[LeftOut]]:
    """Which of the ways is the subject's own, the answers in every way, the table, and what is missing there."""
    with contest(searched, names, request.progress) as found:
        answer = partial(found.runtime.answer, max_new_tokens=request.max_new_tokens)
        ways: dict[Hashable, Way] = {FULL: partial(answer, rule=None)}
        ways |= {key: partial(answer, rule=rule) for key, rule in found.rules.items()}
        heard = answered(source, ways, request.batch_size, request.progress)
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
