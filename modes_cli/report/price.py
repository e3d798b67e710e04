"""Sections about what skipping costs: thresholds, the frontier with its alternatives, and experts per batch."""

from modes_cli.artifacts import Thresholds
from modes_cli.artifacts.thresholds import SearchResult
from modes_cli.report import charts, plane
from modes_cli.report.parts import (
    Block,
    Chart,
    Key,
    Section,
    Styles,
    Table,
    exact,
    group_name,
    share,
    target_name,
    with_parameters,
)


def policies(found: Thresholds) -> list[str]:
    """Every policy of the file, in the order in which it is best to read them: by their damage at the largest ratio."""
    last: dict[str, tuple[float, float]] = {}
    for entry in found.frontier:
        last[entry.policy] = max(last.get(entry.policy, (0.0, 0.0)), (entry.target, entry.kl))
    for one in found.results:
        for policy, kl in [(one.policy, one.kl), *((other.policy, other.kl) for other in one.alternatives)]:
            last.setdefault(policy, (one.target, kl))
    return sorted(last, key=lambda name: (-last[name][0], last[name][1], name))


def frontier(found: Thresholds, styles: Styles) -> Section:
    names = policies(found)
    series = []
    on_the_way = [
        plane.Dot(point.skip_ratio, point.kl, f"measured: skip ratio {point.skip_ratio:.4f}, KL {point.kl:.4g} nats")
        for one in found.results
        for point in one.frontier
    ]
    if on_the_way:
        series.append(plane.Series("c-way", "circle", on_the_way, joined=False, radius=1.5))
    for name in reversed(names):  # the best on top
        dots = [
            plane.Dot(one.skip_ratio, one.kl, _point(one.policy, one.parameters, one.skip_ratio, one.kl))
            for one in found.frontier
            if one.policy == name
        ]
        if dots:
            dots.sort(key=lambda dot: dot.x)
            series.append(plane.Series(styles.css(name), styles.shape(name), dots))
        others = [
            plane.Dot(other.skip_ratio, other.kl, _point(name, other.parameters, other.skip_ratio, other.kl))
            for one in found.results
            for other in one.alternatives
            if other.policy == name
        ]
        series.append(plane.Series(styles.css(name), styles.shape(name), others, joined=False, radius=2.0))
    rings = []
    for one in found.results:
        name = target_name(one.target, one.decode_target)
        title = f"chosen for {name}: {_point(one.policy, one.parameters, one.skip_ratio, one.kl)}"
        rings.append(plane.Ring(one.skip_ratio, one.kl, name if len(found.results) < 8 else "", title))
        dot = plane.Dot(one.skip_ratio, one.kl, title)
        series.append(plane.Series(styles.css(one.policy), styles.shape(one.policy), [dot]))
    drawing = plane.Plane("KL against skip ratio, by policy", "skip ratio", "KL, nats", series, rings)
    legend = styles.legend(names)
    legend += [Key("c-way", "measured on the way", "circle")] if on_the_way else []
    legend.append(Key("ring", "chosen", "circle"))
    lead = (
        "What each share of skipped pairs costs on the calibration set: how far the answers move (mean KL at answer tokens, "
        "logarithmic; lower is better). Policies are listed by what they cost at the largest ratio."
    )
    tables = [_chosen(found)]
    if found.frontier:
        tables.append(_prices(found, names))
    if any(one.alternatives for one in found.results):
        tables.append(_alternatives(found))
    chart = Chart("Skip ratio and damage, by policy", plane.draw(drawing), plane.draw(drawing, plane.WIDE))
    notes = [f"{found.model_passes:.1f} passes over the calibration set."]
    partly = [one.share for one in found.frontier if one.share < 1]
    if partly:
        notes.append(f"{len(partly)} points of the frontier: measured on a part of the samples, {share(min(partly))} or more.")
    return Section("frontier", "Frontier", lead, [Block(legend=legend, charts=[chart], tables=tables, notes=notes)])


def _point(policy: str, parameters: dict[str, float], skip_ratio: float, kl: float) -> str:
    return f"{with_parameters(policy, parameters)}: skip ratio {skip_ratio:.4f}, KL {kl:.4g} nats"


