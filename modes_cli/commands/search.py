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
        str, typer.Option(help="Rule that decides what to skip; auto takes the one with the least damage.")
    ] = "auto",
    strategy: Annotated[
        options.Strategy, typer.Option(help="How to look; the last two are the paper's, for comparison.")
    ] = options.Strategy.frontier,
    passes: Annotated[int, typer.Option(min=1, help="Most passes over the calibration set per target.")] = 12,
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
        from modes_cli.requests import SearchRequest
        from modes_cli.search import find_thresholds

        outcome = find_thresholds(
            SearchRequest(
                targets,
                run,
                policy,
                strategy.value,
                passes,
                grid,
                device.value,
                trust_remote_code,
                fresh,
                out.progress,
                device_map and device_map.value,
                offload,
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
    keys = {"target", "policy", "tau", "skip_ratio", "kl", "predicted_skip_ratio"}
    return {
        "results": [one.model_dump(include=keys) for one in found.results],
        "model_passes": found.model_passes,
        "grid": found.grid,
    }


def tables(found: "Thresholds") -> list[Any]:
    """What people get of a search."""
    groups = [group for group in found.groups if any(group in one.tau for one in found.results)]
    columns = ["target", "policy", *(f"tau {group}" for group in groups), "skipped", "predicted", "KL"]
    rows = [
        [
            one.target,
            one.policy,
            *(one.tau.get(group, "") for group in groups),
            one.skip_ratio,
            one.predicted_skip_ratio,
            one.kl,
        ]
        for one in found.results
    ]
    return [console.table("Thresholds", columns, rows), f"{found.model_passes:.1f} passes over the calibration set"]
