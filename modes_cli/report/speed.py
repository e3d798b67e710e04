"""Sections about time and structure: the bench's cases against the machine's limit, and the profile."""

from modes_cli.artifacts import Bench, Profile
from modes_cli.artifacts.bench import Case
from modes_cli.report import charts
from modes_cli.report.parts import Block, Chart, Key, Section, Table, exact, group_css, group_name, pieces, share


def timing(found: Bench) -> Section:
    machine = found.machine
    phases = [phase for phase in ("prefill", "decode") if any(case.phase == phase for case in found.cases)]
    fastest = max((case.speedup for case in found.cases), default=0.0)
    most = max((case.limit_fraction for case in found.cases), default=0.0)
    limits, speedups = [], []
    for phase in phases:
        cases = [case for case in found.cases if case.phase == phase]
        for name, part in pieces(f"{phase.capitalize()}: share of the machine's limit", cases):
            rows = [(_name(case), _bar(case, case.limit_fraction, share(case.limit_fraction))) for case in part]
            limits.append(Chart(name, charts.meters(name, rows, max(1.0, most), 1.0)))
        for name, part in pieces(f"{phase.capitalize()}: speedup over transformers as it comes (dashed: 1x)", cases):
            rows = [(_name(case), _bar(case, case.speedup, f"{case.speedup:.2f}x")) for case in part]
            speedups.append(Chart(name, charts.meters(name, rows, fastest, 1.0)))
    columns = ["phase", "runtime", "tokens", "batch", "skipped", "seconds", "speedup", "of the limit"]
    table = [
        [
            case.phase,
            case.runtime,
            str(case.tokens),
            str(case.batch),
            share(case.skip_ratio),
            exact(case.seconds),
            f"{case.speedup:.2f}x",
            share(case.limit_fraction),
        ]
        for case in found.cases
    ]
    lead = (
        f"{machine.cpu}, {machine.threads} threads, {machine.device}. The limit is the time that the same work would take at "
        f"this machine's measured rates, {machine.peak_flops / 1e9:,.0f} GFLOP/s and {machine.read_bandwidth / 1e9:,.1f} GB/s: "
        "at 100%, nothing could be faster."
    )
    legend = [Key("c-all", "nothing skipped"), Key("c-vision", "skipping")]
    tables = [Table("Prefill and decode", columns, table, frozenset({0, 1}), folded=True)]
    block = Block(legend=legend, charts=[*limits, *speedups], tables=tables, notes=found.notes)
    return Section("time", "Speed against the limit", lead, [block])


def _name(case: Case) -> str:
    length = f"{case.tokens} tokens, " if case.phase == "prefill" else ""
    skipped = f"{100 * case.skip_ratio:.0f}% skipped" if case.skip_ratio else "all experts"
    return f"{case.runtime}, {length}batch {case.batch}, {skipped}"


def _bar(case: Case, value: float, text: str) -> charts.Bar:
    speed = f"{case.seconds:.4g} s, {case.speedup:.2f}x, {share(case.limit_fraction)} of the limit"
    title = f"{case.phase}, {_name(case)}: {speed}"
    return charts.Bar(value, "c-vision" if case.skip_ratio else "c-all", text, title)


def profile(found: Profile) -> Section:
    groups = list(found.layers[0].update_angle)
    usage = [
        Chart(
            f"Evenness of expert use, {group_name(group)}",
            charts.columns(
                f"Evenness of expert use per MoE layer, {group_name(group)}",
                [
                    (str(layer.layer), value, f"layer {layer.layer}: {value:.4f}")
                    for layer in found.layers
                    if (value := layer.expert_usage_entropy.get(group)) is not None
                ],
                group_css(group),
                largest=1.0,
            ),
        )
        for group in groups
    ]
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
    measures = ("entropy", "angle", "top-1 share")
    columns = ["layer", *(f"{what}, {group_name(group)}" for what in measures for group in groups), "seconds"]
    lead = (
        f"{found.family}: {found.moe_layers} MoE layers of {found.experts} experts, top-{found.top_k}; "
        f"{found.parameters:,} parameters, {share(found.expert_parameters / found.parameters)} of them in experts."
    )
    caption = "Evenness of expert use (1: all alike), angle of the update in degrees, share of the first expert"
    table = Table(caption, columns, rows, folded=True)
    return Section("profile", "Structure and routing", lead, [Block(charts=usage, tables=[table])])
