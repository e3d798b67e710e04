"""What each section of the report shows, from the artifacts alone."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from modes_cli.artifacts import Bench, Calibration, Evaluation, Profile, Thresholds
from modes_cli.report import charts

MOST_CHANGED = 40  # changed answers shown; the rest is in evaluation.json
GROUP_CSS = {"all": "c-all", "text": "c-text", "vision": "c-vision"}


@dataclass(frozen=True)
class Table:
    """Rows of text; the page escapes every cell. `text_columns` are left aligned."""

    caption: str
    columns: list[str]
    rows: list[list[str]]
    text_columns: frozenset[int] = frozenset({0})


@dataclass(frozen=True)
class Chart:
    caption: str
    svg: str


@dataclass(frozen=True)
class Section:
    """One part of the page. `missing` is the command that makes what it lacks, instead of content."""

    id: str
    title: str
    lead: str = ""
    legend: list[tuple[str, str]] = field(default_factory=list)  # (class, name)
    charts: list[Chart] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    missing: str | None = None


def share(value: float) -> str:
    return f"{100 * value:.1f}%"


def exact(value: float) -> str:
    return f"{value:.4g}"


def _in_layer_order(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (0, int(name), "") if name.isdigit() else (1, 0, name))


def importance(found: Calibration) -> Section:
    layers = _in_layer_order(found.importance)
    shown = [column for column in GROUP_CSS if any(getattr(found.importance[layer], column) for layer in layers)]
    names = {"all": "all tokens", "text": "text tokens only", "vision": "vision tokens only"}
    pictures = [
        Chart(
            f"Importance, {names[column]}",
            charts.columns(
                f"Importance per MoE layer, {names[column]}",
                [
                    (
                        layer,
                        getattr(found.importance[layer], column),
                        f"layer {layer}: {getattr(found.importance[layer], column):.4f}",
                    )
                    for layer in layers
                ],
                GROUP_CSS[column],
            ),
        )
        for column in shown
    ]
    rows = [
        [layer, *(exact(getattr(found.importance[layer], f"{kind}{column}")) for kind in ("", "kl_") for column in GROUP_CSS)]
        for layer in layers
    ]
    columns = ["layer", *(f"share {column}" for column in GROUP_CSS), *(f"KL {column}" for column in GROUP_CSS)]
    return Section(
        "importance",
        "Layer importance",
        f"How much the answer changes when a layer's routed experts are off, as shares of the sum over layers; "
        f"{found.samples} samples, {found.answer_tokens} answer tokens.",
        charts=pictures,
        tables=[Table("Importance and damage (nats) per layer", columns, rows)],
        notes=[f"Cost: {found.forward_equivalents:.1f} forward passes; the naive way takes {found.naive_forwards:.0f}."],
    )


def skipping(found: Thresholds) -> Section:
    targets = [share(one.target) for one in found.results]
    layers = _in_layer_order({layer for one in found.results for layer in one.skip_ratio_per_layer})
    groups = [group for group in found.groups if any(group in one.skip_ratio_per_group for one in found.results)]
    by_layer = [[one.skip_ratio_per_layer.get(layer) for layer in layers] for one in found.results]
    by_group = [[one.skip_ratio_per_group.get(group) for group in groups] for one in found.results]
    columns = [
        "target",
        "policy",
        *(f"tau {group}" for group in found.groups if any(group in one.tau for one in found.results)),
        "skipped",
        "predicted",
        "KL",
    ]
    rows = [
        [
            share(one.target),
            one.policy,
            *(
                exact(one.tau[group]) if group in one.tau else ""
                for group in found.groups
                if any(group in other.tau for other in found.results)
            ),
            share(one.skip_ratio),
            share(one.predicted_skip_ratio),
            exact(one.kl),
        ]
        for one in found.results
    ]
    return Section(
        "skipping",
        "What is skipped",
        "Share of (token, expert) pairs that are skipped, in percent: one row per target, a stronger color is more.",
        charts=[
            Chart("Skip ratio per MoE layer", charts.heat("Skip ratio per target and layer", targets, layers, by_layer)),
            Chart(
                "Skip ratio per token group", charts.heat("Skip ratio per target and token group", targets, groups, by_group)
            ),
        ],
        tables=[Table("Thresholds", columns, rows, frozenset({0, 1}))],
    )


def frontier(found: Thresholds) -> Section:
    dots = []
    for one in found.results:
        for point in one.frontier:
            tau = ", ".join(f"{group} {value:.4g}" for group, value in point.tau.items())
            dots.append(
                charts.Dot(
                    point.skip_ratio, point.kl, "c-all", f"skip ratio {point.skip_ratio:.4f}, KL {point.kl:.4g} (tau {tau})"
                )
            )
        title = f"target {one.target:g}: skip ratio {one.skip_ratio:.4f}, KL {one.kl:.4g}"
        dots.append(charts.Dot(one.skip_ratio, one.kl, "c-vision", title, chosen=True, label=share(one.target)))
    return Section(
        "frontier",
        "Frontier",
        "Every measured pair of thresholds: what it skips, and how far it moves the answers (KL, logarithmic). Ringed: chosen.",
        legend=[("c-all", "measured"), ("c-vision", "chosen")],
        charts=[
            Chart(
                "Skip ratio and damage",
                charts.scatter("Skip ratio against KL of every measured point", dots, "skip ratio", "KL, nats"),
            )
        ],
        notes=[f"{found.model_passes:.1f} passes over the calibration set."],
    )


def _origin(found: Evaluation) -> str:
    return f"{found.data.source} ({found.data.split})" if found.data.split else found.data.source


def accuracy(found: Evaluation) -> Section:
    rows = [
        (
            task,
            [
                charts.Bar(one.full, "c-all", f"{100 * one.full:.0f}%", f"{task}, all experts: {one.full:.4f}"),
                charts.Bar(one.skipped, "c-vision", f"{100 * one.skipped:.0f}%", f"{task}, skipping: {one.skipped:.4f}"),
            ],
        )
        for task, one in found.per_task.items()
    ]
    table = [[task, share(one.full), share(one.skipped), str(one.samples)] for task, one in found.per_task.items()]
    table.append(["all", share(found.full), share(found.skipped), str(found.data.samples)])
    policies = [[name, share(value), share(value / found.full) if found.full else ""] for name, value in found.policies.items()]
    return Section(
        "accuracy",
        "Accuracy by task",
        f"{found.data.samples} samples of {_origin(found)}, run with {found.runtime}.",
        legend=[("c-all", "all experts"), ("c-vision", "skipping")],
        charts=[Chart("Accuracy by task", charts.bars("Accuracy by task, all experts and skipping", rows, 1.0))]
        if rows
        else [],
        tables=[
            Table("Accuracy", ["task", "all experts", "skipping", "samples"], table),
            *([Table("Policies at the same target", ["policy", "accuracy", "retained"], policies)] if policies else []),
        ],
    )


def changed(found: Evaluation) -> Section:
    rows = [[one.task, one.question, one.answer, one.full, one.skipped, one.id] for one in found.changed[:MOST_CHANGED]]
    rest = len(found.changed) - len(rows)
    lead = f"{len(found.changed)} of {found.data.samples} answers became right or wrong by skipping."
    columns = ["task", "question", "right answer", "all experts", "skipping", "sample"]
    table = [Table("Changed answers", columns, rows, frozenset(range(len(columns))))] if rows else []
    return Section(
        "changed", "Answers that changed", lead, tables=table, notes=[f"{rest} more are in {found.FILE}."] if rest else []
    )


def profile(found: Profile) -> Section:
    groups = list(found.layers[0].update_angle)
    columns = ["layer", *(f"{what} {group}" for what in ("entropy", "angle", "top-1 share") for group in groups), "seconds"]
    rows = [
        [
            str(layer.layer),
            *(
                exact(values[group]) if group in values else ""
                for values in (layer.expert_usage_entropy, layer.update_angle, layer.pi_top1)
                for group in groups
            ),
            exact(layer.seconds),
        ]
        for layer in found.layers
    ]
    return Section(
        "profile",
        "Structure and routing",
        f"{found.family}: {found.moe_layers} MoE layers of {found.experts} experts, top-{found.top_k}; "
        f"{found.parameters:,} parameters, {share(found.expert_parameters / found.parameters)} of them in experts.",
        tables=[
            Table(
                "Evenness of expert use (1: all alike), angle of the update in degrees, share of the first expert",
                columns,
                rows,
            )
        ],
    )


def timing(found: Bench) -> Section:
    machine = found.machine
    columns = ["phase", "runtime", "tokens", "batch", "skipped", "seconds", "speedup", "of the limit"]
    rows = [
        [
            one.phase,
            one.runtime,
            str(one.tokens),
            str(one.batch),
            share(one.skip_ratio),
            exact(one.seconds),
            f"{one.speedup:.2f}x",
            share(one.limit_fraction),
        ]
        for one in found.cases
    ]
    limits = f"measured limits {machine.peak_flops / 1e9:,.0f} GFLOP/s and {machine.read_bandwidth / 1e9:,.1f} GB/s"
    return Section(
        "time",
        "Time",
        f"{machine.cpu}, {machine.threads} threads, {machine.device}; {limits}.",
        tables=[Table("Prefill and decode", columns, rows, frozenset({0, 1}))],
    )
