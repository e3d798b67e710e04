"""Score distributions: what is drawn left of a threshold is what the rule skips, pair by pair."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch

from modes_cli.artifacts import Calibration, Evaluation, Thresholds
from modes_cli.errors import BadArtifact
from modes_cli.models.groups import DECODE, GROUPS, SPECIAL, TEXT, VISION
from modes_cli.report import densities, scores, write_report
from modes_cli.run_folder import RunFolder
from modes_cli.skipping.measured import Measured
from modes_cli.skipping.registry import from_result
from tests.report import crafted

SHOWN = (TEXT, VISION, DECODE)


@pytest.fixture(scope="module", params=["grouped", "modes", "threshold"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = RunFolder(tmp_path_factory.mktemp(request.param))
    crafted.fill(folder, request.param)
    return folder


def read(folder: RunFolder) -> scores.Scores:
    found = scores.read(folder, folder.read(Calibration), folder.read(Thresholds).results[0])
    assert found is not None
    return found


def kept(folder: RunFolder) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """pi (layers, tokens, k), the tokens' groups, and what the rule of the first result keeps of them."""
    calibration = folder.read(Calibration)
    rule = from_result(folder.read(Thresholds).results[0], Measured(calibration, folder))
    pi, group = crafted.pairs(calibration.moe_layers, calibration.top_k)
    return pi, group, torch.stack([rule.keep(pi[layer], layer, group) for layer in range(len(pi))])


def test_what_lies_left_of_the_threshold_is_what_the_rule_skips(folder: RunFolder) -> None:
    found, (_, group, keep) = read(folder), kept(folder)
    assert found.shown() == list(SHOWN)
    for number in SHOWN:
        drawn = found.of_score(number)
        assert drawn is not None
        assert drawn.at is not None
        left = float(drawn.shares[drawn.edges[1:] <= drawn.at + 1e-9].sum())
        below = 1.0 - float(drawn.shares.sum())  # too small for the chart
        assert left + below == pytest.approx(1 - keep[:, group == number].float().mean().item(), abs=0.005)
        assert drawn.zeros - 1e-9 <= below <= drawn.zeros + 0.003


def test_cut_offs_per_layer_are_where_the_rule_begins_to_keep(folder: RunFolder) -> None:
    found, (pi, group, keep) = read(folder), kept(folder)
    assert found.cuts is not None
    for number in SHOWN:
        (cuts,) = found.cuts.on_pi(number)
        mine = group == number
        for layer, cut in enumerate(cuts):
            assert (keep[layer, mine] == (pi[layer, mine] >= cut)).float().mean() > 0.999


def test_cells_hold_every_pair_that_is_not_too_small(folder: RunFolder) -> None:
    found, (pi, group, _) = read(folder), kept(folder)
    edges, cells = found.cells()
    for number in SHOWN:
        mine = pi[:, group == number].flatten(1).double().numpy()
        wanted = [np.histogram(np.log10(layer), edges)[0] for layer in mine]
        assert np.abs(cells[:, number] - wanted).sum() <= 2  # of a pair at a cell's edge, float32 decides
        assert cells[:, number].sum() >= 0.99 * mine.size


def test_medians(folder: RunFolder) -> None:
    found, (pi, group, _) = read(folder), kept(folder)
    mine = pi[:, group == VISION].flatten(1).double()
    np.testing.assert_allclose(found.median(VISION), mine.median(1).values.numpy(), rtol=0.005)
    assert np.isnan(found.median(GROUPS.index("audio"))).all()
    assert SPECIAL not in found.shown()


def test_the_page_draws_each_group_twice(folder: RunFolder) -> None:
    html = write_report(folder.path).read_text("utf-8")
    section = html[html.index('<section id="scores"') : html.index('<section id="importance"')]
    assert section.count("<figure") == 6
    assert section.count('class="cut"') >= 6
    assert "score = scale * pi" in section
    assert "Drawn for target 75%" in section  # the evaluated one


@pytest.mark.parametrize(
    ("rule", "totals", "lines", "told"),
    [
        ("norm", 0, 6, "Two lines: the lowest and the highest of its experts."),
        ("topk", 3, 0, "topk decides by more than pi, so no value of pi separates."),
    ],
)
def test_rules_that_look_at_more_than_pi(tmp_path: Path, rule: str, totals: int, lines: int, told: str) -> None:
    folder = RunFolder(tmp_path)
    crafted.fill(folder, rule)
    html = write_report(tmp_path).read_text("utf-8")
    section = html[html.index('<section id="scores"') : html.index('<section id="importance"')]
    assert section.count("<figure") == 3 + totals
    assert section.count('<path d="M') - section.count("fill-opacity") == 2 * lines  # each with its halo
    assert told in section


def test_thresholds_of_another_calibration_are_not_drawn(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    calibration = crafted.fill(folder)
    folder.write(calibration.model_copy(update={"answer_tokens": calibration.answer_tokens + 1}))
    html = write_report(tmp_path).read_text("utf-8")
    assert "those of this folder were made from another calibration" in html
    assert 'class="cut"' not in html


def test_without_thresholds_the_distributions_are_still_there(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    crafted.fill(folder)
    for kind in (Thresholds, Evaluation):
        folder.file(kind.FILE).unlink()
    html = write_report(tmp_path).read_text("utf-8")
    assert "none have been searched yet" in html
    assert 'aria-label="pi per layer, vision"' in html


def test_tensors_that_are_missing_name_the_command_and_altered_ones_are_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    crafted.fill(folder)
    tensors = folder.file("calibration.safetensors")
    data = tensors.read_bytes()
    tensors.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BadArtifact, match="SHA-256"):
        write_report(tmp_path)
    tensors.unlink()
    html = write_report(tmp_path).read_text("utf-8")
    assert f"modes calibrate MODEL --run {tmp_path} --fresh" in html


def test_scales_per_expert_are_a_band() -> None:
    scale = np.ones((2, len(GROUPS), 3))
    scale[0, VISION] = [0.5, 1.0, 2.0]
    scale[1, VISION] = [0.0, 1.0, 1.0]
    tau = np.full(len(GROUPS), 0.1)
    low, high = scores.Cuts(scale, tau).on_pi(VISION)
    np.testing.assert_allclose(low, [0.05, 0.1])
    np.testing.assert_allclose(high, [0.2, np.inf])
    (free,) = scores.Cuts(scale[..., 0], np.zeros(len(GROUPS))).on_pi(VISION)
    assert (free == 0).all()


def test_distributions_take_their_edges() -> None:
    edges = np.linspace(-3, 0, 5)
    cells = np.zeros((94, 4))
    cells[::2, 1] = 3
    names = [str(layer) for layer in range(94)]
    nowhere = np.full(94, 30.0)
    pictures = [
        densities.layers("many", densities.Layers(names, edges, cells, [nowhere, -nowhere], [""] * 94), "c-text", "pi"),
        densities.layers("none", densities.Layers([], edges, np.zeros((0, 4)), [], []), "c-text", "pi"),
        densities.histogram("empty", densities.Histogram(edges, np.zeros(4), None), "c-text", "pi"),
        densities.histogram("beyond", densities.Histogram(edges, np.ones(4) / 4, 5.0), "c-text", "pi"),
    ]
    for picture in pictures:
        ElementTree.fromstring(picture)
        assert "nan" not in picture
        assert "inf" not in picture
