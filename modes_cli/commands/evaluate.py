"""`modes evaluate`: what skipping costs in accuracy, and a gate for pipelines."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modes_cli import console, options
from modes_cli.commands.verify import require_bundle
from modes_cli.errors import BadOption, GateFailed

if TYPE_CHECKING:
    from modes_cli.artifacts import Evaluation
    from modes_cli.artifacts.evaluation import Interval, PolicyAccuracy
    from modes_cli.data.sample import DataSpec

CHOSEN = "as searched"  # the row of what `modes search` chose
BEST, TIE = "*", "~"


def evaluate(
    bundle: options.BundleOption = None,
    target: options.Target = None,
    decode_target: options.DecodeTarget = None,
    policies: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Compare with other policies: `all`, or names with commas.", show_default=False),
    ] = None,
    min_retained: Annotated[
        float | None, typer.Option(help="Fail with exit code 3 if less of the accuracy is retained.")
    ] = None,
    data: options.Data = None,
    split: options.Split = None,
    samples: options.Samples = None,
    batch_size: options.BatchSize = 32,
    seed: options.Seed = 0,
    image_column: options.ImageColumn = None,
    question_column: options.QuestionColumn = None,
    answer_column: options.AnswerColumn = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 32,
    lmms_tasks: Annotated[
        str | None,
        typer.Option(metavar="TASKS", help="Tasks of lmms-eval instead of --data: names or .yaml files, with commas."),
    ] = None,
    device: options.DeviceOption = options.Device.auto,
    device_map: options.DeviceMapOption = None,
    offload: options.Offload = False,
    trust_remote_code: options.TrustRemoteCode = False,
    run: options.RunDir = None,
    fresh: options.Fresh = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Accuracy, full and skipped, of the run's model or of an exported bundle."""
    with console.session(json=json, quiet=quiet, debug=debug) as out:
        _require_sane(target, decode_target, min_retained)
        compared = _names("--policies", policies, "policy", "`--policies all`, or `--policies modes,topk`")
        if bundle is not None and (offload or device_map is not None):
            raise BadOption("`--offload` and `--device-map` are for the run's model", hint="a bundle runs in ONNX Runtime")
        columns = (image_column, question_column, answer_column)
        tasks = _names("--lmms-tasks", lmms_tasks, "task", "`--lmms-tasks chartqa,mmstar`")
        if lmms_tasks is None:
            spec = options.evaluation_data(model_of(run, bundle), data, split, samples, seed, columns)
        else:
            spec = _tasks_data(tasks, lmms_tasks, samples, (data, split, *columns))
        from modes_cli.evaluation import evaluate as measure
        from modes_cli.requests import EvaluateRequest

        outcome = measure(
            EvaluateRequest(
                spec,
                run,
                bundle,
                target,
                batch_size,
                max_new_tokens,
                device.value,
                trust_remote_code,
                fresh,
                out.progress,
                device_map and device_map.value,
                offload,
                tasks,
                decode_target,
                compared,
            )
        )
        out.show(result(outcome.artifact), *tables(outcome.artifact), f"written: {outcome.path}", artifact=outcome.path)
        require_retained(outcome.artifact.retained, min_retained)


def _require_sane(target: float | None, decode_target: float | None, min_retained: float | None) -> None:
    for option, share in (("--target", target), ("--decode-target", decode_target)):
        if share is not None:
            options.require_share(option, share)
    if min_retained is not None and not (math.isfinite(min_retained) and min_retained >= 0):
        raise BadOption(
            f"`--min-retained {min_retained}` is not a share", hint="0.97 asks for 97% of the full model's accuracy"
        )


def _names(option: str, given: str | None, what: str, example: str) -> tuple[str, ...]:
    """What stands between commas; none where the option was not given.

    Raises:
        BadOption: nothing stands there.
    """
    names = tuple(name.strip() for name in (given or "").split(",") if name.strip())
    if given is not None and not names:
        raise BadOption(f"`{option} {given}` names no {what}", hint=f"for example {example}")
    return names


def _tasks_data(tasks: tuple[str, ...], given: str, samples: int | None, others: tuple[str | None, ...]) -> "DataSpec":
    """Tasks bring their own data; `samples` limits each of them.

    Raises:
        BadOption: options about other data.
    """
    from modes_cli.data.sample import DataSpec

    if any(other is not None for other in others):
        raise BadOption(
            f"`--lmms-tasks {given}` brings its own data", hint="leave out `--data`, `--split` and the options for columns"
        )
    return DataSpec(f"lmms-eval: {','.join(tasks)}", None, samples)


