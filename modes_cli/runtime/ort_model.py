"""Batched greedy generation from a bundle in ONNX Runtime."""

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from PIL.Image import Image

from modes_cli.errors import BadData, BadOption
from modes_cli.export.integrity import loading
from modes_cli.models.groups import bundled_groups, last_real, with_decode
from modes_cli.models.processor import load_processor
from modes_cli.models.templates import prompting
from modes_cli.runtime.answers import Answers
from modes_cli.runtime.positions import Ints, mrope_positions, text_positions
from modes_cli.runtime.providers import providers_for, uses_cuda
from modes_cli.runtime.session import EMBEDDING, VISION, decoder_name, open_graph
from modes_cli.skipping.policy import tau_vector
from modes_cli.skipping.statistics import PairCounts

Floats = NDArray[np.float32]
PREFILL, DECODE = 0, 1
_ELEMENTS = {"tensor(float)": 1, "tensor(float16)": 10, "tensor(bfloat16)": 16}  # ONNX's numbers; numpy has no bfloat16


@dataclass(frozen=True)
class Prompts:
    """A batch, padded on the left. B prompts, S tokens, N patches or tiles of the shape that the vision graph takes."""

    input_ids: Ints  # [B, S]
    attention_mask: Ints  # [B, S]
    pixel_values: Floats  # [N, ...]
    grids: Ints  # [images, 3] or [images, 2]: (frames,) rows and columns in patches; [0, 0] for tiles


@dataclass
class State:
    """Between two calls of the decoder: the cache and what describes it. OrtValues are never changed, so a copy is cheap."""

    past: list[Any]  # OrtValues [B, kv heads, P, head dim or value dim], keys and values in turn
    attention_mask: Ints  # [B, P]
    deltas: Ints  # [B, 1]: the next position less the number of real tokens
    logits: Floats  # [B, rows kept, V] of the last call
    kept: Ints | None  # [L, G] of the last call; None: the decoder skips nothing


