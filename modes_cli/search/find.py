"""From a calibration to thresholds.json."""

import contextlib
import math

from modes_cli import files
from modes_cli.artifacts import Calibration, Thresholds
from modes_cli.artifacts.base import flatten
from modes_cli.artifacts.thresholds import Alternative, DistinctExperts, FrontierEntry, FrontierPoint, SearchResult
from modes_cli.distributed import Ranks, joined
from modes_cli.errors import BadOption, UnreachableTarget
from modes_cli.fingerprint import fingerprint
from modes_cli.locks import one_writer
from modes_cli.models.groups import DECODE
from modes_cli.models.loading import Loaded, versions
from modes_cli.requests import Outcome, SearchRequest
from modes_cli.run_folder import RunFolder
from modes_cli.search.auto import Choice, choose
from modes_cli.search.calibrated import Calibrated, model_spec, recalled, require_current
from modes_cli.search.candidates import PAPER, ScoreCounts, candidate, candidates
from modes_cli.search.distinct import DecodeRouting
from modes_cli.search.memory import Memory
from modes_cli.search.objective import Point
from modes_cli.search.pricing import price_list
from modes_cli.search.problem import Candidate, Target
from modes_cli.search.strategies import STRATEGIES
from modes_cli.skipping.measured import Measured
from modes_cli.skipping.registry import policy
from modes_cli.unfinished import Unfinished, file_name

UNFINISHED = file_name(Thresholds.FILE)
PRICED = 2  # policies in the price list, beside the paper's

Key = tuple[float, float | None]


def find_thresholds(request: SearchRequest) -> Outcome[Thresholds]:
    """Thresholds for each target, confirmed by measured passes, and the price list, written to thresholds.json.

    Targets that an earlier search with the same options found are kept, and so are the passes of one that was stopped. Several
    processes measure each a share of the
    calibration set and decide the same; the first one writes.

    Raises:
        BadOption: a target outside 0..1, an unknown policy or strategy.
        UnreachableTarget: special tokens are never skipped, so not every target can be met.
        MissingArtifact, StaleArtifact, BadArtifact: the calibration is not there, or not of this model.
        RunLocked: another command writes in the run folder.
    """
    run = RunFolder(request.run)
    with joined() as ranks, one_writer(run.path, "search") if ranks.first else contextlib.nullcontext():
        return _find(request, run, ranks)


def _find(request: SearchRequest, run: RunFolder, ranks: Ranks) -> Outcome[Thresholds]:
    wanted = _checked(request)
    ranks.require_one_device_each(request.device_map)
    calibration = run.read(Calibration)
    digest = files.sha256(run.file(Calibration.FILE))
    options: dict[str, str | int | float | bool | None] = {
        "policy": request.policy,
        "strategy": request.strategy,
        "passes": request.passes,
        "grid": request.grid,
        "frontier": request.frontier,
    }
    earlier: Thresholds | None = None
    if not request.fresh and run.exists(Thresholds):
        earlier = run.read(Thresholds)
        expected = flatten(calibration.model, calibration.data, versions(), options) | {"calibration": digest}
        found = earlier.identity() | {"calibration": earlier.calibration}
        run.require_same(Thresholds, found, expected, renew=f"modes search{run.option} --fresh")
    known = None if earlier is None else earlier.model_dump_json()
    # Nobody writes before all have read: this is where they meet.
    ranks.agree("calibration, search or library version", [digest, known, wanted, options, versions().model_dump()])
    spec = model_spec(calibration, request.device, request.trust_remote_code, request.device_map, request.offload)
    results = {(result.target, result.decode_target): result for result in earlier.results} if earlier else {}
    missing = [key for key in wanted if key not in results]
    if earlier is not None and not missing and bool(earlier.frontier) == request.frontier:
        require_current(run, calibration, spec)
        if ranks.first:
            files.remove(run.file(UNFINISHED))
        return Outcome(earlier, run.file(Thresholds.FILE), reused=True)

    def memory(loaded: Loaded) -> Memory:
        flat = flatten(calibration.model, calibration.data, versions(), options) | {"calibration": digest}
        made_from = fingerprint(flat, loaded.path, loaded.device) if ranks.first else {}
        return Memory(Unfinished(run.file(UNFINISHED), made_from, request.progress), ranks, fresh=request.fresh)

    def artifact(frontier: list[FrontierEntry], passes: float) -> Thresholds:
        ordered = sorted(results, key=lambda key: (key[0], -1.0 if key[1] is None else key[1]))
        return Thresholds(
            model=calibration.model,
            data=calibration.data,
            options=options,
            versions=versions(),
            calibration=digest,
            groups=_groups(calibration),
            results=[results[key] for key in ordered],
            frontier=frontier,
            model_passes=sum(result.model_passes for result in results.values()) + passes,
            grid=request.grid,
        )

    with recalled(run, calibration, spec, ranks, memory) as calibrated:
        search = _Search(request, calibration, Measured(calibration, run), calibrated)
        search.require_reachable(missing)
        request.progress.start("search", len(missing) + request.frontier)
        for key in missing:
            results[key] = search.find(*key)
            if ranks.first:  # after each target, so that a search that is stopped keeps what it has found
                run.write(artifact([], 0.0))
            request.progress.advance()
        priced, passes = search.price(list(results.values())) if request.frontier else ([], 0.0)
        made = artifact(priced, passes)
        if ranks.first:
            run.write(made)
            files.remove(run.file(UNFINISHED))
        request.progress.advance()
    return Outcome(made, run.file(Thresholds.FILE))


