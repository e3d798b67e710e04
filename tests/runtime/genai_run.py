"""Asking onnxruntime-genai, the released package, and transformers the same questions."""

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
import torch
from PIL import Image

from modes_cli.data.sample import Sample
from modes_cli.models.inputs import end_ids, prompt_batch
from modes_cli.models.loading import Loaded

LONGEST = 16  # generated tokens; no answer of the built-in model is longer


class Genai:
    """A bundle in onnxruntime-genai, with nothing of ours but the folder."""

    def __init__(self, folder: Path, graph: str | None = None, *, share: bool = False) -> None:
        """`graph`: another decoder graph of the folder than its own choice. `share`: one buffer for past and present."""
        config = og.Config(str(folder))
        settings: dict[str, Any] = {"decoder": {"session_options": {"intra_op_num_threads": 1}}}
        if graph is not None:
            settings["decoder"]["filename"] = graph
        config.overlay(json.dumps({"model": settings, "search": {"past_present_share_buffer": share}}))
        self.model = og.Model(config)
        self.processor, self.tokenizer = self.model.create_multimodal_processor(), og.Tokenizer(self.model)

    def prompt(self, sample: Sample) -> Any:
        content = [*({"type": "image"} for _ in sample.images), {"type": "text", "text": sample.question}]
        chat = json.dumps([{"role": "user", "content": content}])
        text = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True)
        images = og.Images.open_bytes(*map(png, sample.images)) if sample.images else None
        return self.processor(text, images=images)

    def answer(self, sample: Sample) -> list[int]:
        """Greedy tokens, without the end token."""
        (tokens,), _ = self.generate(self.prompt(sample), 1)
        return tokens

    def generate(self, inputs: Any, batch: int, steps: int = LONGEST) -> tuple[list[list[int]], np.ndarray]:
        """Tokens of each row up to its end token, and the logits [B, steps, V] that they were chosen from."""
        parameters = og.GeneratorParams(self.model)
        parameters.set_search_options(batch_size=batch, max_length=512)
        generator = og.Generator(self.model, parameters)
        generator.set_inputs(inputs)
        tokens, logits = [], []
        for _ in range(steps):
            if generator.is_done():
                break
            logits.append(np.array(generator.get_logits()).reshape(batch, -1))
            generator.generate_next_token()
            tokens.append(np.array(generator.get_next_tokens()))
        ends = self.tokenizer.eos_token_ids
        return [until_end(row, ends) for row in np.stack(tokens, 1).tolist()], np.stack(logits, 1)

    def together(self, samples: Sequence[Sample]) -> Any:
        """Prompts as one batch, padded on the left. Its processor makes one prompt at a time."""
        rows = [self.prompt(sample) for sample in samples]
        ids = [row["input_ids"].as_numpy()[0] for row in rows]
        length = max(map(len, ids))
        tensors = og.NamedTensors()
        pad = self.tokenizer.pad_token_id
        padded = [np.concatenate([np.full(length - len(row), pad), row]) for row in ids]
        tensors["input_ids"] = np.stack(padded).astype(np.int32)
        shown = [row for row in rows if "pixel_values" in row.keys()]  # noqa: SIM118 - not a dict
        tensors["num_image_tokens"] = np.array([row["num_image_tokens"].as_numpy().sum() for row in rows], np.int64)
        for name, dtype in (("pixel_values", np.float32), ("image_grid_thw", np.int64)):
            tensors[name] = np.concatenate([row[name].as_numpy() for row in shown]).astype(dtype)
        return tensors


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def until_end(row: Iterable[int], ends: Sequence[int]) -> list[int]:
    tokens = []
    for token in row:
        if token in ends:
            break
        tokens.append(int(token))
    return tokens


def ask_transformers(loaded: Loaded, samples: Sequence[Sample], batch: int = 10) -> list[list[int]]:
    """Greedy tokens of each sample up to its end token."""
    found = []
    for start in range(0, len(samples), batch):
        inputs = prompt_batch(loaded, samples[start : start + batch]).inputs
        with torch.no_grad():
            out = loaded.model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)
        found += [until_end(row, end_ids(loaded)) for row in out[:, inputs["input_ids"].shape[1] :].tolist()]
    return found