class OrtModel:
    """The three graphs of a bundle with its processor, on a device: `cpu`, `cuda`, or `auto` (runtime/providers.py).

    Raises (on construction):
        BadArtifact: the bundle is damaged; nothing was loaded.
        BadOption: it has no graphs, or there is no such device here.
        KernelError: there are no kernels for the device.
    """

    def __init__(self, folder: Path, device: str = "auto", threads: int = 0) -> None:
        self.folder = folder
        with loading(folder) as self.bundle:
            providers = providers_for(device)
            names = (decoder_name(self.bundle, providers), EMBEDDING, VISION)
            self.decoder, self.embedding, self.vision = (
                open_graph(folder, self.bundle, name, providers, threads) for name in names
            )
            self.processor = load_processor(folder)
        self.tokens = bundled_groups(self.bundle)
        self.merge = int(getattr(self.processor.image_processor, "merge_size", 1))
        self._no_features = np.zeros((0, self.embedding.get_outputs()[0].shape[2]), np.float32)
        self._cache = "cuda" if uses_cuda(providers) else "cpu"  # where keys and values stay between steps
        self._read_names()

    def _read_names(self) -> None:
        self._inputs = {value.name for value in self.decoder.get_inputs()} | {
            value.name
            for value in self.decoder.get_overridable_initializers()  # those with a default
        }
        self._outputs = [output.name for output in self.decoder.get_outputs()]
        self._pasts = [name.replace("present.", "past_key_values.") for name in self._outputs if name.startswith("present.")]
        self._cached = _ELEMENTS[next(value.type for value in self.decoder.get_inputs() if value.name == self._pasts[0])]

    def with_decoder(self, decoder: ort.InferenceSession) -> "OrtModel":
        """The same with another decoder, which may lack what only skipping needs: input_ids, tau, kept_pairs."""
        other = copy.copy(self)
        other.decoder = decoder
        other._read_names()
        return other

    # -- prompts ----------------------------------------------------------------------------------------------------

    def prompts(self, images: Sequence[Sequence[Image]], questions: Sequence[str]) -> Prompts:
        """The chat that asks each question about its images, as tokens and patches."""
        if not questions or len(images) != len(questions):
            raise BadData(
                f"`{len(images)}` lists of images for `{len(questions)}` questions",
                hint="one list per question; it may be empty",
            )
        rows = [self._prompt(*pair) for pair in zip(images, questions, strict=True)]
        length = max(len(row["input_ids"]) for row in rows)
        ids = np.full((len(rows), length), self.bundle.pad_token_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, length - len(row["input_ids"]) :] = row["input_ids"]
            mask[index, length - len(row["input_ids"]) :] = 1
        pixels, *grids = (self._gather(value.name, value.shape, rows) for value in self.vision.get_inputs())
        grid = grids[0] if grids else np.zeros((0, 0))
        return Prompts(ids, mask, pixels.astype(np.float32), grid.astype(np.int64))

    def _gather(self, name: str, shape: list[Any], rows: list[dict[str, NDArray[Any]]]) -> NDArray[Any]:
        """What the vision graph takes as `name`, of all prompts: [N, ...]."""
        found = [row[name] for row in rows if name in row]
        for value in found:
            if list(value.shape[1:]) != shape[1:]:
                raise BadData(
                    f"the processor makes `{name}` of shape {list(value.shape)}, the vision graph takes {shape}",
                    hint="the processor's files are not those that the bundle was exported with",
                )
        return np.concatenate(found) if found else np.zeros((0, *shape[1:]))

    def _prompt(self, images: Sequence[Image], question: str) -> dict[str, NDArray[Any]]:
        content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
        chat = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
        with prompting(f"`{question}`"):
            encoded = self.processor.apply_chat_template(
                chat, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        arrays: dict[str, NDArray[Any]] = {
            name: value.numpy() for name, value in encoded.items() if isinstance(value, torch.Tensor)
        }
        return arrays | {"input_ids": arrays["input_ids"][0]}

    # -- running ----------------------------------------------------------------------------------------------------

    def image_features(self, pixel_values: Floats, grids: Ints) -> Floats:
        """[M, (1 + n) * H]; M is 0 without images."""
        pixels, *grid = (value.name for value in self.vision.get_inputs())
        if not grid:  # tile by tile: memory for attention within one of them only
            tiles = [self.vision.run(None, {pixels: tile[None]})[0] for tile in pixel_values]
            return np.concatenate([self._no_features, *tiles])
        parts, patch = [self._no_features], 0
        for *frames, height, width in grids.tolist():
            # Frame by frame where the model allows it: attention over packed images is one square mask, and time grows with
            # its square.
            at_once = frames if self.bundle.decoder.frames_together else [1 for _ in frames]
            one, count = np.array([[*at_once, height, width]], dtype=np.int64), math.prod(at_once) * height * width
            for _ in range(math.prod(frames) // math.prod(at_once)):
                feeds = {pixels: pixel_values[patch : patch + count], grid[0]: one}
                parts.append(self.vision.run(None, feeds)[0])
                patch += count
        return np.concatenate(parts)

    def empty_state(self, batch: int) -> State:
        """The cache before the first token."""
        info = self.bundle.decoder
        widths = {"key": info.head_dim, "value": info.value_dim or info.head_dim}
        shapes = [(batch, info.kv_heads, 0, widths[name.rpartition(".")[2]]) for name in self._pasts]
        past = [ort.OrtValue.ortvalue_from_shape_and_type(shape, self._cached) for shape in shapes]
        nothing = np.zeros((batch, 0), np.int64)
        return State(past, nothing, np.zeros((batch, 1), np.int64), np.zeros((batch, 0, info.vocab_size), np.float32), nothing)

    def step(
        self,
        state: State,
        ids: Ints,
        mask: Ints,
        positions: Ints,
        features: Floats,
        tau: Floats | None,
        logits_to_keep: int = 1,
    ) -> None:
        """Run S more tokens and move `state` on; keys and values never leave the runtime.

        Args:
            state: changed; holds the new logits and kept pairs.
            ids, mask: [B, S]; the mask is 0 at padding.
            positions: [3, B, S] or [B, S].
            features: [M, (1 + n) * H], one row per image token in `ids`.
            tau: [G], or None for the bundle's own.
            logits_to_keep: how many of the last rows of logits are computed; 0: all.
        """
        state.attention_mask = np.concatenate([state.attention_mask, mask], axis=1)
        embeds = self.embedding.run(None, {"input_ids": ids, "image_features": features})[0]
        binding = self.decoder.io_binding()
        feeds: dict[str, NDArray[Any]] = {
            "inputs_embeds": embeds,
            "attention_mask": state.attention_mask,
            "position_ids": np.ascontiguousarray(positions),
            "input_ids": np.ascontiguousarray(ids),
            "logits_to_keep": np.array([logits_to_keep], dtype=np.int64),
        }
        if tau is not None:
            feeds["tau"] = tau
        for name, array in feeds.items():
            if name not in self._inputs:
                continue
            # Not bind_cpu_input: it does not know inputs that have a default.
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for name, value in zip(self._pasts, state.past, strict=True):
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, self._cache if name.startswith("present.") else "cpu")
        self.decoder.run_with_iobinding(binding)
        found = dict(zip(self._outputs, binding.get_outputs(), strict=True))
        kept = found.get("kept_pairs")
        state.logits, state.kept = found["logits"].numpy(), None if kept is None else kept.numpy()
        state.past = [value for name, value in found.items() if name.startswith("present.")]

    def generate(
        self,
        images: Sequence[Sequence[Image]],
        questions: Sequence[str],
        max_new_tokens: int = 128,
        tau: Mapping[str, float] | None = None,
    ) -> Answers:
        """Answer each question about its images, greedily, as one batch.

        Args:
            images: per question; may be empty.
            questions: the users' texts.
            max_new_tokens: longest answer, at least 1.
            tau: thresholds per group instead of the bundle's own.

        Raises:
            BadData: a prompt that cannot be made.
            BadOption: a threshold for no group, or negative.
        """
        if max_new_tokens < 1:
            raise BadOption(f"`--max-new-tokens {max_new_tokens}` leaves nothing to generate")
        return self.answer(self.prompts(images, questions), max_new_tokens, None if tau is None else self.tau(tau))

    def tau(self, thresholds: Mapping[str, float]) -> Floats:
        """[G] from thresholds by group; groups that are not named are never skipped. Raises BadOption."""
        values: Floats = tau_vector(thresholds).numpy()
        return values

    def answer(self, prompts: Prompts, max_new_tokens: int, tau: Floats | None) -> Answers:
        """As `generate`, from prompts that were prepared."""
        started = time.perf_counter()
        counts = PairCounts(len(self.bundle.moe_layers))
        state = self.prefilled(prompts, tau)
        self._count(counts, PREFILL, prompts.input_ids, prompts.attention_mask, state.kept)
        prefilled = time.perf_counter()
        tokens: list[list[int]] = [[] for _ in prompts.input_ids]
        running = np.ones((len(tokens), 1), dtype=np.int64)
        for number in range(max_new_tokens):
            ids = state.logits[:, -1].argmax(-1).astype(np.int64)[:, None]
            running[np.isin(ids, self.bundle.eos_token_ids)] = 0
            for row in np.flatnonzero(running):
                tokens[row].append(int(ids[row, 0]))
            if not running.any() or number + 1 == max_new_tokens:
                break
            # A finished row goes on as padding: it costs no experts and is not counted.
            ids = np.where(running != 0, ids, self.bundle.pad_token_id)
            self.next_token(state, ids, running, tau)
            self._count(counts, DECODE, ids, running, state.kept)
        decoded = time.perf_counter()
        texts = self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return Answers(texts, tokens, counts, prefilled - started, decoded - prefilled)

    def prefilled(self, prompts: Prompts, tau: Floats | None) -> State:
        """The state after the prompts, with the logits of their last token."""
        features = self.image_features(prompts.pixel_values, prompts.grids)
        positions, deltas = self.positions(prompts)
        state = self.empty_state(len(prompts.input_ids))
        state.deltas = deltas
        self.step(state, prompts.input_ids, prompts.attention_mask, positions, features, tau)
        return state

    def decode_steps(self, state: State, steps: int, tau: Floats | None) -> PairCounts:
        """Generate exactly so many tokens of text per row, and leave `state` as it is: for measuring."""
        counts = PairCounts(len(self.bundle.moe_layers))
        state = replace(state)
        running = np.ones_like(state.deltas)
        never = [*self.tokens.special_ids, *self.tokens.vision_ids, *self.tokens.audio_ids]
        for _ in range(steps):
            logits = state.logits[:, -1].copy()
            logits[:, never] = -np.inf
            ids = logits.argmax(-1).astype(np.int64)[:, None]
            self.next_token(state, ids, running, tau)
            self._count(counts, DECODE, ids, running, state.kept)
        return counts

    def next_token(self, state: State, ids: Ints, running: Ints, tau: Floats | None) -> None:
        """One more token per row: `ids` [B, 1], `running` [B, 1] is 0 for rows that have ended."""
        place = np.where(running != 0, state.attention_mask.sum(1, keepdims=True) + state.deltas, 0)
        positions = place if self.bundle.decoder.position_rows == 1 else np.broadcast_to(place, (3, *place.shape))
        self.step(state, ids, running, positions, self._no_features, tau)

    def positions(self, prompts: Prompts) -> tuple[Ints, Ints]:
        """position_ids of the prompts, and [B, 1]: the next position less the number of real tokens."""
        if self.bundle.decoder.position_rows == 1:
            return text_positions(prompts.attention_mask), np.zeros((len(prompts.input_ids), 1), np.int64)
        ids = self.bundle.vision_token_ids
        return mrope_positions(prompts.input_ids, prompts.attention_mask, prompts.grids, ids, self.merge)

    def _count(self, counts: PairCounts, phase: int, ids: Ints, mask: Ints, kept: Ints | None) -> None:
        real = torch.from_numpy(np.ascontiguousarray(mask)) != 0
        group = with_decode(self.tokens.of(torch.from_numpy(np.ascontiguousarray(ids))), last_real(real))[real]
        total = torch.bincount(group.long(), minlength=len(self.bundle.groups)) * self.bundle.top_k
        counts.total[phase] += total
        counts.kept[phase] += total if kept is None else torch.from_numpy(kept)
