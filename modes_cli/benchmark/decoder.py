"""`modes bench --shape`: a whole decoder with random weights, full and skipped, against transformers' default.

On a GPU every case runs as a CUDA graph too, transformers as well as this package: what is then compared is the GPU's work,
and not how fast Python launches it. Attention is the same on both sides. Three kinds of rows:

    transformers                  as it comes: launched from Python, a growing cache
    transformers (graph)          the same work captured
    transformers+modes (graph)    the same with the rule in force; without `(graph)` where it could not be captured
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from modes_cli.artifacts import Bench
from modes_cli.artifacts.base import DataInfo, ModelInfo
from modes_cli.benchmark.cases import REFERENCE, Timed, measure_rounds, summarised
from modes_cli.benchmark.cost import Cost
from modes_cli.benchmark.machine import measure_machine
from modes_cli.benchmark.random_decoder import DTYPE, FilledCache, RandomDecoder, mrope_positions
from modes_cli.benchmark.shapes import decoder_shape
from modes_cli.errors import first_line, is_memory
from modes_cli.models.blocks import find_moe_blocks
from modes_cli.models.groups import GROUPS, TokenGroups
from modes_cli.models.loading import pick_device, versions
from modes_cli.requests import BenchRequest, Outcome
from modes_cli.run_folder import RunFolder
from modes_cli.skipping.engine import SkipEngine
from modes_cli.skipping.policy import Rule, tau_vector
from modes_cli.timing import NotCaptured, captured, event_seconds, timed

RATIOS = (0.0, 0.5, 0.75, 0.88)
WITH_MODES = f"{REFERENCE}+modes"
TRIES = 8  # forwards to find a threshold with
CLOSE = 0.003  # of a skip ratio
NEARLY_0 = 1e-30  # a threshold that skips nothing; at 0 itself the engine leaves everything to transformers

Forward = Callable[[], Tensor]


@dataclass(frozen=True)
class Scene:
    """One phase at one batch size.

    Attributes:
        tokens: of one forward. cached: bytes of keys and values that it reads.
        forward: what is captured. as_it_comes: what users of transformers run.
    """

    phase: Literal["prefill", "decode"]
    tokens: int
    batch: int
    cached: int
    forward: Forward
    as_it_comes: Forward


def bench_decoder(request: BenchRequest, name: str) -> Outcome[Bench]:
    """Time prefill and decode of a random decoder; writes bench.json.

    Raises:
        BadOption: no such shape, no such device, or not enough memory.
    """
    shape, device = decoder_shape(name), pick_device(request.device)
    machine = measure_machine(device, DTYPE)
    request.progress.start("weights", 1)
    decoder = RandomDecoder(shape, request.layers, device, request.data.seed)
    request.progress.advance()
    bench = _DecoderBench(decoder, request)
    with torch.inference_mode():
        cases = bench.measured()
    cost = Cost.of(decoder.model, find_moe_blocks(decoder.model), decoder.head)
    cached = {(scene.phase, scene.batch): scene.cached for scene in bench.scenes}

    def limit(case: Timed) -> float:
        read = cached[case.phase, case.batch]
        return cost.limit(case.tokens, case.skip_ratio, machine, logits=case.batch, cached=read)

    batch, tokens = shape.prefill
    artifact = Bench(
        model=ModelInfo(id=f"random:{name}", revision=None, digest=_digest(decoder.config.to_dict()), dtype="bfloat16"),
        data=DataInfo(
            source="random", split=None, samples=batch, seed=request.data.seed, digest=_digest([*shape.prefill, shape.context])
        ),
        options={
            "repeats": request.repeats,
            "batches": ",".join(map(str, request.batches)),
            "shape": name,
            "layers": decoder.config.num_hidden_layers,
            "prompt": tokens,
            "context": shape.context,
        },
        versions=versions(),
        cases=summarised(cases, limit),
        machine=machine,
        notes=bench.notes,
    )
    run = RunFolder(request.run)
    return Outcome(artifact, run.write(artifact))


class _DecoderBench:
    """Builds the cases of one decoder and measures them."""

    def __init__(self, decoder: RandomDecoder, request: BenchRequest) -> None:
        self._decoder, self._request, self._device = decoder, request, decoder.device
        self._graphs = decoder.device.type == "cuda"
        self._pool: Any = torch.cuda.graph_pool_handle() if self._graphs else None  # replayed in turn: one memory for all
        self.notes: list[str] = []
        self.scenes = [_prefill(decoder), *(_decode(decoder, batch) for batch in request.batches)]

    def measured(self) -> list[Timed]:
        """All cases, with their times."""
        repeats, progress = self._request.repeats, self._request.progress
        plain = [self._timed(scene, REFERENCE, 0.0, self._clock(scene.as_it_comes)) for scene in self.scenes]
        if self._graphs:  # without an engine in the model, so not in the same rounds as the rest
            progress.start("as it comes", repeats + 1)
            measure_rounds(plain, repeats, progress)
        captured_cases = [self._captured(scene, REFERENCE, 0.0) for scene in self.scenes] if self._graphs else []
        engine = SkipEngine(self._decoder.model, find_moe_blocks(self._decoder.model), TokenGroups((), ()))
        try:
            progress.start("thresholds", len(self.scenes) * len(RATIOS))
            with_modes = [self._with_modes(engine, scene, ratio) for scene in self.scenes for ratio in RATIOS]
            rounds = [case for case in (*captured_cases, *with_modes) if case is not None]
            rounds = rounds if self._graphs else plain + rounds
            progress.start("bench", repeats + 1)
            measure_rounds(rounds, repeats, progress)
        finally:
            engine.remove()
        return plain + rounds if self._graphs else rounds

    def _with_modes(self, engine: SkipEngine, scene: Scene, wanted: float) -> Timed | None:
        try:
            rule, ratio = self._rule(engine, scene, wanted)
            if abs(ratio - wanted) > 0.02:
                self._note(
                    f"{scene.phase}, batch {scene.batch}: {wanted:.0%} asked for, no threshold skips nearer than {ratio:.1%}"
                )
            case = self._captured(scene, WITH_MODES, ratio, engine, rule)
        except Exception as error:
            if is_memory(error):
                raise
            self._note(f"left out: {scene.phase}, batch {scene.batch}, {wanted:.0%} skipped: {first_line(error)}")
            return None
        finally:
            self._request.progress.advance()
        if wanted > 0 and (others := {i.reason for i in engine.implementations if i.name != "modes"}):
            self._note(f"{scene.phase}, batch {scene.batch}: transformers computed the kept pairs: {'; '.join(sorted(others))}")
        return case

    # -- one case ---------------------------------------------------------------------------------------------------

    def _captured(
        self, scene: Scene, runtime: str, ratio: float, engine: SkipEngine | None = None, rule: Rule | None = None
    ) -> Timed | None:
        """The case as a graph; where that fails, the skipped one launched one by one."""
        ready: Callable[[], None] = lambda: None  # noqa: E731
        if engine is None or rule is None:
            work: Callable[[], object] = scene.forward
        else:
            work = partial(_with_rule, engine, rule, scene.forward if self._graphs else scene.as_it_comes)
            if self._graphs:  # all graphs of an engine read their thresholds at one place: those of the last rule used
                ready = partial(engine.hand_over, rule, self._device)
        if not self._graphs:
            return self._timed(scene, runtime, ratio, self._clock(work))
        try:
            replay = captured([work], self._pool)
        except NotCaptured as error:
            self._note(f"no graph of {runtime}, {scene.phase}, batch {scene.batch}, {ratio:.0%} skipped: {error}")
            torch.cuda.synchronize(self._device)  # raises if the device is not usable any more
            return None if engine is None else self._timed(scene, runtime, ratio, self._clock(work))

        def measure() -> float:
            ready()
            return event_seconds(replay)

        return self._timed(scene, f"{runtime} (graph)", ratio, measure)

    def _clock(self, work: Callable[[], object]) -> Callable[[], float]:
        return lambda: timed(work, self._device)

    @staticmethod
    def _timed(scene: Scene, runtime: str, ratio: float, measure: Callable[[], float]) -> Timed:
        return Timed(scene.phase, scene.tokens, scene.batch, runtime, ratio, measure)

    def _rule(self, engine: SkipEngine, scene: Scene, wanted: float) -> tuple[Rule, float]:
        """One threshold for all layers that skips the wanted share, found from the quantiles of the router's own scores.

        What one layer skips changes what the next one routes, so the quantile is corrected by what was really skipped.
        """
        rule = self._threshold(NEARLY_0)
        if wanted == 0:
            return rule, _skipped(engine, rule, scene.forward)
        scores: list[Tensor] = []
        with engine.using(watch=lambda routing: scores.append(routing.pi.flatten())):
            scene.forward()
        sorted_scores = torch.cat(scores).sort().values
        quantile, best = wanted, (rule, 0.0)
        for _ in range(TRIES):
            place = min(max(round(quantile * len(sorted_scores)), 0), len(sorted_scores) - 1)
            rule = self._threshold(float(sorted_scores[place]))
            ratio = _skipped(engine, rule, scene.forward)
            if abs(ratio - wanted) < abs(best[1] - wanted):
                best = rule, ratio
            if abs(ratio - wanted) <= CLOSE:
                break
            quantile += wanted - ratio
        return best

    def _threshold(self, tau: float) -> Rule:
        scale = torch.ones(len(find_moe_blocks(self._decoder.model)), len(GROUPS))
        return Rule(scale.to(self._device), tau_vector({"text": tau}).to(self._device))

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self._request.progress.note(text)


def _prefill(decoder: RandomDecoder) -> Scene:
    batch, tokens = decoder.shape.prefill
    forward = partial(decoder.prefill, decoder.ids(batch, tokens), mrope_positions(batch, tokens, decoder.device))
    return Scene("prefill", batch * tokens, batch, 0, partial(_capturable, decoder, forward), forward)


def _decode(decoder: RandomDecoder, batch: int) -> Scene:
    """One step at the end of a context. As it comes, the cache grows by a token with every step."""
    context = decoder.shape.context
    cache = FilledCache(decoder.config, batch, context, decoder.device)
    inputs = decoder.ids(batch, 1), mrope_positions(batch, context, decoder.device)[:, :, -1:].contiguous()
    fixed, growing = partial(decoder.decode, *inputs, cache), partial(decoder.decode, *inputs, cache.growing())
    return Scene("decode", batch, batch, cache.bytes, partial(_capturable, decoder, fixed), growing)


def _capturable(decoder: RandomDecoder, forward: Forward) -> Tensor:
    with decoder.whole_attention():
        return forward()


def _with_rule(engine: SkipEngine, rule: Rule, forward: Forward) -> Tensor:
    with engine.using(rule=rule):
        return forward()


def _skipped(engine: SkipEngine, rule: Rule, forward: Forward) -> float:
    with engine.using(rule=rule) as counts:
        forward()
        return counts.skip_ratio()


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
