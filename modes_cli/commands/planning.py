"""What `modes profile MODEL --plan` shows."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from modes_cli import console

if TYPE_CHECKING:
    from modes_cli.calibration.plan import Plan


def result(plan: "Plan") -> dict[str, Any]:
    """What scripts get. Sizes are bytes."""
    found = asdict(plan)
    moe = list(found.pop("moe_layers"))
    found["placements"] = [{**asdict(one), "needed": one.needed} for one in plan.placements]
    found["weights"]["resident"] = plan.weights.resident
    head = {"model": found.pop("model"), "family": found.pop("family"), "moe_layers": len(moe)}
    return {**head, "experts": found.pop("experts"), "top_k": found.pop("top_k"), "plan": {**found, "layers_with_experts": moe}}


def tables(plan: "Plan") -> list[Any]:
    """What people get."""
    from modes_cli.calibration.plan import ANSWER_TOKENS, TOKENS
    from modes_cli.requests import PASSES

    weights = plan.weights
    parts: list[tuple[str, int]] = [
        ("experts", weights.experts),
        ("rest of the decoder layers", sum(weights.layers) - weights.experts),
        ("token embedding", weights.embedding),
        ("head", weights.head),
        ("vision and projector", weights.vision),
        ("other", weights.other),
        ("all", weights.total),
    ]
    placed = [[one.name, one.option, _size(one.weights), _size(one.working), _size(one.needed)] for one in plan.placements]
    largest, smallest = max(weights.layers), min(weights.layers)
    here = ", ".join([f"{_size(plan.memory)} of memory", *(f"a GPU with {_size(size)}" for size in plan.gpus)])
    return [
        f"{plan.model}: {plan.family}, {len(plan.moe_layers)} MoE layers of {plan.experts} experts, top-{plan.top_k}",
        f"{plan.parameters:,} parameters in {plan.dtype}; {len(weights.layers)} decoder layers of "
        + (f"{largest:,} bytes" if largest == smallest else f"{smallest:,} to {largest:,} bytes"),
        console.table("Weights", ["part", "size"], [[name, _size(size)] for name, size in parts]),
        console.table(
            "Memory for a calibration, on the fullest device", ["weights on", "option", "weights", "batch", "together"], placed
        ),
        f"a batch: {plan.batch_size} samples of {TOKENS} tokens with {ANSWER_TOKENS} answer tokens, assumed; here: {here}",
        f"calibrate: {plan.samples} samples in {plan.batches} batches, each {plan.forward_equivalents:.1f} forward passes' "
        f"worth instead of {plan.naive_forwards}; reference distributions: {_size(plan.reference)} of host memory",
        f"with --offload it reads {_size(plan.offload_read)} from the files: larger batches read less",
        f"search: at most {PASSES} passes over these samples for each target, the default of --passes",
    ]


def _size(size: int) -> str:
    """Three digits, as people say sizes."""
    for power, unit in ((12, "TB"), (9, "GB"), (6, "MB")):
        if size >= 10**power:
            return f"{size / 10**power:.3g} {unit}"
    return f"{size / 1e3:.3g} kB"
