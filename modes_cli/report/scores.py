"""Routing scores as the report draws them: read from calibration.safetensors, with the rule that was chosen for a target.

The only part of the report that needs a policy, and so torch; it is imported only where there are scores to draw.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modes_cli.artifacts import Calibration
from modes_cli.artifacts.thresholds import SearchResult
from modes_cli.errors import BadArtifact
from modes_cli.report.densities import Histogram
from modes_cli.run_folder import RunFolder

Floats = NDArray[np.float64]
CELL = 64  # bins of the calibration per cell: an eighth of a power of two
BARS = 60
HIDDEN = 0.002  # share of the pairs that may lie left of a chart


@dataclass(frozen=True)
class Cuts:
    """A rule that compares scale * pi with tau.

    Attributes:
        scale: (layers, groups), or (layers, groups, experts).
        tau: (groups,).
    """

    scale: Floats
    tau: Floats

    def on_pi(self, group: int) -> list[Floats]:
        """(layers,): the pi at which a group's pairs begin to be kept; the lowest and the highest, where experts differ."""
        scale, tau = self.scale[:, group], float(self.tau[group])
        with np.errstate(divide="ignore"):
            found = np.where(scale > 0, tau / scale, np.inf) if tau > 0 else np.zeros_like(scale)
        return [found] if found.ndim == 1 else [found.min(1), found.max(1)]


@dataclass(frozen=True)
class Scores:
    """`counts` (layers, groups, bins) between `edges` (bins + 1,) of pi. `cuts` None: nothing in pi alone decides."""

    groups: tuple[str, ...]
    counts: NDArray[np.int64]
    edges: Floats
    result: SearchResult | None
    cuts: Cuts | None

    def shown(self) -> list[int]:
        """Groups that have pairs and can lose them."""
        return [i for i, name in enumerate(self.groups) if name != "special" and self.counts[:, i].any()]

    def cells(self) -> tuple[Floats, Floats]:
        """(cells + 1,) log10 of pi, and (layers, groups, cells) counts: coarse, and only where pairs of some group are."""
        whole = (len(self.edges) - 1) // CELL
        edges = self.edges[: whole * CELL + 1 : CELL]
        coarse = self.counts[..., : whole * CELL].reshape(*self.counts.shape[:2], whole, CELL).sum(-1).astype(float)
        coarse[..., -1] += self.counts[..., whole * CELL :].sum(-1)  # pi = 1 exactly
        total = np.zeros(whole, dtype=bool)
        for group in self.shown():
            shares = coarse[:, group].sum(0) / coarse[:, group].sum()
            total |= np.cumsum(shares) > HIDDEN
        first = int(np.argmax(total))
        return np.log10(edges[first:]), coarse[..., first:]

    def of_score(self, group: int) -> Histogram | None:
        """Scale * pi over all layers, in bars that begin at the threshold. None where experts have scales of their own."""
        if self.cuts is not None and self.cuts.scale.ndim == 3:
            return None
        layers = self.counts.shape[0]
        scale = np.ones(layers) if self.cuts is None else self.cuts.scale[:, group]
        with np.errstate(divide="ignore"):
            middle = np.log10(np.sqrt(self.edges[:-1] * self.edges[1:]))
            values = (np.log10(scale)[:, None] + middle[None, :]).reshape(-1)
        weights = self.counts[:, group].reshape(-1).astype(float)
        here = (weights > 0) & np.isfinite(values)
        if not here.any():
            return None
        zeros, all_pairs = float(weights[np.isneginf(values)].sum() / weights.sum()), weights.sum()
        values, weights = values[here], weights[here]
        order = np.argsort(values, kind="stable")
        reached = np.cumsum(weights[order])
        low = float(values[order][int(np.searchsorted(reached, HIDDEN * reached[-1]))])
        high = float(values.max())
        tau = 0.0 if self.cuts is None else float(self.cuts.tau[group])
        at = float(np.log10(tau)) if 0 < tau < np.inf else None
        begin, end = (low, high) if at is None else (min(low, at), max(high, at))
        width = max((end - begin) / BARS, 0.01)
        anchor = begin if at is None else at
        edges = anchor + width * np.arange(np.floor((begin - anchor) / width), np.ceil((end - anchor) / width) + 1)
        return Histogram(edges, np.histogram(values, edges, weights=weights)[0] / all_pairs, at, zeros)

    def median(self, group: int) -> Floats:
        """(layers,) the middle pi; NaN where a layer has no pairs of the group."""
        reached = np.cumsum(self.counts[:, group], axis=1)
        bins = np.array([np.searchsorted(row, (row[-1] + 1) // 2) for row in reached])
        return np.where(reached[:, -1] > 0, self.edges[np.minimum(bins, len(self.edges) - 2)], np.nan)


def read(folder: RunFolder, calibration: Calibration, result: SearchResult | None) -> Scores | None:
    """None where the tensors of the calibration are not in the run folder.

    Args:
        result: whose thresholds are drawn; None where there are none, or they are another calibration's.

    Raises:
        BadArtifact: calibration.safetensors is not what the calibration wrote.
    """
    if not folder.file(calibration.tensors.file).exists():
        return None
    from safetensors import SafetensorError, safe_open

    from modes_cli.calibration.scores import BINS, bin_edges
    from modes_cli.models.groups import GROUPS

    path = folder.check_tensors(calibration.tensors, Calibration)
    try:
        with safe_open(path, framework="np") as file:
            counts = file.get_tensor("score_histogram")
    except (OSError, SafetensorError) as error:
        raise BadArtifact(str(path), "tensor `score_histogram`", f"cannot be read: {error}") from error
    wanted = (calibration.moe_layers, len(GROUPS), BINS)
    if counts.shape != wanted or counts.dtype != np.int64:
        problem = f"is {counts.dtype} {counts.shape}, should be int64 {wanted}"
        raise BadArtifact(str(path), "tensor `score_histogram`", problem)
    return Scores(GROUPS, counts, bin_edges(), result, None if result is None else _cuts(folder, calibration, result))


def _cuts(folder: RunFolder, calibration: Calibration, result: SearchResult) -> Cuts | None:
    from modes_cli.skipping.measured import Measured
    from modes_cli.skipping.registry import from_result

    rule = from_result(result, Measured(calibration, folder))
    if rule.contribution is not None:
        return None
    return Cuts(rule.score_scale.double().numpy(), rule.tau.double().numpy())
