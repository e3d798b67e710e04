"""`modes profile`: what a model's MoE blocks look like and cost."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from modes_cli import console, options
from modes_cli.commands import planning

if TYPE_CHECKING:
    from modes_cli.artifacts import Profile


def profile(
    model: options.Model,
    revision: options.Revision = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.DeviceOption = options.Device.auto,
    trust_remote_code: options.TrustRemoteCode = False,
    text_only: options.TextOnly = False,
    special: options.SpecialOption = options.Special.keep,
    family: options.FamilyOption = options.Family.known,
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
    plan: Annotated[
        bool, typer.Option("--plan", help="Read no weights: structure, memory and passes that a calibration needs.")
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Find the MoE blocks: counts, routing statistics and costs per layer and modality."""
    with console.session(json=json, quiet=quiet, debug=debug) as out:
        spec = options.calibration_data(model, data, split, samples, seed, (image_column, question_column, answer_column))
        from modes_cli.requests import ModelSpec, ProfileRequest

        spread = device_map and device_map.value
        checkpoint = ModelSpec(
            model, revision, dtype.value, device.value, trust_remote_code, text_only, spread, offload, family.value,
            special.value,
        )  # fmt: skip
        if plan:
            from modes_cli.calibration.plan import make_plan

            made = make_plan(checkpoint, spec.samples or batch_size, batch_size)
            out.show(planning.result(made), *planning.tables(made))
            return
        from modes_cli.models.profiling import profile_model

        outcome = profile_model(ProfileRequest(checkpoint, spec, run, batch_size, fresh, out.progress))
        out.show(result(outcome.artifact), *tables(outcome.artifact), f"written: {outcome.path}", artifact=outcome.path)


def result(found: "Profile") -> dict[str, Any]:
    """What scripts get of a profile."""
    keys = {"layer", "expert_usage_entropy", "update_angle", "seconds"}
    return {
        "model": found.model.id,
        "family": found.family,
        "moe_layers": found.moe_layers,
        "experts": found.experts,
        "top_k": found.top_k,
        "layers": [layer.model_dump(include=keys) for layer in found.layers],
        "tokens": found.tokens,
    }


def tables(found: "Profile") -> list[Any]:
    """What people get of a profile."""
    groups = list(found.layers[0].update_angle)
    share = found.expert_parameters / found.parameters
    columns = [
        "layer",
        *(f"entropy {g}" for g in groups),
        *(f"angle {g}" for g in groups),
        *(f"top-1 share {g}" for g in groups),
        "seconds",
    ]
    rows = [
        [
            layer.layer,
            *(layer.expert_usage_entropy.get(g, "") for g in groups),
            *(layer.update_angle.get(g, "") for g in groups),
            *(layer.pi_top1.get(g, "") for g in groups),
            layer.seconds,
        ]
        for layer in found.layers
    ]
    return [
        f"{found.model.id}: {found.family}, {found.moe_layers} MoE layers of {found.experts} experts, top-{found.top_k}",
        f"{found.parameters:,} parameters, {share:.0%} of them in experts",
        console.table("Per MoE layer", columns, rows),
    ]
