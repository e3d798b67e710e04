"""How much each MoE layer matters (MoDES, arXiv:2511.15690, eq. 2), and what its router thinks of each expert."""

import contextlib
import json

import torch
from safetensors.torch import save

from modes_cli import files
from modes_cli.artifacts import Calibration
from modes_cli.artifacts.calibration import LayerImportance
from modes_cli.calibration.contributions import OutputSums
from modes_cli.calibration.divergence import kl_sum, log_distribution
from modes_cli.calibration.ratios import SlotRatios
from modes_cli.calibration.replay import Replay
from modes_cli.calibration.saliency import NAMES, PASSES, SaliencySums
from modes_cli.calibration.scores import ScoreHistogram
from modes_cli.data import batches, open_source
from modes_cli.data.overlap import sample_digest
from modes_cli.distributed import Ranks, joined
from modes_cli.errors import ModesError
from modes_cli.fingerprint import fingerprint
from modes_cli.locks import one_writer
from modes_cli.models.groups import DECODE, GROUPS, TEXT, VISION
from modes_cli.models.identity import Identity, identity
from modes_cli.models.inputs import Batch, measuring_batch
from modes_cli.models.loading import Loaded, load
from modes_cli.requests import CalibrateRequest, Outcome
from modes_cli.run_folder import RunFolder
from modes_cli.skipping.engine import SkipEngine
from modes_cli.skipping.measured import ABSENT
from modes_cli.skipping.routing import Drop, Routing
from modes_cli.unfinished import State, Unfinished, file_name

TENSORS = "calibration.safetensors"
UNFINISHED = file_name(Calibration.FILE)
# What loses a layer's routed experts, by column of the importance table.
COLUMNS: tuple[tuple[str, tuple[int, ...] | None], ...] = (
    ("all", None),
    ("text", (TEXT, DECODE)),  # the modality
    ("vision", (VISION,)),
    ("prompt", (TEXT,)),
    ("decode", (DECODE,)),
)


def calibrate(request: CalibrateRequest) -> Outcome[Calibration]:
    """Measure importance, routing scores and reference distributions, and write calibration.json and .safetensors.

    Started as several processes, each measures its share of the batches, and the first writes the same bytes that a single
    one would.

    Raises:
        StaleArtifact: the run folder holds a calibration made from something else, and `fresh` was not asked for.
        RunLocked: another command writes there.
        ElsewhereFailed, ProcessLost: another of the processes failed, or is gone.
    """
    run = RunFolder(request.run)
    with joined() as ranks, one_writer(run.path, "calibrate") if ranks.first else contextlib.nullcontext():
        return _calibrate(request, run, ranks)


def _calibrate(request: CalibrateRequest, run: RunFolder, ranks: Ranks) -> Outcome[Calibration]:
    ranks.require_one_device_each(request.model.device_map)
    source = open_source(request.data, text_only=request.model.text_only, progress=request.progress)
    options: dict[str, str | int | float | bool | None] = {
        "batch_size": request.batch_size,
        "text_only": request.model.text_only,
        "special": request.model.special,
        "image_column": request.data.image_column,
        "question_column": request.data.question_column,
        "answer_column": request.data.answer_column,
    }
    if request.model.quantize is not None:
        options["quantize"] = request.model.quantize
    expected = identity(request.model, source, options)
    ranks.agree("model, data or library version", expected.flat)
    if not request.fresh:
        kept = _kept(run, expected) if ranks.first else None
        if said := ranks.tell("" if kept is None else kept.model_dump_json()):
            if ranks.first:
                files.remove(run.file(UNFINISHED))
            return Outcome(Calibration.model_validate_json(said), run.file(Calibration.FILE), reused=True)
    loaded = load(request.model)
    measured, digests = _Measurement(loaded), list[str]()
    made_from = fingerprint(expected.flat, loaded.path, loaded.device) if ranks.first else {}
    unfinished = Unfinished(run.file(UNFINISHED), made_from, request.progress)
    if ranks.first and not request.fresh and (before := unfinished.restore()) is not None:
        measured.resume(before)
    done = int(ranks.tell(str(measured.batches)))  # the first process alone keeps sums
    engine = SkipEngine(loaded.model, loaded.blocks, loaded.tokens)
    request.progress.start("calibrate", len(source))
    try:
        with Replay(loaded.model, loaded.blocks) as replay:
            for together in ranks.rounds(batches(source, request.batch_size), done):
                own: dict[str, torch.Tensor] | None = None
                for number, samples in together:
                    digests += [sample_digest(sample) for sample in samples]
                    if number >= done and ranks.owns(number):
                        own = measured.measure(number, measuring_batch(loaded, samples), engine, replay)
                if together[-1][0] >= done:
                    for found in ranks.gather(own):
                        measured.add(found)
                    if ranks.first and unfinished.due:
                        unfinished.save(measured.state())
                request.progress.advance(sum(len(samples) for _, samples in together))
    finally:
        engine.remove()
    said = ""
    if ranks.first:
        said = _write(run, loaded, expected, measured, replay.layers, digests).model_dump_json()
        unfinished.remove()
    return Outcome(Calibration.model_validate_json(ranks.tell(said)), run.file(Calibration.FILE))


def _kept(run: RunFolder, expected: Identity) -> Calibration | None:
    """The calibration that is there, if it was made from exactly this."""
    kept = run.read_if_same(Calibration, expected.flat, renew=expected.renew("calibrate", run))
    if kept is not None:
        run.check_tensors(kept.tensors, Calibration)
    return kept


