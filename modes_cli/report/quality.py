"""Sections about answers: accuracy by task, retained accuracy by policy, and the answers that changed."""

from modes_cli.artifacts import Evaluation
from modes_cli.artifacts.evaluation import ChangedAnswer, Interval, PolicyAccuracy
from modes_cli.report import charts, plane
from modes_cli.report.parts import (
    Block,
    Card,
    Chart,
    Key,
    Section,
    Styles,
    Table,
    exact,
    group_name,
    pieces,
    share,
    target_name,
    with_parameters,
)
from modes_cli.report.svg import floor_of

MOST_CHANGED = 48  # changed answers shown; the rest is in evaluation.json
MOST_TEXT = 400  # characters of a question or an answer

Target = tuple[float, float | None]


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
    table = [
        [task, share(one.full), share(one.skipped), points(one.skipped - one.full), str(one.samples)]
        for task, one in found.per_task.items()
    ]
    whole = [share(found.full), share(found.skipped), points(found.skipped - found.full), str(found.data.samples)]
    table.append(["all", *whole])
    strong = frozenset((len(table) - 1, column) for column in range(5))
    named = [[name, share(value), share(value / found.full) if found.full else ""] for name, value in found.policies.items()]
    origin = f"{found.data.source} ({found.data.split})" if found.data.split else found.data.source
    target = target_name(found.target, found.decode_target)
    tables = [Table("Accuracy", ["task", "all experts", "skipping", "change", "samples"], table, strong=strong)]
    if named and not found.comparison:
        tables.append(Table("Policies at the same target", ["policy", "accuracy", "retained"], named))
    lead = (
        f"{found.data.samples} samples of {origin}, target {target}, run with {found.runtime}: "
        f"{share(found.retained)} of the accuracy retained{_interval(found.interval, ' (95% interval {})')}."
    )
    name = "Accuracy by task, all experts and skipping"
    pictures = [Chart(caption, charts.bars(caption, part, 1.0)) for caption, part in pieces(name, rows)]
    legend = [Key("c-all", "all experts"), Key("c-vision", "skipping")] if rows else []
    block = Block(legend=legend, charts=pictures, tables=tables)
    return Section("accuracy", "Accuracy by task", lead, [block])


def policies(found: Evaluation, styles: Styles) -> Section:
    """Retained accuracy by policy and ratio."""
    by_target: dict[Target, list[PolicyAccuracy]] = {}
    for one in found.comparison:
        by_target.setdefault((one.target, one.decode_target), []).append(one)
    names = sorted({one.policy for one in found.comparison}, key=lambda name: _rank(found.comparison, name))
    blocks = []
    if sum(decode is None for _, decode in by_target) > 1:
        blocks.append(_overview(found.comparison, names, styles))
    pictures = []
    for target, ones in by_target.items():
        spans = [_span(one, styles) for one in ones]
        label = f"Retained accuracy by policy at {target_name(*target)}"
        pictures.append(Chart(f"Target {target_name(*target)}", charts.intervals(label, spans, 1.0, "accuracy retained")))
    text = "Ringed: what the search chose. Lines are 95% intervals (paired bootstrap)."
    tables = [_grid(by_target, names), _details(found.comparison)]
    if found.left_out:
        rows = [[one.policy, target_name(one.target, one.decode_target), one.reason] for one in found.left_out]
        tables.append(Table("Left out", ["policy", "target", "why"], rows, frozenset({0, 1, 2})))
    blocks.append(Block("Target by target" if blocks else "", text, charts=pictures, tables=tables))
    lead = (
        f"How much of the unskipped accuracy each policy retains on {found.data.samples} samples that the search did not see, "
        "at the same share of skipped pairs."
    )
    return Section("policies", "Policies compared", lead, blocks)


def _overview(comparison: list[PolicyAccuracy], names: list[str], styles: Styles) -> Block:
    series = []
    for name in reversed(names):  # the best on top
        ones = [one for one in comparison if one.policy == name and one.decode_target is None]
        dots = [
            plane.Dot(one.skip_ratio.get("all", one.target), one.retained, _title(one))
            for one in sorted(ones, key=lambda one: one.target)
        ]
        series.append(plane.Series(styles.css(name), styles.shape(name), dots))
    label, x_name = "Retained accuracy against skip ratio, by policy", "skip ratio"
    floor = floor_of([min(dot.y for dot in one.dots) for one in series if one.dots], 1.0)
    drawing = plane.Plane(label, x_name, "retained", series, log=False, reference=1.0, floor=floor)
    chart = Chart("Retained accuracy and skip ratio, by policy", plane.draw(drawing), plane.draw(drawing, plane.WIDE))
    below = [name for name, one in zip(reversed(names), series, strict=True) if floor and any(d.y < floor for d in one.dots)]
    notes = [f"Below the chart at some ratios: {', '.join(below)}."] if below else []
    return Block(legend=styles.legend(names), charts=[chart], notes=notes)


