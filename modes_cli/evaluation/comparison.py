"""`modes evaluate --policies`: what every policy retains at every target, on the same samples (as MoDES, table 1).

Each policy's thresholds are found on the calibration set, with the passes that `modes search` had for a target. Where the
search chose a policy, its result stands for that policy. All answer the same samples with one loaded model, so that differences
between policies are paired.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from modes_cli.artifacts import Thresholds
from modes_cli.artifacts.evaluation import Interval, LeftOut, PolicyAccuracy
from modes_cli.artifacts.thresholds import SearchResult
from modes_cli.errors import BadArtifact, BadOption
from modes_cli.evaluation import bootstrap
from modes_cli.evaluation.artifact import retained
from modes_cli.evaluation.subject import Searched
from modes_cli.models.groups import GROUPS
from modes_cli.models.loading import Loaded
from modes_cli.progress import Progress
from modes_cli.runtime.torch_model import TorchRuntime
from modes_cli.search import alternatives
from modes_cli.search.calibrated import recalled
from modes_cli.search.candidates import ScoreCounts
from modes_cli.search.memory import Memory
from modes_cli.skipping.measured import Measured
from modes_cli.skipping.policy import Rule
from modes_cli.skipping.registry import from_result, policy, policy_names

ALL = "all"
Key = tuple[bytes, bytes, str]  # of a rule: equal for rules that decide alike


@dataclass(frozen=True)
class Contender:
    """One policy at one target: its rule, and what that costs on the calibration set (`kl`, nats)."""

    policy: str
    parameters: dict[str, float]
    target: float
    decode_target: float | None
    rule: Rule
    kl: float
    chosen: bool


@dataclass(frozen=True)
class Contest:
    """Who is compared, who could not be, and the loaded model that answers with any of their rules."""

    contenders: Sequence[Contender]
    left_out: Sequence[LeftOut]
    runtime: TorchRuntime

    @property
    def rules(self) -> dict[Key, Rule]:
        """Those that differ: one policy can be a special case of another."""
        return {one.rule.key: one.rule for one in self.contenders}


def named(policies: Sequence[str]) -> list[str]:
    """Policies by the names that were asked for, of which one may be `all`.

    Raises:
        BadOption: no policy has that name.
    """
    for name in policies:
        if name == "auto":
            raise BadOption("`auto` is no policy to compare with", hint="what `modes search` chose is always in the table")
        if name != ALL:
            policy(name)
    return policy_names() if ALL in policies else sorted(set(policies))


@contextmanager
def contest(
    searched: Searched, names: Sequence[str], progress: Progress, memory: Callable[[Loaded], Memory] | None = None
) -> Iterator[Contest]:
    """Find every policy's thresholds for the targets of `searched`. The model is loaded for as long as the block lasts.
    `memory`: of passes over the calibration set that were made on this model.

    Raises:
        StaleArtifact, BadArtifact: the calibration is not of this model, or has not what a policy needs.
    """
    passes = searched.thresholds.options.get("passes")
    if type(passes) is not int:
        raise BadArtifact(Thresholds.FILE, "field `options.passes`", f"is `{passes!r}`, should be a number of passes")
    with recalled(searched.run, searched.calibration, searched.spec, memory=memory) as calibrated:
        measured = Measured(searched.calibration, searched.run)
        scores = ScoreCounts(calibrated.counts, calibrated.objective)
        contenders: list[Contender] = []
        left_out: list[LeftOut] = []
        others = [[name for name in names if name != result.policy] for result in searched.results]
        progress.start("search with other policies", sum(map(len, others)))
        for result, rivals in zip(searched.results, others, strict=True):
            contenders.append(_chosen(result, measured))
            for name in rivals:
                found = _other(scores, measured, name, result, passes)
                if isinstance(found, Contender):
                    contenders.append(found)
                else:
                    left_out.append(found)
                progress.advance()
        first = contenders[0].rule  # each answer says with which rule
        yield Contest(contenders, left_out, TorchRuntime(calibrated.objective.loaded, calibrated.objective.engine, first))


def _chosen(result: SearchResult, measured: Measured) -> Contender:
    rule = from_result(result, measured)
    return Contender(result.policy, result.parameters, result.target, result.decode_target, rule, result.kl, True)


def _other(scores: ScoreCounts, measured: Measured, name: str, result: SearchResult, passes: int) -> Contender | LeftOut:
    scores.objective.forget()  # so that what a policy finds does not depend on which others are compared
    at = result.target, result.decode_target
    found = alternatives.alternatives(scores, measured, [name], *at, passes)[name]
    if isinstance(found, str):
        return LeftOut(policy=name, target=at[0], decode_target=at[1], reason=found)
    return Contender(name, found.policy.parameters, *at, found.rule, found.point.kl, False)


def compared(
    contenders: Sequence[Contender],
    full: Sequence[bool],
    right: Mapping[Key, Sequence[bool]],
    skip_ratio: Mapping[Key, dict[str, float]],
    groups: Sequence[str],
    seed: int,
) -> list[PolicyAccuracy]:
    """The table: by target, then by falling accuracy.

    Args:
        full: which samples the full model has right.
        right: the same of each rule, in the same order.
        skip_ratio: of each rule, on these samples.
        groups: those whose thresholds are shown.
        seed: of the bootstrap.
    """
    keys = list(right)
    base, *rows = bootstrap.resampled([full, *(right[key] for key in keys)], seed)
    drawn = dict(zip(keys, rows, strict=True))
    accuracy = {key: sum(right[key]) / len(full) for key in keys}
    best: dict[tuple[float, float], Contender] = {}
    ordered = sorted(contenders, key=lambda c: (_at(c), -accuracy[c.rule.key], not c.chosen, c.policy))
    chosen = {_at(one): one for one in contenders if one.chosen}
    table = []
    for one in ordered:
        key, rival = one.rule.key, chosen[_at(one)].rule.key
        leader = best.setdefault(_at(one), one).rule.key
        low, high = bootstrap.difference(drawn[key], drawn[rival])
        table.append(
            PolicyAccuracy(
                policy=one.policy,
                parameters=one.parameters,
                target=one.target,
                decode_target=one.decode_target,
                tau=_tau(one.rule, groups),
                skip_ratio=skip_ratio[key],
                kl=one.kl,
                accuracy=accuracy[key],
                retained=retained(sum(full) / len(full), accuracy[key]),
                interval=interval(bootstrap.retained(base, drawn[key])),
                ahead=accuracy[key] - accuracy[rival],
                ahead_low=low,
                ahead_high=high,
                ties_best=bootstrap.difference(drawn[leader], drawn[key])[0] <= 0.0,
                chosen=one.chosen,
            )
        )
    return table


def interval(found: tuple[float, float] | None) -> Interval | None:
    """As the artifact has it."""
    return None if found is None else Interval(low=found[0], high=found[1])


def _at(one: Contender) -> tuple[float, float]:
    """Where a contender stands in the table's order of targets."""
    return one.target, -1.0 if one.decode_target is None else one.decode_target


def _tau(rule: Rule, groups: Sequence[str]) -> dict[str, float]:
    """Thresholds by name; `decode`'s where it is not that of text."""
    tau = dict(zip(GROUPS, rule.tau.tolist(), strict=True))
    shown = [*groups, *(["decode"] if tau["decode"] != tau["text"] and "decode" not in groups else [])]
    return {group: tau[group] for group in shown}