def _chosen(found: Thresholds) -> Table:
    groups = found.groups_with_tau()
    columns = ["target", "policy", *(f"tau, {group_name(group)}" for group in groups)]
    columns += ["skipped", "predicted", "KL", "KL, choosing half", "KL, held-out half", "passes"]
    rows = []
    for one in found.results:
        taus = [exact(one.tau[group]) if group in one.tau else "" for group in groups]
        row = [target_name(one.target, one.decode_target), with_parameters(one.policy, one.parameters), *taus]
        row += [share(one.skip_ratio), share(one.predicted_skip_ratio)]
        rows.append([*row, exact(one.kl), exact(one.kl_selection), exact(one.kl_held_out), f"{one.model_passes:.1f}"])
    return Table("Chosen thresholds", columns, rows, frozenset({0, 1}))


def _prices(found: Thresholds, names: list[str]) -> Table:
    targets = sorted({one.target for one in found.frontier})
    here = [name for name in names if any(one.policy == name for one in found.frontier)]
    cost = {(one.policy, one.target): one.kl for one in found.frontier}
    rows = [[name, *(f"{cost[name, at]:.3g}" if (name, at) in cost else "" for at in targets)] for name in here]
    best = frozenset(
        (row, column + 1)
        for column, at in enumerate(targets)
        for row, name in enumerate(here)
        if (name, at) in cost and cost[name, at] == min(cost[other, at] for other in here if (other, at) in cost)
    )
    columns = ["policy", *(f"{100 * at:.4g}%" for at in targets)]
    return Table("KL (nats) by policy and target; the least is bold", columns, rows, strong=best)


def _alternatives(found: Thresholds) -> Table:
    rows: list[list[str]] = []
    strong = set()
    for one in found.results:
        for place, other in enumerate(one.alternatives):
            if place == 0:
                strong.add((len(rows), 1))
            name = target_name(one.target, one.decode_target)
            row = [name, with_parameters(other.policy, other.parameters), share(other.skip_ratio)]
            rows.append([*row, exact(other.kl), exact(other.kl_selection), share(other.share)])
    columns = ["target", "policy", "skipped", "KL", "KL, choosing half", "samples measured"]
    return Table("What was tried for each target; chosen is bold", columns, rows, frozenset({0, 1}), frozenset(strong), True)


def experts(found: Thresholds, shown: SearchResult) -> Section:
    """Distinct experts per batch. `shown`: the result that is drawn; the table has all."""
    largest = max((one.full for one in shown.distinct_experts), default=0.0)
    name = target_name(shown.target, shown.decode_target)
    rows = [
        (
            f"batch {one.batch}",
            [
                charts.Bar(one.full, "c-all", f"{one.full:.1f}", f"batch {one.batch}, all experts: {one.full:.2f}"),
                charts.Bar(one.skipped, "c-decode", f"{one.skipped:.1f}", f"batch {one.batch}, at {name}: {one.skipped:.2f}"),
            ],
        )
        for one in shown.distinct_experts
    ]
    batches = sorted({batch.batch for one in found.results for batch in one.distinct_experts})
    full = {batch.batch: batch.full for one in found.results for batch in one.distinct_experts}
    table = [["all experts", *(f"{full[batch]:.2f}" for batch in batches)]]
    for one in found.results:
        skipped = {batch.batch: batch.skipped for batch in one.distinct_experts}
        cells = [f"{skipped[batch]:.2f}" if batch in skipped else "" for batch in batches]
        table.append([target_name(one.target, one.decode_target), *cells])
    columns = ["target", *(f"batch {batch}" for batch in batches)]
    lead = (
        "How many different experts a layer reads, on average, to decode a batch of tokens together. Decoding takes as long as "
        "reading their weights, so this is what it saves; more tokens share experts, and save less."
    )
    block = Block(
        legend=[Key("c-all", "all experts"), Key("c-decode", f"skipping, target {name}")],
        charts=[Chart("Distinct experts per layer and batch", charts.bars("Distinct experts per batch", rows, largest))],
        tables=[Table("Distinct experts per layer, mean", columns, table)],
    )
    return Section("experts", "Experts per batch", lead, [block])
