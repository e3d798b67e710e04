"""From samples to model inputs: prompts for generating, prompts with their answers for measuring."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modes_cli.data.sample import Sample
from modes_cli.errors import BadData
from modes_cli.models.loading import DTYPES, Loaded
from modes_cli.models.templates import prompting

# Inputs with one entry per token; all others (pixels, grids) are concatenated over the batch.
_PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids")


@dataclass(frozen=True)
class Batch:
    """Inputs of a model's forward.

    Attributes:
        inputs: keyword arguments; `input_ids` and `attention_mask` are [B, S].
        answer: [B, S] bool, True at positions whose *next* token is a token of the answer (its end marker included). KL is
            read there. All False for generation prompts.
    """

    inputs: dict[str, Tensor]
    answer: Tensor

    @property
    def decoding(self) -> Tensor:
        """[B, S] bool: tokens from the one that predicts the answer's first on; the group `decode`, as far as they are text."""
        return self.answer.int().cumsum(1) > 0

    def to(self, device: torch.device) -> "Batch":
        return Batch({name: tensor.to(device) for name, tensor in self.inputs.items()}, self.answer.to(device))


def measuring_batch(loaded: Loaded, samples: Sequence[Sample]) -> Batch:
    """Prompts followed by their reference answers, padded on the right (a causal model's real positions do not see it)."""
    rows, answers = [], []
    for sample in samples:
        row = _prompt(loaded, sample)
        answer = _answer_ids(loaded, sample)
        prompt_length = row["input_ids"].shape[1]
        rows.append(_append(row, answer))
        mask = torch.zeros(1, prompt_length + len(answer), dtype=torch.bool)
        mask[0, prompt_length - 1 : -1] = True
        answers.append(mask)
    inputs = _collate(rows, loaded, left=False)
    length = inputs["input_ids"].shape[1]
    padded = [torch.nn.functional.pad(mask, (0, length - mask.shape[1])) for mask in answers]
    return Batch(inputs, torch.cat(padded)).to(loaded.device)


def prompt_batch(loaded: Loaded, samples: Sequence[Sample]) -> Batch:
    """Prompts padded on the left, ready for `generate`."""
    inputs = _collate([_prompt(loaded, sample) for sample in samples], loaded, left=True)
    return Batch(inputs, torch.zeros_like(inputs["input_ids"], dtype=torch.bool)).to(loaded.device)


def messages(sample: Sample) -> list[dict[str, Any]]:
    """The chat that asks a sample's question, images first."""
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in sample.images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": sample.question}]}]


def _prompt(loaded: Loaded, sample: Sample) -> dict[str, Tensor]:
    chat: Any = messages(sample)
    if not sample.images and loaded.processor is loaded.tokenizer:
        chat = [{"role": "user", "content": sample.question}]
    with prompting(f"sample `{sample.id}`"):
        encoded = loaded.processor.apply_chat_template(
            chat, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    return {name: value for name, value in encoded.items() if isinstance(value, Tensor)}


def _answer_ids(loaded: Loaded, sample: Sample) -> list[int]:
    ids = list(loaded.tokenizer(sample.answer, add_special_tokens=False)["input_ids"])
    if not ids:
        raise BadData(f"sample `{sample.id}`: the answer `{sample.answer}` has no tokens")
    return [*ids, end_ids(loaded)[0]]


def end_ids(loaded: Loaded) -> list[int]:
    """The tokens that end an answer; the first is the usual one."""
    end = loaded.model.generation_config.eos_token_id if loaded.model.generation_config else None
    end = loaded.tokenizer.eos_token_id if end is None else end
    return [end] if isinstance(end, int) else list(end)


def _append(row: dict[str, Tensor], ids: list[int]) -> dict[str, Tensor]:
    extra = torch.tensor([ids])
    fill = {"input_ids": extra, "attention_mask": torch.ones_like(extra)}
    return {
        name: torch.cat([value, fill.get(name, torch.zeros_like(extra)).to(value.dtype)], 1) if name in _PER_TOKEN else value
        for name, value in row.items()
    }


def _collate(rows: list[dict[str, Tensor]], loaded: Loaded, *, left: bool) -> dict[str, Tensor]:
    length = max(row["input_ids"].shape[1] for row in rows)
    pad = loaded.tokenizer.pad_token_id
    fill = {"input_ids": pad if pad is not None else end_ids(loaded)[0]}
    batch: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for row in rows for name in row):  # a sample without images has no pixels
        parts = []
        for row in rows:
            if name not in _PER_TOKEN:
                parts += [row[name]] if name in row else []
                continue
            part = row.get(name, torch.zeros_like(row["input_ids"]))
            room = length - part.shape[1]
            parts.append(torch.nn.functional.pad(part, (room, 0) if left else (0, room), value=fill.get(name, 0)))
        whole = torch.cat(parts)
        # Not every model turns pixels into its own type.
        batch[name] = whole.to(DTYPES[loaded.info.dtype]) if whole.is_floating_point() else whole
    return batch
