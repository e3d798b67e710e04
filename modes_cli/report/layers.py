"""Sections about layers and token groups: importance, what is skipped where, and the scores behind it."""

import math
from collections.abc import Iterable

import numpy as np

from modes_cli.artifacts import Calibration, Thresholds
from modes_cli.artifacts.thresholds import SearchResult
from modes_cli.report import charts, densities
from modes_cli.report.parts import (
    Block,
    Chart,
    Section,
    Table,
    exact,
    group_css,
    group_name,
    in_layer_order,
    share,
    target_name,
    with_parameters,
)
from modes_cli.report.scores import Scores

_COLUMNS = ("all", "vision", "prompt", "decode")  # drawn; `text` is prompt and decode together, and in the table
_MOST_TARGETS = 8  # heat maps of layers; the table has the rest


def importance(found: Calibration) -> Section:
    layers = in_layer_order(found.importance)
    shown = [column for column in _COLUMNS if any(getattr(found.importance[layer], column) for layer in layers)]
    largest = max(getattr(found.importance[layer], column) for column in shown for layer in layers)
    pictures = []
    for column in shown:
        values = []
        for layer in layers:
            value, damage = getattr(found.importance[layer], column), getattr(found.importance[layer], f"kl_{column}")
            values.append((layer, value, f"layer {layer}, {group_name(column)}: {value:.4f}, {damage:.4g} nats"))
        total = sum(getattr(found.importance[layer], f"kl_{column}") for layer in layers)
        name = group_name(column)
        picture = charts.columns(f"Importance per MoE layer, {name}", values, group_css(column), largest=largest)
        caption = _capital(name) if column == "all" else f"Only {name}"
        pictures.append(Chart(f"{caption}: {total:.3g} nats over all layers", picture))
    every = ("all", "vision", "text", "prompt", "decode")
    names = {"text": "text (prompt and decode)"} | {column: group_name(column) for column in every if column != "text"}
    rows = [
        [layer, *(exact(getattr(found.importance[layer], f"{kind}{column}")) for kind in ("", "kl_") for column in every)]
        for layer in layers
    ]
    columns = ["layer", *(f"share, {names[column]}" for column in every), *(f"KL, {names[column]}" for column in every)]
    lead = (
        "How much the answer changes (KL at answer tokens) when a layer's routed experts are off for all tokens, or only for "
        f"those of one group. Each chart is a layer's share of its sum over layers, all on one scale; {found.samples} samples, "
        f"{found.answer_tokens} answer tokens."
    )
    table = Table("Importance (shares) and damage (nats) per layer", columns, rows, folded=True)
    cost = f"Cost: {found.forward_equivalents:.1f} forward passes; the naive way takes {found.naive_forwards:.0f}."
    return Section("importance", "Layer importance", lead, [Block(charts=pictures, tables=[table], notes=[cost])])


def skipping(found: Thresholds) -> Section:
    targets = [target_name(one.target, one.decode_target) for one in found.results]
    groups = found.groups_counted()
    by_group = [[one.skip_ratio, *(one.skip_ratio_per_group.get(group) for group in groups)] for one in found.results]
    names = ["all", *groups]
    overview = charts.heat("Skip ratio per target and token group", targets, names, by_group)
    pictures = []
    rows = []
    for one, target in zip(found.results, targets, strict=True):
        layers = in_layer_order(one.skip_ratio_per_layer)
        here = [name for name in names if any(name in one.skip_ratio_per_layer[layer] for layer in layers)]
        values = [[one.skip_ratio_per_layer[layer].get(name) for layer in layers] for name in here]
        rows += [[target, layer, *_shares(one.skip_ratio_per_layer[layer].get(name) for name in names)] for layer in layers]
        picture = charts.heat(f"Skip ratio per layer and token group at {target}", here, layers, values)
        pictures.append(Chart(f"{target} per MoE layer: {with_parameters(one.policy, one.parameters)}", picture))
    rest = len(pictures) - _MOST_TARGETS
    lead = "Share of (token, expert) pairs that are skipped, in percent. A stronger color is more."
    blocks = [
        Block(
            ramp=True,
            charts=[Chart("Skip ratio per target and token group", overview), *pictures[:_MOST_TARGETS]],
            tables=[
                Table(
                    "Skip ratio per target and token group",
                    ["target", *(group_name(name) for name in names)],
                    [[target, *_shares(row)] for target, row in zip(targets, by_group, strict=True)],
                ),
                Table(
                    "Skip ratio per layer and token group",
                    ["target", "layer", *(group_name(name) for name in names)],
                    rows,
                    frozenset({0}),
                    folded=True,
                ),
            ],
            notes=[f"{rest} more targets are in the table."] if rest > 0 else [],
        )
    ]
    return Section("skipping", "What is skipped", lead, blocks)


