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
    from modes_cli.data.sample import DataSpec


def evaluate(
    bundle: options.BundleOption = None,
    target: options.Target = None,
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
        _require_sane(target, min_retained)
        if bundle is not None and (offload or device_map is not None):
            raise BadOption("`--offload` and `--device-map` are for the run's model", hint="a bundle runs in ONNX Runtime")
        columns = (image_column, question_column, answer_column)
        tasks = tuple(task.strip() for task in (lmms_tasks or "").split(",") if task.strip())
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
            )
        )
        out.show(result(outcome.artifact), *tables(outcome.artifact), f"written: {outcome.path}", artifact=outcome.path)
        require_retained(outcome.artifact.retained, min_retained)


def _require_sane(target: float | None, min_retained: float | None) -> None:
    if target is not None:
        options.require_share("--target", target)
    if min_retained is not None and not (math.isfinite(min_retained) and min_retained >= 0):
        raise BadOption(
            f"`--min-retained {min_retained}` is not a share", hint="0.97 asks for 97% of the full model's accuracy"
        )


def _tasks_data(tasks: tuple[str, ...], given: str, samples: int | None, others: tuple[str | None, ...]) -> "DataSpec":
    """Tasks bring their own data; `samples` limits each of them.

    Raises:
        BadOption: no task, or options about other data.
    """
    from modes_cli.data.sample import DataSpec

    if not tasks:
        raise BadOption(f"`--lmms-tasks {given}` names no task", hint="for example `--lmms-tasks chartqa,mmstar`")
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
        "full": found.full,
        "skipped": found.skipped,
        "retained": found.retained,
        "skip_ratio": found.skip_ratio,
        "per_task": {task: one.model_dump() for task, one in found.per_task.items()},
        "policies": found.policies,
        "overlap": found.overlap,
    }


def tables(found: "Evaluation") -> list[Any]:
    """What people get of an evaluation."""
    rows: list[list[object]] = [[task, one.full, one.skipped, one.samples] for task, one in found.per_task.items()]
    rows.append(["all", found.full, found.skipped, found.data.samples])
    shares = ", ".join(f"{group} {share:.1%}" for group, share in found.skip_ratio.items())
    shown: list[Any] = [console.table("Accuracy", ["task", "full", "skipped", "samples"], rows)]
    if found.policies:
        shown.append(console.table("Other policies at the same target", ["policy", "accuracy"], list(found.policies.items())))
    seconds = f"{found.full_seconds:.2f} s full, {found.skipped_seconds:.2f} s skipped ({found.runtime})"
    return [*shown, f"retained {found.retained:.2%}; skipped: {shares}; {seconds}"]
