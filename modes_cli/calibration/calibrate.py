"""How much each MoE layer matters (MoDES, arXiv:2511.15690, eq. 2), and what its router thinks of each expert."""

import torch
from safetensors.torch import save

from modes_cli.artifacts import Calibration
from modes_cli.artifacts.calibration import LayerImportance
from modes_cli.calibration.divergence import kl_sum, log_distribution
from modes_cli.calibration.replay import Replay
from modes_cli.calibration.scores import ScoreHistogram
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
    source = open_source(request.data, text_only=request.model.text_only)
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
            run.check_tensors(kept.tensors)
            return Outcome(kept, run.file(Calibration.FILE), reused=True)
    loaded = load(request.model)
    measured = _Measurement(loaded)
    engine = SkipEngine(loaded.model, loaded.blocks, loaded.tokens)
    request.progress.start("calibrate", len(source))
    try:
        with Replay(loaded.model, loaded.blocks) as replay:
            for samples in batches(source, request.batch_size):
                measured.add(measuring_batch(loaded, samples), engine, replay)
                request.progress.advance(len(samples))
            forwards = replay.layers_run / replay.layers
    finally:
        engine.remove()
    tensors = run.write_tensors(TENSORS, measured.tensors())
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
    return Outcome(artifact, run.write(artifact))


class _Measurement:
    """Sums over batches, in float64 and integers."""

    def __init__(self, loaded: Loaded) -> None:
        self.blocks, self.top_k = loaded.blocks, loaded.blocks[0].top_k
        self.damage = torch.zeros(len(loaded.blocks), len(COLUMNS), dtype=torch.float64)
        self.histogram = ScoreHistogram(len(loaded.blocks))
        self.reference: list[torch.Tensor] = []
        self.answer_tokens = 0
        self.batches = 0

    def add(self, batch: Batch, engine: SkipEngine, replay: Replay) -> None:
        def watch(routing: Routing) -> None:
            self.histogram.add(routing.layer, routing.pi, routing.group)

        with engine.using(watch=watch):
            full = log_distribution(replay.record(batch))
        self.reference.append(full)
        self.answer_tokens += full.shape[0]
        self.batches += 1
        for block in self.blocks:
            for column, (_, group) in enumerate(COLUMNS):
                with engine.using(drop=Drop(block.index, group)):
                    self.damage[block.index, column] += kl_sum(full, replay.run(batch, block.layer))

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
