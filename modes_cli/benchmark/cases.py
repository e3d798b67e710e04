"""What is timed: prefill and decode of one batch, in PyTorch and in ONNX Runtime, full and skipped."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch

from modes_cli.artifacts.bench import Case
from modes_cli.data.sample import Sample
from modes_cli.models.inputs import Batch, prompt_batch
from modes_cli.progress import Progress
from modes_cli.runtime.ort_model import Floats, OrtModel
from modes_cli.runtime.torch_model import TorchRuntime
from modes_cli.skipping.policy import Rule
from modes_cli.timing import median, timed

DECODE_STEPS = 8
REFERENCE = "transformers"
STOCK = "onnxruntime MoE"  # the same graphs with com.microsoft.MoE
CPU = torch.device("cpu")


@dataclass
class Timed:
    """One case while it is being measured. `measure` returns the seconds of one forward."""

    phase: Literal["prefill", "decode"]
    tokens: int
    batch: int
    runtime: str
    skip_ratio: float
    measure: Callable[[], float]
    seconds: list[float] = field(default_factory=list)


def measure_rounds(cases: list[Timed], repeats: int, progress: Progress) -> None:
    """Fill `seconds` of all cases; the first round warms up and is not kept."""
    for repeat in range(repeats + 1):
        for case in cases:  # interleaved, so that a slow moment of the machine hits all alike
            seconds = case.measure()
            if repeat:
                case.seconds.append(seconds)
        progress.advance()


def summarised(cases: list[Timed], limit: Callable[[Timed], float]) -> list[Case]:
    """Medians, beside transformers with nothing skipped and beside `limit`: the least seconds a case can take."""
    base = {(c.phase, c.batch): median(c.seconds) for c in cases if c.runtime == REFERENCE and c.skip_ratio == 0}
    stock = {(c.phase, c.batch): median(c.seconds) for c in cases if c.runtime == STOCK}
    return [
        Case(
            phase=case.phase,
            tokens=case.tokens,
            batch=case.batch,
            runtime=case.runtime,
            skip_ratio=case.skip_ratio,
            seconds=median(case.seconds),
            speedup=base[case.phase, case.batch] / median(case.seconds),
            limit_fraction=limit(case) / median(case.seconds),
            over_stock=stock[case.phase, case.batch] / median(case.seconds) if stock else None,
        )
        for case in cases
    ]


def _clock(work: Callable[[], object], device: torch.device, steps: int = 1) -> Callable[[], float]:
    """Seconds of one of the `steps` that a call makes."""
    return lambda: timed(work, device) / steps


def torch_cases(runtime: TorchRuntime, samples: list[Sample]) -> list[Timed]:
    """transformers as it is, and with the rule in force. Decode takes the likeliest token that is text, so that all make the
    same steps: behind a short answer's end marker special tokens follow each other, which are never skipped.
    """
    batch, size, device = prompt_batch(runtime.loaded, samples), len(samples), runtime.loaded.device
    tokens = int(batch.inputs["attention_mask"].sum())
    cases = []
    for name, rule in ((REFERENCE, None), (f"{REFERENCE}+modes", runtime.rule)):
        prefill = partial(_torch_prefill, runtime, batch, rule)
        decode = partial(_torch_decode, runtime, batch, rule, prefill()[1])
        cases.append(Timed("prefill", tokens, size, name, prefill()[0], _clock(prefill, device)))
        cases.append(Timed("decode", size, size, name, decode(), _clock(decode, device, DECODE_STEPS)))
    return cases


def _torch_prefill(runtime: TorchRuntime, batch: Batch, rule: Rule | None) -> tuple[float, Any]:
    model: Any = runtime.loaded.model
    with torch.no_grad(), runtime.engine.using(rule=rule) as counts:
        out = model(**batch.inputs, use_cache=True, logits_to_keep=1)
        return counts.skip_ratio(), out


def _torch_decode(runtime: TorchRuntime, batch: Batch, rule: Rule | None, prefilled: Any) -> float:
    model: Any = runtime.loaded.model
    mask = batch.inputs["attention_mask"]
    rope = getattr(getattr(model, "model", model), "rope_deltas", None)
    tokens = runtime.loaded.tokens
    never = [*tokens.special_ids, *tokens.vision_ids, *tokens.audio_ids]
    cache, ids = prefilled.past_key_values, _text_token(prefilled.logits, never)
    if (extra := cache.get_seq_length() - mask.shape[1]) > 0:  # what an earlier call added
        cache.crop(-extra)
    with torch.no_grad(), runtime.engine.using(rule=rule) as counts:
        for step in range(1, DECODE_STEPS + 1):
            seen = torch.cat([mask, mask.new_ones(len(mask), step)], 1)
            place = seen.sum(1, keepdim=True) - 1
            positions = place if rope is None else (place + rope)[None].expand(3, -1, -1)
            out = model(input_ids=ids, attention_mask=seen, position_ids=positions, past_key_values=cache, use_cache=True)
            ids = _text_token(out.logits, never)
        return counts.skip_ratio()


def _text_token(logits: torch.Tensor, never: list[int]) -> torch.Tensor:
    """[B, 1]: the likeliest of the other tokens after the last row of [B, S, V]."""
    last = logits[:, -1].clone()
    last[:, never] = -torch.inf
    return last.argmax(-1, keepdim=True)


def ort_cases(model: OrtModel, samples: list[Sample], tau: Mapping[str, float] | None = None) -> list[Timed]:
    """The bundle with tau = 0 and with its own thresholds, or with `tau`."""
    nothing, own = model.tau({}), None if tau is None else model.tau(tau)
    return _ort_cases(model, samples, {"onnxruntime": nothing, "onnxruntime+modes": own})


def stock_cases(model: OrtModel, samples: list[Sample]) -> list[Timed]:
    """A decoder with stock operators, which computes every routed expert whatever tau says."""
    return _ort_cases(model, samples, {STOCK: model.tau({})})


def _ort_cases(model: OrtModel, samples: list[Sample], by_name: Mapping[str, Floats | None]) -> list[Timed]:
    prompts = model.prompts([sample.images for sample in samples], [sample.question for sample in samples])
    size, tokens = len(samples), int(prompts.attention_mask.sum())
    cases = []
    for name, tau in by_name.items():
        ratio = model.answer(prompts, 1, tau).counts.skip_ratio()
        cases.append(Timed("prefill", tokens, size, name, ratio, _clock(partial(model.prefilled, prompts, tau), CPU)))
        decode = partial(model.decode_steps, model.prefilled(prompts, tau), DECODE_STEPS, tau)
        cases.append(Timed("decode", size, size, name, decode().skip_ratio(), _clock(decode, CPU, DECODE_STEPS)))
    return cases