def model_of(run: Path | None, bundle: Path | None) -> str:
    """The model that is evaluated; it decides which data is the default.

    Raises:
        MissingArtifact: neither a bundle nor a calibrated run.
    """
    from modes_cli.artifacts import Bundle, Calibration
    from modes_cli.run_folder import RunFolder, read_json

    if bundle is not None:
        return read_json(require_bundle(bundle) / "bundle.json", Bundle).model.id
    return RunFolder(run).read(Calibration).model.id


def require_retained(retained: float, least: float | None) -> None:
    """The quality gate. Raises GateFailed; the artifact is written and the result printed by then."""
    if least is not None and retained < least:
        raise GateFailed(
            f"`{retained:.4f}` of the accuracy is retained, less than `{least:g}`",
            hint="search a smaller `--target`, or calibrate on more samples",
        )


def result(found: "Evaluation") -> dict[str, Any]:
    """What scripts get of an evaluation."""
    return {
        "target": found.target,
        "decode_target": found.decode_target,
        "full": found.full,
        "skipped": found.skipped,
        "retained": found.retained,
        "interval": found.interval and found.interval.model_dump(),
        "skip_ratio": found.skip_ratio,
        "per_task": {task: one.model_dump() for task, one in found.per_task.items()},
        "policies": found.policies,
        "comparison": [one.model_dump() for one in found.comparison],
        "left_out": [one.model_dump() for one in found.left_out],
        "overlap": found.overlap,
    }


def tables(found: "Evaluation") -> list[Any]:
    """What people get of an evaluation."""
    rows: list[list[object]] = [[task, one.full, one.skipped, one.samples] for task, one in found.per_task.items()]
    rows.append(["all", found.full, found.skipped, found.data.samples])
    shares = ", ".join(f"{group} {share:.1%}" for group, share in found.skip_ratio.items())
    at = target_name(found.target, found.decode_target)
    shown: list[Any] = [console.table(f"Accuracy at target {at}", ["task", "full", "skipped", "samples"], rows)]
    if found.comparison:
        shown += policies_table(found)
    seconds = f"{found.full_seconds:.2f} s full, {found.skipped_seconds:.2f} s skipped ({found.runtime})"
    return [*shown, f"retained {found.retained:.2%}{_between(found.interval)}; skipped: {shares}; {seconds}"]


def policies_table(found: "Evaluation") -> list[Any]:
    """Accuracy retained, policies by targets; which one `modes search` chose stands under the target."""
    columns = {(one.target, one.decode_target): one.policy for one in found.comparison if one.chosen}
    cells: dict[str, dict[tuple[float, float | None], str]] = {CHOSEN: {}}
    for one in found.comparison:
        for row in (CHOSEN, one.policy) if one.chosen else (one.policy,):
            cells.setdefault(row, {})[(one.target, one.decode_target)] = _cell(one, found)
    for missing in found.left_out:
        cells.setdefault(missing.policy, {})
    heads = [f"{target_name(*at)}\n{policy}" for at, policy in columns.items()]
    rows = [[row, *(cells[row].get(at, "") for at in columns)] for row in (CHOSEN, *sorted(cells.keys() - {CHOSEN}))]
    half = "± half of the 95% interval" if found.full else "no intervals, since the full model has nothing right"
    legend = f"% of the full accuracy, {half}; {BEST} best at the target, {TIE} a tie with it (paired bootstrap)"
    left_out = [
        f"left out: {one.policy} at {target_name(one.target, one.decode_target)}: {one.reason}" for one in found.left_out
    ]
    return [console.table("Accuracy retained, by policy and target", ["policy", *heads], rows), legend, *left_out]


def _cell(one: "PolicyAccuracy", found: "Evaluation") -> str:
    best = max(other.accuracy for other in found.comparison if _same_target(one, other))
    mark = BEST if one.accuracy == best else TIE if one.ties_best else " "
    if one.interval is None:
        return f"{100 * one.retained:.1f} {mark}"
    return f"{100 * one.retained:.1f} ±{50 * (one.interval.high - one.interval.low):.1f} {mark}"


def _same_target(one: "PolicyAccuracy", other: "PolicyAccuracy") -> bool:
    return (one.target, one.decode_target) == (other.target, other.decode_target)


def target_name(target: float, decode_target: float | None) -> str:
    """As people read it."""
    return f"{target:g}" if decode_target is None else f"{target:g}, decode {decode_target:g}"


def _between(interval: "Interval | None") -> str:
    return "" if interval is None else f" (95%: {interval.low:.1%} to {interval.high:.1%})"
