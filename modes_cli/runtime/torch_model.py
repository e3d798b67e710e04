"""A transformers model that skips: `modes.load`, `modes.skip_statistics`, and batched answering for evaluation."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from modes_cli.artifacts.bundle import FILE as BUNDLE_FILE
from modes_cli.data.sample import Sample
from modes_cli.errors import BadOption
from modes_cli.models.groups import GROUPS, TokenGroups, bundled_groups
from modes_cli.models.inputs import end_ids, prompt_batch
from modes_cli.models.loading import Loaded
from modes_cli.models.loading import load as load_checkpoint
from modes_cli.requests import ModelSpec
from modes_cli.run_folder import RunFolder
from modes_cli.runtime.answers import Answers
from modes_cli.search.calibrated import option, quantization, require_current
from modes_cli.search.selection import found_in, select
from modes_cli.skipping.engine import SkipEngine
from modes_cli.skipping.measured import Measured
from modes_cli.skipping.policy import Rule
from modes_cli.skipping.registry import from_result
from modes_cli.skipping.statistics import PHASES, PairCounts


def load(
    model_or_bundle: str | Path,
    tau: Mapping[str, float] | None = None,
    run: str | Path | None = None,
    *,
    target: float | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A transformers model that skips experts in `forward` and `generate` alike.

    Args:
        model_or_bundle: a model id, a checkpoint folder, `digits`, or a bundle that `modes export` wrote.
        tau: thresholds per group, e.g. {"text": 0.01, "vision": 0.02}; left out: the run's or the bundle's own.
        run: the run folder whose calibration and thresholds are used with a model; a bundle carries its own.
        target: which of the run's search results; left out: the only one, or the largest target.

    Raises:
        ModesError: see `modes_cli.errors`; nothing is ever skipped with thresholds of another model.
    """
    runtime = open_model(ModelSpec(str(model_or_bundle), None, dtype, device, trust_remote_code), run, target)
    rule = runtime.rule if tau is None else runtime.rule.with_tau(tau)
    runtime.engine.rule = rule
    runtime.engine.counts.reset()
    model: Any = runtime.loaded.model
    model._modes_engine = runtime.engine
    loaded: PreTrainedModel = model
    return loaded


def skip_statistics(model: PreTrainedModel) -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    """Kept and skipped pairs since the last call: {phase: {layer: {group: {"kept", "skipped"}}}}.

    Raises:
        BadOption: the model does not come from `modes.load`.
    """
    engine: SkipEngine | None = getattr(model, "_modes_engine", None)
    if engine is None:
        raise BadOption(f"`{type(model).__name__}` does not skip", hint="load it with `modes.load`")
    kept, total = engine.counts.kept.tolist(), engine.counts.total.tolist()
    engine.counts.reset()
    return {
        phase: {
            str(block.layer): {
                group: {"kept": kept[p][block.index][g], "skipped": total[p][block.index][g] - kept[p][block.index][g]}
                for g, group in enumerate(GROUPS)
            }
            for block in engine.blocks
        }
        for p, phase in enumerate(PHASES)
    }


@dataclass(frozen=True)
class TorchRuntime:
    """A loaded model, its engine, and the rule that its run or bundle found."""

    loaded: Loaded
    engine: SkipEngine
    rule: Rule

    def answer(self, samples: Sequence[Sample], max_new_tokens: int, rule: Rule | None) -> Answers:
        """Answer samples greedily, as one batch, skipping by `rule` (None: the unmodified model)."""
        batch = prompt_batch(self.loaded, samples)
        clock = _Clock()
        ends, pad = end_ids(self.loaded), self.loaded.tokenizer.pad_token_id
        self.engine.ended = tuple(ends if pad is None else [*ends, pad])  # a row that has ended goes on as padding
        with self.engine.using(rule=rule) as counts, torch.no_grad():
            started = time.perf_counter()
            model: Any = self.loaded.model
            out = model.generate(
                **batch.inputs, max_new_tokens=max_new_tokens, do_sample=False, stopping_criteria=StoppingCriteriaList([clock])
            )
            ended = time.perf_counter()
            kept = PairCounts(counts.layers)
            kept.kept, kept.total = counts.kept.clone(), counts.total.clone()
        tokens = [_until(row, set(ends)) for row in out[:, batch.inputs["input_ids"].shape[1] :].tolist()]
        texts = self.loaded.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return Answers(texts, tokens, kept, clock.first - started, ended - clock.first)

    def generate(
        self,
        images: Sequence[Sequence[Image]],
        questions: Sequence[str],
        max_new_tokens: int = 128,
        tau: Mapping[str, float] | None = None,
    ) -> Answers:
        """As `OrtModel.generate`."""
        samples = [
            Sample(str(i), tuple(pictures), question, "", "")
            for i, (pictures, question) in enumerate(zip(images, questions, strict=True))
        ]
        return self.answer(samples, max_new_tokens, self.rule if tau is None else self.rule.with_tau(tau))


class _Clock(StoppingCriteria):
    """Notes when the first token was chosen; stops nothing."""

    first = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.first = self.first or time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _until(tokens: list[int], end: set[int]) -> list[int]:
    return tokens[: next((i for i, token in enumerate(tokens) if token in end), len(tokens))]


def open_model(
    spec: ModelSpec, run: str | Path | None, target: float | None = None, decode_target: float | None = None
) -> TorchRuntime:
    """Load a model with the rule of its run folder, or a bundle with its own.

    Raises:
        MissingArtifact, StaleArtifact: the run has no thresholds, or not for this model.
        BadArtifact: the bundle is damaged.
    """
    folder = Path(spec.id)
    if os.path.lexists(folder / BUNDLE_FILE):  # whatever it is: checking says so
        return _open_bundle(spec, folder)
    where = RunFolder(run)
    thresholds, calibration = found_in(where)
    dtype = calibration.model.dtype if spec.dtype == "auto" else spec.dtype
    spec = replace(spec, dtype=dtype, special=option(calibration, "special", str), quantize=quantization(calibration))
    require_current(where, calibration, spec)
    rule = from_result(select(thresholds, target, decode_target), Measured(calibration, where))
    return _runtime(spec, rule)


def _open_bundle(spec: ModelSpec, folder: Path) -> TorchRuntime:
    from modes_cli.export.integrity import loading
    from modes_cli.export.thresholds import read_rule

    with loading(folder) as bundle:
        if bundle.quantization is not None:
            raise BadOption(
                f"`{folder}` has experts in {bundle.quantization.scheme}, which transformers cannot load",
                hint="it runs in ONNX Runtime; `modes.load` takes the run folder it was exported from",
            )
        dtype = bundle.model.dtype if spec.dtype == "auto" else spec.dtype
        return _runtime(replace(spec, dtype=dtype), read_rule(folder, bundle), bundled_groups(bundle))


def _runtime(spec: ModelSpec, rule: Rule, tokens: TokenGroups | None = None) -> TorchRuntime:
    loaded = load_checkpoint(spec)
    loaded = loaded if tokens is None else replace(loaded, tokens=tokens)
    return TorchRuntime(loaded, SkipEngine(loaded.model, loaded.blocks, loaded.tokens), rule)