def _checked(request: SearchRequest) -> list[Key]:
    for name, target in [*(("target", one) for one in request.targets), ("decode target", request.decode_target)]:
        if target is not None and not (math.isfinite(target) and 0 <= target <= 1):
            raise BadOption(f"{name} `{target}` is no skip ratio", hint="a share of top-k pairs, from 0 to 1")
    if request.strategy not in STRATEGIES:
        raise BadOption(f"no strategy `{request.strategy}`", hint=f"strategies are {', '.join(STRATEGIES)}")
    if request.grid < 2 or request.passes < 4:
        raise BadOption(
            f"grid `{request.grid}`, passes `{request.passes}`", hint="a grid has 2 values or more, a search 4 passes or more"
        )
    return [(target, request.decode_target) for target in sorted(set(request.targets))]


class _Search:
    """One request on one calibrated model."""

    def __init__(self, request: SearchRequest, calibration: Calibration, measured: Measured, calibrated: Calibrated) -> None:
        self.request, self.calibration, self.measured = request, calibration, measured
        self.objective = calibrated.objective
        self.scores = ScoreCounts(calibrated.counts, self.objective)
        self.options = candidates(request.policy, request.strategy, measured, self.scores, request.progress.note)
        self.scoring = self.objective.passes

    def require_reachable(self, wanted: list[Key]) -> None:
        """Raises UnreachableTarget."""
        for target, decode in wanted:
            largest = max(option.staircase(decode).largest for option in self.options)
            if target > largest:
                raise UnreachableTarget(target, largest, self.request.policy)

    def find(self, target: float, decode_target: float | None) -> SearchResult:
        request, objective = self.request, self.objective
        before = objective.passes
        objective.forget()  # so that a target's result and cost do not depend on which others were asked for
        asked = Target(target, decode_target)
        choice = choose(self.options, objective, asked, STRATEGIES[request.strategy], request.grid, request.passes)
        best = choice.best
        if best is None:
            reached = max((point.skip_ratio for point in choice.measured), default=0.0)
            raise UnreachableTarget(target, reached, request.policy)
        if not asked.close_to(best) and request.strategy == "frontier":
            raise BadOption(
                f"`{request.passes}` passes came no closer to target `{target:g}` than a skip ratio of `{best.skip_ratio:.4f}`",
                hint="allow more `--passes`, or calibrate on more samples",
            )
        distinct = self._distinct(best)
        return self._result(asked, choice, best, objective.passes - before, distinct)

    def _distinct(self, best: Point) -> list[DistinctExperts]:
        listener = DecodeRouting(self.calibration.moe_layers, self.calibration.experts)
        self.objective.listen(listener, best.rule)
        return listener.count()

    def _result(
        self, asked: Target, choice: Choice, best: Point, passes: float, distinct: list[DistinctExperts]
    ) -> SearchResult:
        winner, layers = choice.winner, self.calibration.importance
        return SearchResult(
            target=asked.ratio,
            decode_target=asked.decode,
            policy=winner.policy.name,
            parameters=winner.policy.parameters,
            tau=self._tau(best),
            skip_ratio=best.skip_ratio,
            skip_ratio_per_group=best.per_group,
            skip_ratio_per_layer=dict(zip(layers, best.per_layer, strict=True)),
            kl=best.kl,
            kl_selection=best.kl_selection,
            kl_held_out=best.kl_held_out,
            predicted_skip_ratio=_predicted(winner, best),
            model_passes=passes,
            distinct_experts=distinct,
            frontier=self._frontier(choice.measured),
            alternatives=[self._alternative(candidate, point) for candidate, point in choice.tried],
        )

    def _alternative(self, tried: Candidate, point: Point) -> Alternative:
        return Alternative(
            policy=tried.policy.name,
            parameters=tried.policy.parameters,
            tau=self._tau(point),
            skip_ratio=point.skip_ratio,
            kl=point.kl,
            kl_selection=point.kl_selection,
            share=point.share,
        )

    def _frontier(self, measured: list[Point]) -> list[FrontierPoint]:
        """Measured points that no other one beats in both ratio and damage, by rising ratio."""
        kept: list[Point] = []
        for point in sorted(measured, key=lambda p: (-p.skip_ratio, p.kl)):
            if not kept or point.kl < kept[-1].kl:
                kept.append(point)
        return [FrontierPoint(tau=self._tau(p), skip_ratio=p.skip_ratio, kl=p.kl) for p in reversed(kept)]

    def _tau(self, point: Point) -> dict[str, float]:
        """By group; `decode` where it is not that of text."""
        text, vision, decode = point.tau
        named = {"text": text, "vision": vision} | ({} if decode == text else {"decode": decode})
        return {group: tau for group, tau in named.items() if group in (*_groups(self.calibration), "decode")}

    def price(self, results: list[SearchResult]) -> tuple[list[FrontierEntry], float]:
        """The price list of the policies that the largest targets chose and of the paper's, and what measuring it cost."""
        before = self.objective.passes
        self.objective.forget()
        chosen = [(result.policy, result.parameters) for result in sorted(results, key=lambda result: -result.target)]
        names = [one for at, one in enumerate(chosen) if one not in chosen[:at]][:PRICED]
        paper = policy(PAPER)
        if (paper.name, paper.parameters) not in names:
            names.append((paper.name, paper.parameters))
        options = [candidate(policy(name, **parameters), self.measured, self.scores) for name, parameters in names]
        return price_list(options, results, self.objective, self._tau), self.objective.passes - before + self.scoring


def _predicted(winner: Candidate, best: Point) -> float:
    text, vision, decode = best.tau
    apart = winner.staircase()
    together = apart.ratio(text, vision)
    if decode == text:
        return together
    return together + (apart.skipped((DECODE,), decode) - apart.skipped((DECODE,), text)) / apart.total


def _groups(calibration: Calibration) -> list[str]:
    """Those that have a threshold: with `--text-only` there is one modality."""
    return ["text"] if calibration.options.get("text_only") else ["text", "vision"]
