"""Running a model again from a layer on, bit for bit.

The real top-level forward is called every time; what changes is what its modules do. While recording, each decoder layer
keeps a copy of its output and each vision module its result. While replaying from layer l, layers before l - 1 hand their
input through, layer l - 1 returns its recorded output, and vision modules return their recorded result; masks, rotary
embeddings, DeepStack additions and the head are done by the model itself, so nothing family-specific is needed.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from modes_cli.errors import UnknownLayout
from modes_cli.models.blocks import MoEBlock
from modes_cli.models.inputs import Batch


class Replay:
    """Records one forward of a batch and repeats parts of it. Use `with Replay(model, blocks) as replay`.

    Attributes:
        layers_run: decoder layers run so far, recording included; `layers` is how many a full forward runs.
    """

    def __init__(self, model: nn.Module, blocks: list[MoEBlock]) -> None:
        self.model = model
        decoder = model.get_submodule(blocks[0].name.split(".layers.")[0])
        self._layers = _decoder_layers(decoder)
        self._vision = _vision_modules(model, decoder)
        self._outputs: list[Any] = []
        self._encoded: dict[nn.Module, Any] = {}
        self._start: int | None = None  # None: recording
        self.layers = len(self._layers)
        self.layers_run = 0

    def __enter__(self) -> "Replay":
        for position, layer in enumerate(self._layers):
            _wrap(layer, partial(self._layer, position))
        for module in self._vision:
            _wrap(module, partial(self._encode, module))
        return self

    def __exit__(self, *_: object) -> None:
        for module in [*self._layers, *self._vision]:
            module.__dict__.pop("forward", None)
        self._outputs, self._encoded = [], {}

    def record(self, batch: Batch) -> Tensor:
        """A full forward, remembered. Returns logits at the answer positions: [answer tokens, V]."""
        self._start, self._outputs, self._encoded = None, [None] * self.layers, {}
        return answer_logits(self.model, batch)

    def run(self, batch: Batch, layer: int) -> Tensor:
        """The recorded forward again, computing decoder layers from `layer` on."""
        self._start = layer
        return answer_logits(self.model, batch)

    def _layer(self, position: int, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._start is None:
            self.layers_run += 1
            output = call(*args, **kwargs)
            self._outputs[position] = _clone(output)
            return output
        if position >= self._start:
            self.layers_run += 1
            return call(*args, **kwargs)
        if position == self._start - 1:
            return _clone(self._outputs[position])
        recorded = self._outputs[position]
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden if isinstance(recorded, Tensor) else (hidden, *recorded[1:])

    def _encode(self, module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._start is None:
            self._encoded[module] = call(*args, **kwargs)
        return copy.copy(self._encoded[module])  # callers set fields of the object they get


@torch.no_grad()
def answer_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits at a batch's answer positions, [answer tokens, V], rows in reading order. The head runs there only."""
    positions = batch.answer.any(0).nonzero(as_tuple=True)[0]
    out = model(**batch.inputs, logits_to_keep=positions, use_cache=False)
    logits: Tensor = out.logits[batch.answer[:, positions]]
    return logits


def _clone(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.clone()
    return tuple(part.clone() if isinstance(part, Tensor) else part for part in output)


def _wrap(module: nn.Module, through: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]) -> None:
    original = module.forward
    module.forward = lambda *args, **kwargs: through(original, args, kwargs)


def _decoder_layers(decoder: nn.Module) -> list[nn.Module]:
    layers = decoder.get_submodule("layers")
    if not isinstance(layers, nn.ModuleList):
        raise UnknownLayout(f"the layers of `{type(decoder).__name__}` are a `{type(layers).__name__}`, not a list of layers")
    return list(layers)


def _vision_modules(model: nn.Module, decoder: nn.Module) -> list[nn.Module]:
    """Modules beside the decoder whose result does not depend on it: vision towers and projectors. A text model has none."""
    base: nn.Module = getattr(model, "model", model)
    inside = set(decoder.modules())
    return [
        child
        for child in base.children()
        if not isinstance(child, (nn.Embedding, nn.Linear))
        and any(True for _ in child.parameters())
        and not any(module in inside for module in child.modules())
    ]
