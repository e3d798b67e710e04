"""`modes demo`: every step on the built-in model, from the checkpoint to a report."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modes_cli import console, options
from modes_cli.commands.verify import require_ok

if TYPE_CHECKING:
    from modes_cli.artifacts import Evaluation
    from modes_cli.requests import Generated

TARGETS = (0.5, 0.67, 0.75)
CHOSEN = 0.75
QUESTION_SEED = 1


@dataclass(frozen=True)
class Asked:
    """The one question that the demo shows, with its right answer."""

    image: Path
    question: str
    answer: str


def demo(
    samples: Annotated[int, typer.Option(min=1, help="Held-out questions to evaluate on.")] = options.EVALUATION_SAMPLES[
        options.DIGITS
    ],
    run: options.RunDir = None,
    fresh: options.Fresh = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Run every step on the built-in model, and show what skipping costs and saves."""
    with console.session(json=json, quiet=quiet, debug=debug) as out:
        from modes_cli.locks import one_writer
        from modes_cli.report import write_report
        from modes_cli.run_folder import RunFolder

        with one_writer(RunFolder(run).path, "demo"):
            bundle, evaluation = _steps(out, run, fresh, samples)
            generated, asked = _ask(bundle, run)
            out.step(f"generate    {asked.question} -> {generated.text} (right: {asked.answer})")
            report = write_report(run)
        out.step(f"report      {report}")
        out.show(result(evaluation, bundle, report), *tables(evaluation, bundle, report), artifact=report)


def _steps(out: console.Session, run: Path | None, fresh: bool, samples: int) -> "tuple[Path, Evaluation]":
    """Profile to evaluate; one line each."""
    from modes_cli.calibration import calibrate
    from modes_cli.evaluation import evaluate
    from modes_cli.export import export_bundle
    from modes_cli.export.verify import verify_bundle
    from modes_cli.models.profiling import profile_model
    from modes_cli.requests import CalibrateRequest, EvaluateRequest, ExportRequest, ModelSpec, ProfileRequest, SearchRequest
    from modes_cli.search import find_thresholds

    model, no_columns = ModelSpec(options.DIGITS), (None, None, None)
    data = options.calibration_data(options.DIGITS, None, None, None, 0, no_columns)
    held_out = options.evaluation_data(options.DIGITS, None, None, samples, 0, no_columns)

    profile = profile_model(ProfileRequest(model, data, run, fresh=fresh, progress=out.progress)).artifact
    out.step(f"profile     {profile.family}: {profile.moe_layers} MoE layers of {profile.experts} experts, top-{profile.top_k}")

    calibration = calibrate(CalibrateRequest(model, data, run, fresh=fresh, progress=out.progress)).artifact
    first, alpha = max(calibration.importance.items(), key=lambda item: item[1].all)
    out.step(f"calibrate   {calibration.samples} samples; layer {first} matters most ({alpha.all:.0%} of the damage)")

    thresholds = find_thresholds(SearchRequest(TARGETS, run, fresh=fresh, progress=out.progress)).artifact
    point = next(one for one in thresholds.results if one.target == CHOSEN)
    tau = ", ".join(f"{group} {value:.3g}" for group, value in point.tau.items())
    found = f"{point.skip_ratio:.1%} skipped at KL {point.kl:.4f}, {thresholds.model_passes:.1f} passes"
    out.step(f"search      policy {point.policy}, tau {tau}: {found}")

    exported = export_bundle(ExportRequest(run, target=CHOSEN, fresh=fresh, progress=out.progress))
    size = sum(file.bytes for file in exported.bundle.files)
    out.step(f"export      {len(exported.bundle.files)} files, {size / 1e6:.1f} MB in {exported.path}")

    checks = verify_bundle(exported.path)
    require_ok(exported.path, checks)
    out.step(f"verify      {len(checks)} checks, all well")

    evaluation = evaluate(EvaluateRequest(held_out, run, exported.path, fresh=fresh, progress=out.progress)).artifact
    asked = f"{evaluation.data.samples} held-out questions through the exported bundle"
    out.step(f"evaluate    {asked}: {evaluation.retained:.1%} of the accuracy retained")
    return exported.path, evaluation


def _ask(bundle: Path, run: Path | None) -> "tuple[Generated, Asked]":
    """One held-out question, answered by the exported bundle. Its image is left in the run folder to look at."""
    from PIL import Image

    from modes_cli import files
    from modes_cli.data.digits_vqa import samples
    from modes_cli.requests import GenerateRequest
    from modes_cli.run_folder import RunFolder
    from modes_cli.runtime.generate import generate

    scene, question = next(samples("test", QUESTION_SEED))
    picture = io.BytesIO()
    Image.fromarray(scene.canvas).save(picture, format="PNG")
    asked = Asked(RunFolder(run).file("question.png"), question.text, question.answer)
    files.write_bytes(asked.image, picture.getvalue())
    return generate(GenerateRequest(bundle, (asked.image,), asked.question)), asked


def _speedup(evaluation: "Evaluation") -> float:
    return evaluation.full_seconds / evaluation.skipped_seconds if evaluation.skipped_seconds else 0.0


def result(evaluation: "Evaluation", bundle: Path, report: Path) -> dict[str, Any]:
    """What scripts get of a demo."""
    return {
        "full": evaluation.full,
        "skipped": evaluation.skipped,
        "retained": evaluation.retained,
        "skip_ratio": evaluation.skip_ratio,
        "speedup": _speedup(evaluation),
        "bundle": str(bundle),
        "report": str(report),
    }


def tables(evaluation: "Evaluation", bundle: Path, report: Path) -> list[Any]:
    """What people get of a demo."""
    shares: list[list[object]] = [[f"skipped, {group}", f"{share:.1%}"] for group, share in evaluation.skip_ratio.items()]
    rows: list[list[object]] = [
        ["accuracy, all experts", f"{evaluation.full:.1%}"],
        ["accuracy, skipping", f"{evaluation.skipped:.1%}"],
        ["retained", f"{evaluation.retained:.1%}"],
        *shares,
        ["time, all experts", f"{evaluation.full_seconds:.2f} s"],
        ["time, skipping", f"{evaluation.skipped_seconds:.2f} s"],
        ["speedup", f"{_speedup(evaluation):.2f}x"],
        ["bundle", bundle],
        ["report", report],
    ]
    return [console.table("Result", ["", ""], rows)]
