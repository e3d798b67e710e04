"""From a calibration to thresholds.json."""

import math

from modes_cli import files
from modes_cli.artifacts import Calibration, Thresholds
from modes_cli.artifacts.base import flatten
from modes_cli.artifacts.thresholds import FrontierPoint, SearchResult
from modes_cli.distributed import Ranks, joined
from modes_cli.errors import BadOption, UnreachableTarget
from modes_cli.models.groups import SKIPPABLE, TEXT
from modes_cli.models.loading import versions
from modes_cli.requests import Outcome, SearchRequest
from modes_cli.run_folder import RunFolder
from modes_cli.search.auto import Candidate, candidates, choose
from modes_cli.search.calibrated import Calibrated, model_spec, recalled, require_current
from modes_cli.search.objective import Point
from modes_cli.search.strategies import STRATEGIES, TOLERANCE


def find_thresholds(request: SearchRequest) -> Outcome[Thresholds]:
    """Thresholds for each target, confirmed by measured passes, written to thresholds.json.

    Targets that an earlier search with the same options found are kept. Several processes measure each a share of the
    calibration set and decide the same; the first one writes.

    Raises:
        BadOption: a target outside 0..1, an unknown policy or strategy.
        UnreachableTarget: special tokens are never skipped, so not every target can be met.
        MissingArtifact, StaleArtifact, BadArtifact: the calibration is not there, or not of this model.
    """
    with joined() as ranks:
        return _find(request, ranks)


def _find(request: SearchRequest, ranks: Ranks) -> Outcome[Thresholds]:
    targets = _checked(request)
    ranks.require_one_device_each(request.device_map)
    run = RunFolder(request.run)
    calibration = run.read(Calibration)
    digest = files.sha256(run.file(Calibration.FILE))
    options: dict[str, str | int | float | bool | None] = {
        "policy": request.policy,
        "strategy": request.strategy,
        "passes": request.passes,
        "grid": request.grid,
    }
    earlier: Thresholds | None = None
    if not request.fresh and run.exists(Thresholds):
        earlier = run.read(Thresholds)
        expected = flatten(calibration.model, calibration.data, versions(), options) | {"calibration": digest}
        found = earlier.identity() | {"calibration": earlier.calibration}
        run.require_same(Thresholds, found, expected, renew=f"modes search{run.option} --fresh")
    known = None if earlier is None else earlier.model_dump_json()
    # Nobody writes before all have read: this is where they meet.
    ranks.agree("calibration, search or library version", [digest, known, targets, options, versions().model_dump()])
    spec = model_spec(calibration, request.device, request.trust_remote_code, request.device_map, request.offload)
    results = {result.target: result for result in earlier.results} if earlier else {}
    missing = [target for target in targets if target not in results]
    if earlier is not None and not missing:
        require_current(run, calibration, spec)
        return Outcome(earlier, run.file(Thresholds.FILE), reused=True)
    with recalled(run, calibration, spec, ranks) as calibrated:
        chosen = candidates(request.policy, request.strategy, calibration, calibrated.counts)
        for target in missing:
            largest = max(candidate.staircase.largest for candidate in chosen)
            if target > largest:
                raise UnreachableTarget(target, largest, request.policy)
        request.progress.start("search", len(missing))
        for target in missing:
            results[target] = _search(request, calibration, calibrated, chosen, target)
            # Written after each target, so that a search that is stopped keeps what it has found.
            artifact = Thresholds(
                model=calibration.model,
                data=calibration.data,
                options=options,
                versions=versions(),
                calibration=digest,
                groups=_groups(calibration),
                results=[results[known] for known in sorted(results)],
                model_passes=sum(result.model_passes for result in results.values()),
                grid=request.grid,
            )
            if ranks.first:
                run.write(artifact)
            request.progress.advance()
    return Outcome(artifact, run.file(Thresholds.FILE))


def _checked(request: SearchRequest) -> list[float]:
    for target in request.targets:
        if not (math.isfinite(target) and 0 <= target <= 1):
            raise BadOption(f"target `{target}` is no skip ratio", hint="a share of all top-k pairs, from 0 to 1")
    if request.strategy not in STRATEGIES:
        raise BadOption(f"no strategy `{request.strategy}`", hint=f"strategies are {', '.join(STRATEGIES)}")
    if request.grid < 2 or request.passes < 4:
        raise BadOption(
            f"grid `{request.grid}`, passes `{request.passes}`", hint="a grid has 2 values or more, a search 4 passes or more"
        )
    return sorted(set(request.targets))


def _search(
    request: SearchRequest, calibration: Calibration, calibrated: Calibrated, options: list[Candidate], target: float
) -> SearchResult:
    objective = calibrated.objective
    before = objective.passes
    objective.forget()  # so that a target's result and cost do not depend on which others were asked for
    candidate, best, measured = choose(options, objective, target, STRATEGIES[request.strategy], request.grid, request.passes)
    if best is None:
        raise UnreachableTarget(target, max((point.skip_ratio for point in measured), default=0.0), request.policy)
    if best.skip_ratio > target + TOLERANCE and request.strategy == "frontier":
        raise BadOption(
            f"`{request.passes}` passes came no closer to target `{target:g}` than a skip ratio of `{best.skip_ratio:.4f}`",
            hint="allow more `--passes`, or calibrate on more samples",
        )
    text, vision = best.tau
    return SearchResult(
        target=target,
        policy=candidate.policy.name,
        parameters=candidate.policy.parameters,
        tau=_tau(best, calibration),
        skip_ratio=best.skip_ratio,
        skip_ratio_per_group=best.per_group,
        skip_ratio_per_layer=dict(zip(calibration.importance, best.per_layer, strict=True)),
        kl=best.kl,
        predicted_skip_ratio=candidate.staircase.ratio(text, vision),
        model_passes=objective.passes - before,
        frontier=_frontier(measured, calibration),
    )


def _groups(calibration: Calibration) -> list[str]:
    """Those that have a threshold: with `--text-only` there is one modality."""
    return [SKIPPABLE[TEXT]] if calibration.options.get("text_only") else list(SKIPPABLE)


def _tau(point: Point, calibration: Calibration) -> dict[str, float]:
    return {group: tau for group, tau in zip(SKIPPABLE, point.tau, strict=True) if group in _groups(calibration)}


def _frontier(measured: list[Point], calibration: Calibration) -> list[FrontierPoint]:
    """Measured points that no other one beats in both ratio and damage, by rising ratio."""
    kept: list[Point] = []
    for point in sorted(measured, key=lambda p: (-p.skip_ratio, p.kl)):
        if not kept or point.kl < kept[-1].kl:
            kept.append(point)
    return [FrontierPoint(tau=_tau(p, calibration), skip_ratio=p.skip_ratio, kl=p.kl) for p in reversed(kept)]
