"""Decoder layers that are in memory only while they run, so that a model larger than memory still runs: `--offload`.

A layer's weights are read from the checkpoint's files when the layer is called and freed when it returns. Renaming,
stacking and transposing are transformers' own, so the bits are those of a model loaded whole. Everything outside the
decoder layers (embeddings, head, vision tower) stays in memory.
"""

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from modes_cli.errors import BadArtifact, BadModel
from modes_cli.models.structure import TORCH_DTYPES, Structure
from modes_cli.safetensors_header import Entry


class _Absent:
    """A tensor of the checkpoint that is not to be read: shape and dtype for transformers' checks and conversions."""

    def __init__(self, entry: Entry) -> None:
        self.shape, self.dtype = entry.shape, TORCH_DTYPES[entry.dtype]

    def __getitem__(self, _: object) -> "_Absent":
        return self

    def to(self, device: object = None, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(self.shape, dtype=dtype or self.dtype, device="meta")


def load_offloaded(
    structure: Structure, folder: Path, config: Any, device: torch.device
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, its decoder layers without weights until they are called, and what transformers reports of the loading.

    Raises:
        BadModel: its weights are quantized; beside this, what `from_pretrained` raises.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise BadModel(
            "quantized weights cannot be read layer by layer", hint="`--offload` needs a checkpoint without quantization"
        )
    dtype = structure.dtype
    layer_of = {name: structure.layer_of(place) for name, place in structure.place.items()}
    with _opened([entry for name, entry in structure.source.items() if layer_of[name] is None]) as state:
        state |= {name: _Absent(entry) for name, entry in structure.source.items() if layer_of[name] is not None}
        kind: Any = type(structure.model)
        loaded: tuple[Any, dict[str, Any]] = kind.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
        model, report = loaded
    if (folder / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.config.name_or_path = str(folder)
    _move_what_is_there(model, device)
    by_layer: dict[int, list[Entry]] = {}
    for name, number in layer_of.items():
        if number is not None:
            by_layer.setdefault(number, []).append(structure.source[name])
    settings = LoadStateDictConfig(
        device_map={"": device},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=cast(Any, get_model_conversion_mapping(model)),
    )
    for number, layer in enumerate(model.get_submodule(structure.layers)):
        _Streamed(model, layer, by_layer.get(number, []), settings).install()
    return model, report


class _Streamed:
    """One decoder layer, read when it is called."""

    def __init__(self, model: PreTrainedModel, layer: nn.Module, entries: list[Entry], settings: LoadStateDictConfig) -> None:
        self._model, self._layer, self._entries, self._settings = model, layer, entries, settings
        modules = list(layer.modules())
        # What is on the meta device now is what the files hold; the rest (rotary tables) stays.
        self._parameters = [(m, name, p) for m in modules for name, p in m._parameters.items() if p is not None and p.is_meta]
        self._buffers = [(m, name, b) for m in modules for name, b in m._buffers.items() if b is not None and b.is_meta]

    def install(self) -> None:
        call = self._layer.forward

        @functools.wraps(call)
        def forward(*args: Any, **kwargs: Any) -> Any:
            try:
                self._read()
                return call(*args, **kwargs)
            finally:
                self._free()

        self._layer.forward = forward

    def _read(self) -> None:
        with _opened(self._entries) as state, _without_bars():
            info, _ = convert_and_load_state_dict_in_model(self._model, state, self._settings)
        for module, name, _ in (*self._parameters, *self._buffers):
            found: Any = getattr(module, name)
            if found.is_meta:
                reason = "; ".join(map(str, info.conversion_errors.values())) or "it is not there any more"
                raise BadArtifact(str(self._entries[0].file), f"tensor `{name}`", reason, hint="fetch it again")
            found.requires_grad_(False)

    def _free(self) -> None:
        for module, name, parameter in self._parameters:
            module._parameters[name] = parameter
        for module, name, buffer in self._buffers:
            module._buffers[name] = buffer


def _move_what_is_there(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and not parameter.is_meta:
                parameter.data = parameter.data.to(device)
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)


@contextmanager
def _opened(entries: list[Entry]) -> Iterator[dict[str, Any]]:
    """Tensors by name, mapped. Files are opened anew each time: a mapping keeps every page it has touched."""
    with ExitStack() as stack:
        files = {}
        for file in sorted({entry.file for entry in entries}):
            try:
                files[file] = stack.enter_context(safe_open(file, framework="pt"))
            except SafetensorError as error:
                raise BadArtifact(str(file), "content", str(error), hint="fetch it again") from error
        yield {entry.name: files[entry.file].get_slice(entry.name) for entry in entries}


@contextmanager
def _without_bars() -> Iterator[None]:
    """A progress bar for every layer would drown the command's own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
