"""Measured damage and skip ratio against PyTorch and counting; what measuring costs; which policy `auto` takes."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from modes_cli.artifacts import Calibration
from modes_cli.calibration.replay import answer_logits
from modes_cli.data.sample import Sample
from modes_cli.models.groups import with_decode
from modes_cli.models.inputs import measuring_batch
from modes_cli.models.loading import Loaded
from modes_cli.run_folder import RunFolder
from modes_cli.search.calibrated import Calibrated, model_spec, recalled
from modes_cli.skipping.measured import Measured
from modes_cli.skipping.policy import Rule
from modes_cli.skipping.registry import policy
from tests.runs import SAMPLES
from tests.skipping import reference

Recalled = tuple[Calibration, Calibrated]


@pytest.fixture(scope="module")
def tiny_again(calibrated: dict[str, Path]) -> Iterator[Recalled]:
    run = RunFolder(calibrated["tiny"])
    calibration = run.read(Calibration)
    with recalled(run, calibration, model_spec(calibration, "cpu", False)) as again:
        yield calibration, again


def rule(calibration: Calibration, text: float, vision: float) -> Rule:
    return policy("dmt").rule(Measured(calibration), {"text": text, "vision": vision})


def test_skipping_nothing_does_no_damage_at_all(tiny_again: Recalled) -> None:
    calibration, again = tiny_again
    point = again.objective.measure(rule(calibration, 0.0, 0.0))
    assert (point.kl, point.skip_ratio, point.share) == (0.0, 0.0, 1.0)
    assert [layer["all"] for layer in point.per_layer] == [0.0] * calibration.moe_layers


def test_skipping_all_skips_what_is_not_special(tiny_again: Recalled) -> None:
    calibration, again = tiny_again
    point = again.objective.measure(rule(calibration, math.inf, math.inf))
    tokens = calibration.tokens
    assert point.skip_ratio == pytest.approx(1 - tokens["special"] / sum(tokens.values()), abs=1e-12)
    assert point.per_group == {"text": 1.0, "vision": 1.0, "decode": 1.0}
    assert point.kl > 0


@torch.no_grad()
def test_damage_and_ratio_by_definition(tiny: Loaded, tiny_again: Recalled, small_samples: Callable[..., list[Sample]]) -> None:
    """A model whose experts are the plain reference, one sample at a time, against PyTorch's KL in float64."""
    calibration, _ = tiny_again
    tested = rule(calibration, 0.2, 0.27)
    damage, answers, kept, total = 0.0, 0, 0, 0
    for sample in small_samples(SAMPLES)[:4]:
        batch = measuring_batch(tiny, [sample])
        group = with_decode(tiny.tokens.of(batch.inputs["input_ids"]), batch.decoding).reshape(-1)
        full = answer_logits(tiny.model, batch).double().log_softmax(-1)

        def skipping(block, hidden, index, weights, group=group):  # type: ignore[no-untyped-def]
            nonlocal kept, total
            keep = reference.keep(tested, reference.probability(weights), block.index, group)
            kept, total = kept + int(keep.sum()), total + keep.numel()
            return reference.experts_output(block, hidden, index, weights, keep)

        for block in tiny.blocks:
            block.experts.forward = lambda h, i, w, b=block: skipping(b, h, i, w)
        try:
            other = answer_logits(tiny.model, batch).double().log_softmax(-1)
        finally:
            for block in tiny.blocks:
                del block.experts.forward
        damage += float(F.kl_div(other, full, reduction="sum", log_target=True))
        answers += len(full)
    point = _first_samples(tiny, small_samples(SAMPLES)[:4], tested)
    assert point == pytest.approx((damage / answers, 1 - kept / total), rel=1e-3)


def _first_samples(loaded: Loaded, samples: list[Sample], tested: Rule) -> tuple[float, float]:
    from modes_cli.calibration.divergence import log_distribution
    from modes_cli.search.objective import Objective
    from modes_cli.skipping.engine import SkipEngine

    batches = [measuring_batch(loaded, samples[:3]), measuring_batch(loaded, samples[3:])]
    full = torch.cat([log_distribution(answer_logits(loaded.model, batch)) for batch in batches])
    engine = SkipEngine(loaded.model, loaded.blocks, loaded.tokens)
    try:
        point = Objective(loaded, engine, batches, full).measure(tested)
    finally:
        engine.remove()
    return point.kl, point.skip_ratio


def test_passes_count_each_rule_once_and_parts_as_parts(tiny_again: Recalled) -> None:
    calibration, again = tiny_again
    objective = again.objective
    before = objective.passes
    first = objective.measure(rule(calibration, 0.11, 0.22))
    assert objective.measure(rule(calibration, 0.11, 0.22)) is first
    assert objective.passes - before == 1.0
    half = objective.measure(rule(calibration, 0.11, 0.22), share=0.25)  # two batches: one is the least
    assert objective.passes - before == 1.5
    assert half.share == objective.part(0.25) == 0.5
    assert half.kl != first.kl
    objective.forget()
    again_measured = objective.measure(rule(calibration, 0.11, 0.22))
    assert again_measured is not first
    assert (again_measured.kl, again_measured.skip_ratio, again_measured.per_layer) == (
        first.kl,
        first.skip_ratio,
        first.per_layer,
    )
    assert objective.passes - before == 2.5


def test_halves_of_the_samples_make_the_whole(
    tiny: Loaded, tiny_again: Recalled, small_samples: Callable[..., list[Sample]]
) -> None:
    """Every other sample decides, whatever the batches are; each half measured alone gives its own number."""
    calibration, again = tiny_again
    tested, samples = rule(calibration, 0.2, 0.27), small_samples(SAMPLES)
    point = again.objective.measure(tested)
    assert point.kl_selection != point.kl_held_out
    ones, others = (_first_samples(tiny, samples[start::2], tested)[0] for start in (0, 1))
    assert (point.kl_selection, point.kl_held_out) == (pytest.approx(ones, rel=1e-3), pytest.approx(others, rel=1e-3))
    assert min(point.kl_selection, point.kl_held_out) < point.kl < max(point.kl_selection, point.kl_held_out)


def test_a_counted_histogram_of_pi_is_the_calibrations(tiny_again: Recalled) -> None:
    calibration, again = tiny_again
    flat = rule(calibration, 0.0, 0.0)
    assert torch.equal(again.objective.histogram(flat), again.counts)