def _span(one: PolicyAccuracy, styles: Styles) -> charts.Span:
    css, shape = styles.css(one.policy), styles.shape(one.policy)
    return charts.Span(one.policy, one.retained, *_bounds(one), css, shape, _title(one), one.chosen)


def _bounds(one: PolicyAccuracy) -> tuple[float, float]:
    """The interval; where none is known, one without width."""
    return (one.retained, one.retained) if one.interval is None else (one.interval.low, one.interval.high)


def _rank(comparison: list[PolicyAccuracy], name: str) -> tuple[float, float, str]:
    last = max((one for one in comparison if one.policy == name), key=lambda one: (one.target, -(one.decode_target or 0.0)))
    return -last.target, -last.retained, name


def _title(one: PolicyAccuracy) -> str:
    name, at = with_parameters(one.policy, one.parameters), target_name(one.target, one.decode_target)
    skipped = share(one.skip_ratio.get("all", one.target))
    return f"{name} at {at}: {share(one.retained)} retained{_interval(one.interval)}, {skipped} skipped"


def _grid(by_target: dict[Target, list[PolicyAccuracy]], names: list[str]) -> Table:
    """As in the paper: policies below each other, targets side by side."""
    rows = []
    strong = set()
    for row, name in enumerate(names):
        cells = []
        for column, ones in enumerate(by_target.values()):
            one = next((one for one in ones if one.policy == name), None)
            cells.append("" if one is None else f"{100 * one.retained:.1f}{_interval(one.interval)}")
            if one is not None and one.ties_best:
                strong.add((row, column + 1))
        rows.append([name, *cells])
    caption = "Accuracy retained, in percent [95% interval], by policy and target; bold: the most, or a tie with it"
    columns = ["policy", *(target_name(*target) for target in by_target)]
    return Table(caption, columns, rows, strong=frozenset(strong))


def _details(comparison: list[PolicyAccuracy]) -> Table:
    groups = [group for group in ("all", "vision", "text", "decode") if any(group in one.skip_ratio for one in comparison)]
    columns = ["target", "policy", "accuracy", "against chosen", "", *(f"skipped, {group_name(g)}" for g in groups), "KL"]
    rows = []
    for one in comparison:
        row = [target_name(one.target, one.decode_target), with_parameters(one.policy, one.parameters), share(one.accuracy)]
        ahead = f"{points(one.ahead)} [{100 * one.ahead_low:+.1f}, {100 * one.ahead_high:+.1f}]"
        skipped = [share(one.skip_ratio[group]) if group in one.skip_ratio else "" for group in groups]
        rows.append([*row, "" if one.chosen else ahead, _verdict(one), *skipped, exact(one.kl)])
    caption = "Every policy at every target, against what the search chose (percentage points, 95% interval of the difference)"
    return Table(caption, columns, rows, frozenset({0, 1, 4}), folded=True)


def _verdict(one: PolicyAccuracy) -> str:
    if one.chosen:
        return "chosen"
    if one.ahead_low <= 0 <= one.ahead_high:
        return "tie"
    return "ahead" if one.ahead > 0 else "behind"


def changed(found: Evaluation) -> Section:
    shown = found.changed[:MOST_CHANGED]
    rest = len(found.changed) - len(shown)
    lead = f"0 of {found.data.samples} answers became right or wrong by skipping."
    if shown:
        lead = f"Questions that became right or wrong by skipping, of {found.data.samples} samples: the first ones."
    notes = [f"{rest} more are in {found.FILE}."] if rest else []
    return Section("changed", "Answers that changed", lead, [Block(cards=[_card(one) for one in shown], notes=notes)])


def _card(one: ChangedAnswer) -> Card:
    right, full, skipped = (_plain(words) for words in (one.answer, one.full, one.skipped))
    # Only where equality tells: what counts as right is each data set's own rule, and the file does not say.
    verdict = "" if (full == right) == (skipped == right) else "lost" if full == right else "gained"
    said = [("right answer", one.answer), ("all experts", one.full), ("skipping", one.skipped)]
    lines = [(name, _cut(words) or "(nothing)") for name, words in said]
    return Card(one.id, one.task, _cut(one.question), lines, one.image, verdict)


def _plain(words: str) -> str:
    return " ".join(words.casefold().split()).rstrip(".")


def _cut(words: str) -> str:
    return words if len(words) <= MOST_TEXT else words[: MOST_TEXT - 1] + "…"


def _interval(found: Interval | None, form: str = " {}") -> str:
    return "" if found is None else form.format(f"[{100 * found.low:.1f}, {100 * found.high:.1f}]")


def points(difference: float) -> str:
    """A difference of two shares, in percentage points; 0 has no sign."""
    text = f"{100 * difference:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text
