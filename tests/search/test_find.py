"""`modes search`: thresholds that hold what they say, and when results are kept, joined or refused."""

import dataclasses
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from modes_cli import files
from modes_cli.artifacts import Calibration, Thresholds
from modes_cli.artifacts.thresholds import FrontierEntry
from modes_cli.calibration import calibrate
from modes_cli.data.sample import Sample
from modes_cli.errors import BadOption, MissingArtifact, StaleArtifact, UnreachableTarget
from modes_cli.models.inputs import measuring_batch
from modes_cli.models.loading import Loaded
from modes_cli.run_folder import RunFolder
from modes_cli.search import find_thresholds
from modes_cli.search.pricing import TARGETS as PRICED_TARGETS
from modes_cli.search.problem import TOLERANCE
from modes_cli.search.selection import select
from modes_cli.search.strategies import STRATEGIES
from modes_cli.skipping.engine import SkipEngine
from modes_cli.skipping.measured import Measured
from modes_cli.skipping.registry import from_result
from tests import checkpoints
from tests.runs import SAMPLES, calibration_request, content, search_request

Fresh = Callable[..., Path]
TARGETS = (0.3, 0.7)
PASSES = 12


@pytest.fixture(scope="module")
def searched(calibrated: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both models, searched for both targets; not to be changed."""
    runs = {}
    for name, run in calibrated.items():
        runs[name] = Path(shutil.copytree(run, tmp_path_factory.mktemp("searched") / name))
        outcome = find_thresholds(search_request(runs[name], *reversed(TARGETS)))
        assert outcome.path == runs[name] / "thresholds.json"
        assert not outcome.reused
        assert RunFolder(runs[name]).read(Thresholds) == outcome.artifact
    return runs


def thresholds(run: Path) -> Thresholds:
    return RunFolder(run).read(Thresholds)


@pytest.mark.parametrize("name", ["tiny", "digits"])
def test_targets_are_reached_closely_and_within_the_budget(name: str, searched: dict[str, Path]) -> None:
    artifact = thresholds(searched[name])
    assert tuple(result.target for result in artifact.results) == TARGETS
    for result in artifact.results:
        assert result.target <= result.skip_ratio <= result.target + TOLERANCE
        assert abs(result.predicted_skip_ratio - result.skip_ratio) < 0.05
        assert result.model_passes <= PASSES + 1
        assert result.tau.keys() == {"text", "vision"}
    assert artifact.model_passes == sum(result.model_passes for result in artifact.results)
    assert artifact.results[0].kl < artifact.results[1].kl
    assert artifact.calibration == files.sha256(searched[name] / "calibration.json")


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny", "digits"])
def test_thresholds_do_what_the_artifact_says(
    name: str, searched: dict[str, Path], request: pytest.FixtureRequest, small_samples: Callable[..., list[Sample]]
) -> None:
    loaded: Loaded = request.getfixturevalue(name)
    run, samples = RunFolder(searched[name]), small_samples(SAMPLES)
    calibration = run.read(Calibration)
    engine = SkipEngine(loaded.model, loaded.blocks, loaded.tokens)
    try:
        for result in thresholds(searched[name]).results:
            with engine.using(rule=from_result(result, Measured(calibration, run))) as counts:
                for part in (samples[:8], samples[8:]):
                    batch = measuring_batch(loaded, part)
                    with engine.answers_at(batch.decoding):
                        loaded.model(**batch.inputs)
            assert counts.skip_ratio() == result.skip_ratio
            assert counts.per_group() == result.skip_ratio_per_group
            assert dict(zip(calibration.importance, counts.per_layer(), strict=True)) == result.skip_ratio_per_layer
    finally:
        engine.remove()


@pytest.mark.parametrize("name", ["tiny", "digits"])
def test_the_frontier_holds_measured_points_none_of_which_beats_another(name: str, searched: dict[str, Path]) -> None:
    for result in thresholds(searched[name]).results:
        points = [(point.skip_ratio, point.kl) for point in result.frontier]
        assert points == sorted(points)
        assert all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(points))
        feasible = [kl for ratio, kl in points if ratio >= result.target]
        assert min(feasible) == result.kl


def test_a_target_added_later_gets_the_numbers_of_asking_at_once(searched: dict[str, Path], fresh_run: Fresh) -> None:
    run = fresh_run("tiny")
    one = find_thresholds(search_request(run, TARGETS[1])).artifact
    assert [result.target for result in one.results] == [TARGETS[1]]
    both = find_thresholds(search_request(run, TARGETS[0])).artifact
    assert both.results[1] == one.results[0]
    assert content(run) == content(searched["tiny"])  # which asked for both at once


def test_a_grid_shared_by_two_targets_costs_each_its_own_passes(fresh_run: Fresh) -> None:
    """Otherwise `model_passes` would tell which targets were asked for together."""
    at_once = find_thresholds(search_request(fresh_run("tiny"), *TARGETS, strategy="exhaustive", grid=3)).artifact
    assert [result.model_passes for result in at_once.results] == [
        10.0,
        10.0,
    ]  # one more counts the experts that decoding needs
    later = fresh_run("tiny", "later")
    for target in TARGETS:
        artifact = find_thresholds(search_request(later, target, strategy="exhaustive", grid=3)).artifact
    assert artifact == at_once


def test_the_same_bytes_twice(searched: dict[str, Path], fresh_run: Fresh) -> None:
    run = fresh_run("digits")
    find_thresholds(search_request(run, *TARGETS))
    assert content(run) == content(searched["digits"])
    find_thresholds(search_request(run, *TARGETS, fresh=True))
    assert content(run) == content(searched["digits"])


def test_found_targets_are_not_searched_again(searched: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modes_cli.search.calibrated.load", lambda _: pytest.fail("loaded the model"))
    before = content(searched["tiny"])
    outcome = find_thresholds(search_request(searched["tiny"], TARGETS[0], TARGETS[0]))
    assert outcome.reused
    assert tuple(result.target for result in outcome.artifact.results) == TARGETS
    assert content(searched["tiny"]) == before


def test_fresh_forgets_other_targets(searched: dict[str, Path], fresh_run: Fresh) -> None:
    run = fresh_run("tiny")
    (run / "thresholds.json").write_bytes((searched["tiny"] / "thresholds.json").read_bytes())
    artifact = find_thresholds(search_request(run, TARGETS[0], fresh=True)).artifact
    assert artifact.results == thresholds(searched["tiny"]).results[:1]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"policy": "dmt"}, "policy"),
        ({"passes": 11}, "passes"),
        ({"grid": 9}, "grid"),
        ({"strategy": "two-pointer"}, "strategy"),
    ],
)
def test_results_of_other_options_are_refused(change: dict[str, object], field: str, searched: dict[str, Path]) -> None:
    before = content(searched["tiny"])
    with pytest.raises(StaleArtifact, match=f"was made with options.{field} ") as caught:
        find_thresholds(search_request(searched["tiny"], 0.5, **change))
    assert str(caught.value.hint).startswith("renew it: `modes search --run ")
    assert content(searched["tiny"]) == before


def test_results_of_another_calibration_are_refused(searched: dict[str, Path], fresh_run: Fresh, tiny_checkpoint: Path) -> None:
    run = fresh_run("tiny")
    (run / "thresholds.json").write_bytes((searched["tiny"] / "thresholds.json").read_bytes())
    calibrate(calibration_request(tiny_checkpoint, run, samples=8, fresh=True))
    with pytest.raises(StaleArtifact, match=r"thresholds\.json` was made with (calibration|data\.)"):
        find_thresholds(search_request(run, TARGETS[0]))


def test_a_calibration_of_another_model_is_refused(tmp_path: Path) -> None:
    folder, run = checkpoints.write_moe(tmp_path / "model"), tmp_path / "run"
    calibrate(calibration_request(folder, run, samples=8))
    find_thresholds(search_request(run, 0.3))
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    for target in (0.3, 0.5):  # also where the result is there already
        with pytest.raises(StaleArtifact, match=r"calibration\.json` was made with model\.digest") as caught:
            find_thresholds(search_request(run, target))
        assert f"modes calibrate {folder}" in str(caught.value.hint)


def test_a_calibration_of_other_versions_is_refused(fresh_run: Fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    from modes_cli.models.loading import versions

    other = versions().model_copy(update={"torch": "1.0.0"})
    monkeypatch.setattr("modes_cli.search.calibrated.versions", lambda: other)
    with pytest.raises(StaleArtifact, match=r"made with versions\.torch"):
        find_thresholds(search_request(fresh_run("tiny"), 0.3))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_more_than_can_be_skipped_is_refused_with_the_largest_ratio(strategy: str, fresh_run: Fresh) -> None:
    run = fresh_run("tiny")
    tokens = RunFolder(run).read(Calibration).tokens
    largest = 1 - tokens["special"] / sum(tokens.values())
    with pytest.raises(UnreachableTarget) as caught:
        find_thresholds(search_request(run, 0.3, 1.0, strategy=strategy, grid=4))
    assert caught.value.largest == pytest.approx(largest)
    assert f"`{largest:.4f}`" in str(caught.value)
    assert not (run / "thresholds.json").exists()


@pytest.mark.parametrize("policy", ["modes", "gmlg", "dmt", "threshold", "tempered"])
def test_nearly_the_largest_ratio_can_be_had(policy: str, fresh_run: Fresh) -> None:
    run = fresh_run("tiny")
    tokens = RunFolder(run).read(Calibration).tokens
    target = round(1 - tokens["special"] / sum(tokens.values()) - 0.001, 4)
    (result,) = find_thresholds(search_request(run, target, policy=policy)).artifact.results
    assert target <= result.skip_ratio <= target + TOLERANCE


@pytest.mark.parametrize("decode", [0.2, 0.75])
def test_a_target_for_decode_is_met_beside_the_other(decode: float, fresh_run: Fresh) -> None:
    run = fresh_run("tiny")
    (result,) = find_thresholds(search_request(run, 0.6, decode_target=decode)).artifact.results
    assert (result.target, result.decode_target) == (0.6, decode)
    assert 0.6 <= result.skip_ratio <= 0.6 + TOLERANCE
    assert decode <= result.skip_ratio_per_group["decode"] <= decode + 0.1  # few tokens: a step is large
    assert result.tau.keys() == {"text", "vision", "decode"}
    # Beside the same target without one: both are kept, and chosen by name.
    both = find_thresholds(search_request(run, 0.6)).artifact
    assert [one.decode_target for one in both.results] == [None, decode]
    assert select(both, 0.6).decode_target is None
    assert select(both, None, decode) == result
    with pytest.raises(BadOption, match=r"no thresholds for target `0.6 \(decode 0.5\)`"):
        select(both, 0.6, 0.5)


def test_the_price_list_is_measured_and_complete(fresh_run: Fresh) -> None:
    run = fresh_run("tiny")
    artifact = find_thresholds(search_request(run, 0.5, policy="grouped", frontier=True)).artifact
    tokens = RunFolder(run).read(Calibration).tokens
    largest = 1 - tokens["special"] / sum(tokens.values())
    by_policy: dict[str, list[FrontierEntry]] = {}
    for entry in artifact.frontier:
        by_policy.setdefault(entry.policy, []).append(entry)
    assert set(by_policy) == {"grouped", "modes"}
    for entries in by_policy.values():
        assert [entry.target for entry in entries] == [target for target in PRICED_TARGETS if target <= largest]
        off = {entry.target: entry.skip_ratio - entry.target for entry in entries}
        # Small targets are overshot: a layer without importance loses its pairs to any threshold.
        assert all(-0.01 < one < 0.03 or target < 0.35 for target, one in off.items()), off
        assert entries[-1].kl > entries[0].kl >= 0
    assert artifact.model_passes > artifact.results[0].model_passes
    again = find_thresholds(search_request(run, 0.5, policy="grouped", frontier=True))
    assert again.reused


def test_a_search_stopped_before_the_price_list_goes_on_with_it(fresh_run: Fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, run = fresh_run("tiny", "whole"), fresh_run("tiny")
    find_thresholds(search_request(whole, 0.5, policy="dmt", frontier=True))
    with monkeypatch.context() as patched:
        patched.setattr("modes_cli.search.find.price_list", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            find_thresholds(search_request(run, 0.5, policy="dmt", frontier=True))
    assert thresholds(run).frontier == []
    assert not find_thresholds(search_request(run, 0.5, policy="dmt", frontier=True)).reused
    assert content(run) == content(whole)


def test_distinct_experts_are_between_one_and_all(searched: dict[str, Path]) -> None:
    for run in searched.values():
        calibration = RunFolder(run).read(Calibration)
        for result in thresholds(run).results:
            assert [one.batch for one in result.distinct_experts] == [1, 8, 64]
            assert result.distinct_experts[0].full == calibration.top_k
            skipped_alone = calibration.top_k * (1 - result.skip_ratio_per_group["decode"])
            assert result.distinct_experts[0].skipped == pytest.approx(skipped_alone, rel=0.25, abs=0.3)
            for one in result.distinct_experts:
                assert one.skipped <= one.full <= calibration.experts
            full = [one.full for one in result.distinct_experts]
            assert full == sorted(full)


def test_target_zero_skips_nothing_that_matters(fresh_run: Fresh) -> None:
    (result,) = find_thresholds(search_request(fresh_run("tiny"), 0.0)).artifact.results
    assert 0.0 <= result.skip_ratio <= TOLERANCE


@pytest.mark.parametrize(("strategy", "grid", "most"), [("two-pointer", 6, 12), ("exhaustive", 4, 16)])
def test_strategies_of_the_paper(strategy: str, grid: int, most: int, fresh_run: Fresh) -> None:
    artifact = find_thresholds(search_request(fresh_run("tiny"), 0.5, strategy=strategy, grid=grid)).artifact
    (result,) = artifact.results
    assert result.policy == "modes"
    assert result.skip_ratio >= 0.5
    assert result.model_passes <= most + 1
    assert artifact.grid == grid


@pytest.mark.parametrize("policy", ["gmlg", "threshold"])
def test_policies_with_one_threshold_give_both_groups_the_same(policy: str, fresh_run: Fresh) -> None:
    (result,) = find_thresholds(search_request(fresh_run("tiny"), 0.5, policy=policy)).artifact.results
    assert result.policy == policy
    assert result.tau["text"] == result.tau["vision"]


def test_a_text_model(tiny_text_moe_checkpoint: Path, tmp_path: Path) -> None:
    calibrate(calibration_request(tiny_text_moe_checkpoint, tmp_path, text_only=True))
    (result,) = find_thresholds(search_request(tmp_path, 0.4)).artifact.results
    assert 0.4 <= result.skip_ratio <= 0.4 + TOLERANCE
    assert result.skip_ratio_per_group.keys() == {"text", "decode"}
    assert result.tau.keys() == {"text"}


@pytest.mark.parametrize(
    "change",
    [
        {"targets": (1.5,)},
        {"targets": (-0.1,)},
        {"targets": (float("nan"),)},
        {"strategy": "guess"},
        {"policy": "magic"},
        {"grid": 1},
        {"passes": 3},
    ],
)
def test_options_that_make_no_sense_are_refused(change: dict[str, object], fresh_run: Fresh) -> None:
    request = search_request(fresh_run("tiny"), 0.5)
    with pytest.raises(BadOption, match=r"`.*`"):
        find_thresholds(dataclasses.replace(request, **change))  # type: ignore[arg-type]


def test_without_a_calibration_there_is_nothing_to_search(tmp_path: Path) -> None:
    with pytest.raises(MissingArtifact) as caught:
        find_thresholds(search_request(tmp_path, 0.5))
    assert "modes calibrate" in str(caught.value.hint)
