"""`modes search`: thresholds for one or more target skip ratios."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modes_cli import console, options

if TYPE_CHECKING:
    from modes_cli.artifacts import Thresholds


DEFAULT_TARGET = 0.75


def search(
    target: Annotated[
        list[float] | None,
        typer.Option(help="Share of (token, expert) pairs to skip, 0 to 1. Repeatable.  (default: 0.75)", show_default=False),
    ] = None,
    policy: Annotated[
        str, typer.Option(help="Rule that decides what to skip, as `tempered` or `tempered:power=0.5`; auto: the least damage.")
    ] = "auto",
    strategy: Annotated[
        options.Strategy, typer.Option(help="How to look; the last two are the paper's, for comparison.")
    ] = options.Strategy.frontier,
    decode_target: Annotated[
        float | None,
        typer.Option(help="Share to skip of the tokens that predict the answer, as well: decode gets a tau of its own."),
    ] = None,
    passes: Annotated[
        int | None,
        typer.Option(min=1, help="Most passes over the calibration set per target.  (default: 40)", show_default=False),
    ] = None,
    frontier: Annotated[bool, typer.Option("--frontier/--no-frontier", help="Price other ratios too, 0.1 to 0.95.")] = True,
    grid: Annotated[int, typer.Option(min=2, help="Thresholds per axis of two-pointer and exhaustive.")] = 100,
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
    """Find the thresholds that skip a target share of experts at the least damage."""
    with console.session(json=json, quiet=quiet, debug=debug) as out:
        targets = tuple(sorted(set(target or (DEFAULT_TARGET,))))
        for share in targets:
            options.require_share("--target", share, hint=_reachable(run) if not 0 <= share <= 1 else None)
        if decode_target is not None:
            options.require_share("--decode-target", decode_target)
        from modes_cli.requests import PASSES, SearchRequest
        from modes_cli.search import find_thresholds

        outcome = find_thresholds(
            SearchRequest(
                targets,
                run,
                policy,
                strategy.value,
                PASSES if passes is None else passes,
                grid,
                device.value,
                trust_remote_code,
                fresh,
                out.progress,
                device_map and device_map.value,
                offload,
                decode_target,
                frontier,
            )
        )
        out.show(result(outcome.artifact), *tables(outcome.artifact), f"written: {outcome.path}", artifact=outcome.path)


def _reachable(run: Path | None) -> str | None:
    """The largest ratio this run can reach, where that is known: special tokens are never skipped, but counted."""
    from modes_cli.artifacts import Calibration
    from modes_cli.errors import ModesError
    from modes_cli.run_folder import RunFolder

    try:
        tokens = RunFolder(run).read(Calibration).tokens
    except ModesError:
        return None
    largest = 1 - tokens.get("special", 0) / max(1, sum(tokens.values()))
    return f"give a fraction; this run reaches at most `{largest:.4f}`: special tokens are never skipped, but counted"


def result(found: "Thresholds") -> dict[str, Any]:
    """What scripts get of a search."""
    keys = {
        "target", "decode_target", "policy", "parameters", "tau", "skip_ratio", "skip_ratio_per_group", "kl", "kl_held_out",
        "predicted_skip_ratio", "distinct_experts",
    }  # fmt: skip
    return {
        "results": [one.model_dump(include=keys) for one in found.results],
        "frontier": [one.model_dump() for one in found.frontier],
        "model_passes": found.model_passes,
        "grid": found.grid,
    }


def tables(found: "Thresholds") -> list[Any]:
    """What people get of a search."""
    taus, groups = found.groups_with_tau(), found.groups_counted()
    columns = ["target", "policy", *(f"tau {group}" for group in taus), "skipped", *groups, "KL", "held out"]
    rows = [
        [
            one.target,
            _named(one.policy, one.parameters),
            *(one.tau.get(group, "") for group in taus),
            one.skip_ratio,
            *(one.skip_ratio_per_group.get(group, "") for group in groups),
            one.kl,
            one.kl_held_out,
        ]
        for one in found.results
    ]
    shown = [console.table("Thresholds", columns, rows)]
    if found.frontier:
        from modes_cli.report.terminal import frontier_plot

        shown += [_prices(found), frontier_plot(_lines(found))]
    return [*shown, f"{found.model_passes:.1f} passes over the calibration set"]


def _named(policy: str, parameters: dict[str, float]) -> str:
    """`tempered 0.25`, `modes`: the power, and the names of switches that are on."""
    said = [f"{value:g}" if name == "power" else name for name, value in parameters.items() if value]
    return " ".join([policy, *said])


def _lines(found: "Thresholds") -> list[tuple[str, list[tuple[float, float]]]]:
    """Skip ratio and KL of every policy in the price list."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for one in found.frontier:
        lines.setdefault(_named(one.policy, one.parameters), []).append((one.skip_ratio, one.kl))
    return list(lines.items())


def _prices(found: "Thresholds") -> Any:
    """KL by policy and ratio."""
    by_ratio: dict[float, dict[str, float]] = {}
    for one in found.frontier:
        by_ratio.setdefault(one.target, {})[_named(one.policy, one.parameters)] = one.kl
    names = [name for name, _ in _lines(found)]
    rows = [[ratio, *(prices.get(name, "") for name in names)] for ratio, prices in sorted(by_ratio.items())]
    return console.table("Frontier: KL by share skipped", ["target", *names], rows)
