"""`modes calibrate`: how much each MoE layer matters."""

from typing import TYPE_CHECKING, Any

from modes_cli import console, options

if TYPE_CHECKING:
    from modes_cli.artifacts import Calibration

COLUMNS = ("all", "text", "vision")


def calibrate(
    model: options.Model,
    revision: options.Revision = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.DeviceOption = options.Device.auto,
    trust_remote_code: options.TrustRemoteCode = False,
    text_only: options.TextOnly = False,
    special: options.SpecialOption = options.Special.keep,
    family: options.FamilyOption = options.Family.known,
    quantize: options.QuantizeOption = None,
    device_map: options.DeviceMapOption = None,
    offload: options.Offload = False,
    data: options.Data = None,
    split: options.Split = None,
    samples: options.Samples = None,
    batch_size: options.BatchSize = 16,
    seed: options.Seed = 0,
    image_column: options.ImageColumn = None,
    question_column: options.QuestionColumn = None,
    answer_column: options.AnswerColumn = None,
    run: options.RunDir = None,
    fresh: options.Fresh = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Measure each layer's importance, and keep routing scores and reference distributions for the search."""
    with console.session(json=json, quiet=quiet, debug=debug) as out:
        spec = options.calibration_data(model, data, split, samples, seed, (image_column, question_column, answer_column))
        from modes_cli.calibration import calibrate as measure
        from modes_cli.requests import CalibrateRequest, ModelSpec

        spread = device_map and device_map.value
        checkpoint = ModelSpec(
            model, revision, dtype.value, device.value, trust_remote_code, text_only, spread, offload, family.value,
            special.value, quantize and quantize.value,
        )  # fmt: skip
        outcome = measure(CalibrateRequest(checkpoint, spec, run, batch_size, fresh, out.progress))
        out.show(result(outcome.artifact), *tables(outcome.artifact), f"written: {outcome.path}", artifact=outcome.path)


def result(found: "Calibration") -> dict[str, Any]:
    """What scripts get of a calibration."""
    return {
        "importance": {
            layer: {column: getattr(alpha, column) for column in COLUMNS} for layer, alpha in found.importance.items()
        },
        "samples": found.samples,
        "forward_equivalents": found.forward_equivalents,
        "naive_forwards": found.naive_forwards,
    }


def tables(found: "Calibration") -> list[Any]:
    """What people get of a calibration."""
    rows = [[layer, *(getattr(alpha, column) for column in COLUMNS)] for layer, alpha in found.importance.items()]
    work = f"{found.forward_equivalents:.1f} forward passes' worth of work instead of {found.naive_forwards:.0f}"
    return [
        console.table(
            "Layer importance (share of the damage when a layer's routed experts are off)", ["layer", *COLUMNS], rows
        ),
        f"{found.samples} samples, {found.answer_tokens} answer tokens; {work}",
    ]