def _shares(values: Iterable[float | None]) -> list[str]:
    return ["" if value is None else share(value) for value in values]


def distributions(calibration: Calibration, found: Scores, other: bool) -> Section:
    """`other`: there are thresholds, but of another calibration."""
    result = found.result
    what, notes = _explained(found, other)
    blocks = [_together(found, what), _layer_by_layer(found, in_layer_order(calibration.importance), notes)]
    lead = f"How routing spreads a token over its top-{calibration.top_k} experts: pi is an expert's share of the weights."
    if result is not None:
        at, policy = target_name(result.target, result.decode_target), with_parameters(result.policy, result.parameters)
        lead += f" Drawn for target {at}, policy {policy}."
    return Section("scores", "Score distributions", lead, [block for block in blocks if block.charts])


def _together(found: Scores, what: str) -> Block:
    """All layers in one histogram per group."""
    pictures = []
    for group in found.shown():
        histogram = found.of_score(group)
        if histogram is None:
            continue
        name = group_name(found.groups[group])
        skips = None if found.result is None else found.result.skip_ratio_per_group.get(found.groups[group])
        caption = _capital(name) + ("" if skips is None else f": {share(skips)} skipped")
        if found.cuts is not None:
            caption += f", threshold {float(found.cuts.tau[group]):.3g}"
        if histogram.zeros:
            caption += f"; {share(histogram.zeros)} have score 0, left of the chart"
        css = group_css(found.groups[group])
        pictures.append(Chart(caption, densities.histogram(f"Distribution of {what}, {name}", histogram, css, what)))
    text = f"Share of (token, expert) pairs by {what}, logarithmic."
    if found.cuts is not None:
        text += " What lies left of the line, pale, is skipped."
    return Block("All layers together", text, charts=pictures)


def _layer_by_layer(found: Scores, layers: list[str], notes: list[str]) -> Block:
    edges, cells = found.cells()
    pictures = []
    for group in found.shown():
        name = group_name(found.groups[group])
        lines = [] if found.cuts is None else [_log(cut) for cut in found.cuts.on_pi(group)]
        skipped = [_skipped(found.result, layer, found.groups[group]) for layer in layers]
        beside = ["" if value is None else f"{100 * value:.0f}%" for value in skipped]
        drawing = densities.Layers(layers, edges, cells[:, group], lines, beside)
        css = group_css(found.groups[group])
        pictures.append(
            Chart(_capital(name), densities.layers(f"pi per layer, {name}", drawing, css, "routing probability pi"))
        )
    text = "One row per MoE layer: a stronger color is more pairs."
    if found.cuts is not None:
        text += " The line is the pi from which the layer keeps a pair: the threshold over the layer's scale."
        text += " Two lines: the lowest and the highest of its experts." if found.cuts.scale.ndim == 3 else ""
    return Block("Layer by layer", text, charts=pictures, tables=[_table(found, layers)], notes=notes)


def _explained(found: Scores, other: bool) -> tuple[str, list[str]]:
    """What is drawn over all layers, and what to say about it."""
    if found.cuts is not None:
        return "score = scale * pi", []
    if other:
        return "pi", ["No thresholds are drawn: those of this folder were made from another calibration."]
    if found.result is None:
        return "pi", ["No thresholds are drawn: none have been searched yet."]
    return "pi", [f"No thresholds are drawn: {found.result.policy} decides by more than pi, so no value of pi separates."]


def _table(found: Scores, layers: list[str]) -> Table:
    columns = ["layer"]
    values: list[list[str]] = []
    for group in found.shown():
        name = group_name(found.groups[group])
        columns.append(f"median pi, {name}")
        values.append(["" if math.isnan(value) else exact(value) for value in found.median(group).tolist()])
        for cut, which in zip(found.cuts.on_pi(group) if found.cuts else [], ("", " (highest)"), strict=False):
            columns.append(f"keeps from{which}, {name}")
            values.append([_from(value) for value in cut.tolist()])
        if found.result is not None:
            columns.append(f"skipped, {name}")
            values.append(_shares(_skipped(found.result, layer, found.groups[group]) for layer in layers))
    rows = [[layer, *(column[row] for column in values)] for row, layer in enumerate(layers)]
    return Table("Routing probability pi per layer", columns, rows, folded=True)


def _from(cut: float) -> str:
    return "all" if cut <= 0 else "none" if cut > 1 else exact(cut)


def _skipped(result: SearchResult | None, layer: str, group: str) -> float | None:
    return None if result is None else result.skip_ratio_per_layer.get(layer, {}).get(group)


def _log(values: densities.Floats) -> densities.Floats:
    return np.log10(np.clip(values, 1e-30, 1e30))


def _capital(name: str) -> str:
    return name[0].upper() + name[1:]
