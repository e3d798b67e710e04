"""How much each MoE layer matters (MoDES, arXiv:2511.15690, eq. 2), and what its router thinks of each expert."""

import torch
from safetensors.torch import save

from modes_cli.artifacts import Calibration
from modes_cli.artifacts.calibration import LayerImportance
from modes_cli.calibration.divergence import kl_sum, log_distribution
from modes_cli.calibration.replay import Replay
from modes_cli.calibration.scores import ScoreHistogram
from modes_cli.calibration.unfinished import FILE as UNFINISHED
from modes_cli.calibration.unfinished import Unfinished
from modes_cli.data import batches, open_source
from modes_cli.models.groups import GROUPS, TEXT, VISION
from modes_cli.models.identity import identity
from modes_cli.models.inputs import Batch, measuring_batch
from modes_cli.models.loading import Loaded, load, versions
from modes_cli.requests import CalibrateRequest, Outcome
from modes_cli.run_folder import RunFolder
from modes_cli.skipping.engine import Drop, Routing, SkipEngine

TENSORS = "calibration.safetensors"
# What loses a layer's routed experts, by column of the importance table.
COLUMNS: tuple[tuple[str, int | None], ...] = (("all", None), ("text", TEXT), ("vision", VISION))


def calibrate(request: CalibrateRequest) -> Outcome[Calibration]:
    """Measure importance, routing scores and reference distributions, and write calibration.json and .safetensors.

    Raises:
        StaleArtifact: the run folder holds a calibration made from something else, and `fresh` was not asked for.
    """
    run = RunFolder(request.run)
    source = open_source(request.data, text_only=request.model.text_only, progress=request.progress)
    options: dict[str, str | int | float | bool | None] = {
        "batch_size": request.batch_size,
        "text_only": request.model.text_only,
        "image_column": request.data.image_column,
        "question_column": request.data.question_column,
        "answer_column": request.data.answer_column,
    }
    expected = identity(request.model, source, options)
    if not request.fresh:
        kept = run.read_if_same(Calibration, expected.flat, renew=expected.renew("calibrate", run))
        if kept is not None:
            run.check_tensors(kept.tensors, Calibration)
            Unfinished(run.file(UNFINISHED), expected.flat).remove()
            return Outcome(kept, run.file(Calibration.FILE), reused=True)
    loaded = load(request.model)
    measured, unfinished = _Measurement(loaded), Unfinished(run.file(UNFINISHED), expected.flat)
    before = None if request.fresh else unfinished.restore()
    if before is not None:
        measured.resume(*before)
    engine = SkipEngine(loaded.model, loaded.blocks, loaded.tokens)
    request.progress.start("calibrate", len(source))
    try:
        with Replay(loaded.model, loaded.blocks) as replay:
            for number, samples in enumerate(batches(source, request.batch_size)):
                if number >= measured.batches:
                    measured.add(measuring_batch(loaded, samples), engine, replay)
                    unfinished.save(measured.state(), measured.batches)
                request.progress.advance(len(samples))
    finally:
        engine.remove()
    forwards = measured.layers_run / replay.layers
    tensors = run.write_tensors(TENSORS, measured.tensors(), Calibration)
    naive = (1 + len(COLUMNS) * len(loaded.blocks)) * measured.batches
    artifact = Calibration(
        model=loaded.info,
        data=expected.data,
        options=options,
        versions=versions(),
        family=loaded.family,
        moe_layers=len(loaded.blocks),
        experts=loaded.blocks[0].num_experts,
        top_k=loaded.blocks[0].top_k,
        groups=list(GROUPS),
        importance=measured.importance(),
        tokens=measured.tokens(),
        answer_tokens=measured.answer_tokens,
        samples=len(source),
        forward_equivalents=forwards / measured.batches,
        naive_forwards=naive / measured.batches,
        tensors=tensors,
    )
    path = run.write(artifact)
    unfinished.remove()
    return Outcome(artifact, path)


class _Measurement:
    """Sums over batches, in float64 and integers."""

    def __init__(self, loaded: Loaded) -> None:
        self.blocks, self.top_k = loaded.blocks, loaded.blocks[0].top_k
        self.damage = torch.zeros(len(loaded.blocks), len(COLUMNS), dtype=torch.float64)
        self.histogram = ScoreHistogram(len(loaded.blocks))
        self.reference: list[torch.Tensor] = []
        self.answer_tokens = 0
        self.batches = 0
        self.layers_run = 0

    def state(self) -> dict[str, torch.Tensor]:
        """All sums, as tensors."""
        counters = torch.tensor([self.answer_tokens, self.layers_run])
        reference = torch.cat(self.reference)
        return {"damage": self.damage, "histogram": self.histogram.counts, "reference": reference, "counters": counters}

    def resume(self, state: dict[str, torch.Tensor], batches: int) -> None:
        """Go on from what `state` gave after so many batches."""
        self.damage, self.histogram.counts = state["damage"], state["histogram"]
        self.reference, self.batches = [state["reference"]], batches
        self.answer_tokens, self.layers_run = state["counters"].tolist()

    def add(self, batch: Batch, engine: SkipEngine, replay: Replay) -> None:
        def watch(routing: Routing) -> None:
            self.histogram.add(routing.layer, routing.pi, routing.group)

        with engine.using(watch=watch):
            full = log_distribution(replay.record(batch))
        self.reference.append(full)
        self.answer_tokens += full.shape[0]
        self.batches += 1
        before = replay.layers_run - replay.layers  # the recording above counts too
        for block in self.blocks:
            for column, (_, group) in enumerate(COLUMNS):
                with engine.using(drop=Drop(block.index, group)):
                    self.damage[block.index, column] += kl_sum(full, replay.run(batch, block.layer))
        self.layers_run += replay.layers_run - before

    def importance(self) -> dict[str, LayerImportance]:
        kl = self.damage / self.answer_tokens
        share = kl / kl.sum(0).clamp_min(1e-300)
        return {
            str(block.layer): LayerImportance(
                **{name: float(share[block.index, i]) for i, (name, _) in enumerate(COLUMNS)},
                **{f"kl_{name}": float(kl[block.index, i]) for i, (name, _) in enumerate(COLUMNS)},
            )
            for block in self.blocks
        }

    def tokens(self) -> dict[str, int]:
        pairs = self.histogram.counts[0].sum(-1)  # every MoE layer sees the same tokens
        return {name: int(pairs[i]) // self.top_k for i, name in enumerate(GROUPS)}

    def tensors(self) -> bytes:
        return save({"score_histogram": self.histogram.counts, "reference_log_probabilities": torch.cat(self.reference)})