def _write(
    run: RunFolder, loaded: Loaded, made_from: Identity, measured: "_Measurement", layers: int, digests: list[str]
) -> Calibration:
    """Both files. `layers`: how many decoder layers a forward runs."""
    tensors = run.write_tensors(TENSORS, measured.tensors(), Calibration)
    naive = (1 + len(COLUMNS) * len(loaded.blocks)) * measured.batches
    artifact = Calibration(
        model=loaded.info,
        data=made_from.data,
        options=made_from.options,
        versions=made_from.versions,
        family=loaded.family,
        moe_layers=len(loaded.blocks),
        experts=loaded.blocks[0].num_experts,
        top_k=loaded.blocks[0].top_k,
        groups=list(GROUPS),
        importance=measured.importance(),
        tokens=measured.tokens(),
        answer_tokens=measured.answer_tokens,
        samples=made_from.data.samples,
        sample_digests=digests,
        forward_equivalents=measured.layers_run / layers / measured.batches,
        naive_forwards=naive / measured.batches,
        tensors=tensors,
    )
    run.write(artifact)
    return artifact


class _Measurement:
    """Sums over batches, in float64 and integers. Only the first process has them; `measure` is everybody's."""

    def __init__(self, loaded: Loaded) -> None:
        self.blocks, self.top_k = loaded.blocks, loaded.blocks[0].top_k
        self.damage = torch.zeros(len(loaded.blocks), len(COLUMNS), dtype=torch.float64)
        self.histogram = ScoreHistogram(len(loaded.blocks))
        self.ratios = SlotRatios(len(loaded.blocks), self.top_k)
        self.outputs = OutputSums(loaded.model, loaded.blocks)
        self.saliency = SaliencySums(loaded.blocks, self.outputs.routers, self.outputs.absent.get("norm_predictor", ""))
        self.reference: list[torch.Tensor] = []
        self.answer_tokens = 0
        self.batches = 0
        self.layers_run = 0

    def state(self) -> State:
        """All sums, as tensors."""
        counters = torch.tensor([self.answer_tokens, self.layers_run])
        own = {"damage": self.damage, "histogram": self.histogram.counts, "counters": counters, "ratios": self.ratios.counts}
        reference = {f"reference.{number}": part for number, part in enumerate(self.reference)}  # as they are: gigabytes
        return State(self.batches, {**own, **reference, **self.outputs.sums, **self.saliency.sums})

    def resume(self, before: State) -> None:
        """Go on from what `state` gave."""
        state, self.batches = dict(before.tensors), before.done
        self.damage, self.histogram.counts = state["damage"], state["histogram"]
        self.reference = [state[f"reference.{number}"] for number in range(self.batches)]
        self.answer_tokens, self.layers_run = state["counters"].tolist()
        self.ratios.counts = state["ratios"]
        self.outputs.sums |= {name: state[name] for name in state.keys() & {*self.outputs.sums, "router", "router_bias"}}
        self.saliency.restore(state)

    def measure(self, number: int, batch: Batch, engine: SkipEngine, replay: Replay) -> dict[str, torch.Tensor]:
        """What one batch gives, to be added: its `number`, `damage`, `histogram`, `ratios`, `reference`, `layers_run`, and the
        sums of `OutputSums` and `SaliencySums`.
        """
        histogram, ratios = ScoreHistogram(len(self.blocks)), SlotRatios(len(self.blocks), self.top_k)
        outputs = self.outputs.zeros()
        measure_outputs = self.outputs.measuring(outputs, routers=number == 0)
        damage = torch.zeros_like(self.damage)
        before = replay.layers_run

        def watch(routing: Routing) -> None:
            histogram.add(routing.layer, routing.pi, routing.group)
            ratios.add(routing.layer, routing.pi)
            measure_outputs(routing)

        with engine.answers_at(batch.decoding):
            with engine.using(watch=watch):
                full = log_distribution(replay.record(batch))
            replay.check(batch)
            for block in self.blocks:
                for column, (_, groups) in enumerate(COLUMNS):
                    with engine.using(drop=Drop(block.index, groups)):
                        damage[block.index, column] = kl_sum(full, replay.run(batch, block.layer))
            saliency = self.saliency.measure(number, batch, engine, replay)
        again = PASSES * replay.layers if saliency else 0
        return {
            "number": torch.tensor(number),
            "damage": damage,
            "histogram": histogram.counts,
            "ratios": ratios.counts,
            "reference": full,
            "layers_run": torch.tensor(replay.layers_run - before + self.outputs.layers_per_batch + again),
            **outputs,
            **saliency,
        }

    def add(self, found: dict[str, torch.Tensor]) -> None:
        """Add one batch; in the order of the batches, because float64 sums depend on it."""
        if (number := int(found["number"])) != self.batches:
            raise ModesError(f"batch `{number}` was measured where `{self.batches}` was due", hint="report this")
        self.damage += found["damage"]
        self.histogram.counts += found["histogram"]
        self.ratios.counts += found["ratios"]
        self.outputs.add(found)
        self.saliency.add(number, found)
        self.reference.append(found["reference"])
        self.answer_tokens += found["reference"].shape[0]
        self.batches += 1
        self.layers_run += int(found["layers_run"])

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
        scores = {"score_histogram": self.histogram.counts, "reference_log_probabilities": torch.cat(self.reference)}
        outputs = self.outputs.tensors()
        saliency = self.saliency.tensors(outputs["router"]) if "router" in outputs else {}
        made = {**scores, "slot_ratio": self.ratios.medians(), **outputs, **saliency}
        absent = self.outputs.absent | (dict.fromkeys(NAMES, self.saliency.obstacle) if self.saliency.obstacle else {})
        metadata = {ABSENT: json.dumps(absent, sort_keys=True)} if absent else None
        return save({name: tensor.contiguous() for name, tensor in made.items()}, metadata=metadata)
