"""Running a model again from a layer on, bit for bit.

The real top-level forward is called every time; what changes is what its modules do. While recording, each decoder layer
keeps a copy of its output and each vision module its result. While replaying from layer l, layers before l - 1 hand their
input through, layer l - 1 returns its recorded output, and vision modules return their recorded result; masks, rotary
embeddings, DeepStack additions and the head are done by the model itself, so nothing family-specific is needed.

Layers that hand each other more than the hidden states (keys and values shared between layers) would miss it. That is not
concluded from names: `check` compares a replay with its recording, and where they differ whole forwards are run.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modes_cli.errors import UnknownLayout
from modes_cli.models.blocks import MoEBlock
from modes_cli.models.inputs import Batch
from modes_cli.models.layouts import replace_forward


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
        self._undo: list[Callable[[], None]] = []
        self._blocks = blocks
        self._whole: set[int] | None = None  # decoder layers that cannot be replayed from; None: not checked yet
        self._logits: Tensor | None = None
        self.layers = len(self._layers)
        self.layers_run = 0

    def __enter__(self) -> "Replay":
        for position, layer in enumerate(self._layers):
            self._undo.append(_wrap(layer, partial(self._layer, position)))
        for module in self._vision:
            self._undo.append(_wrap(module, partial(self._encode, module)))
        return self

    def __exit__(self, *_: object) -> None:
        while self._undo:
            self._undo.pop()()
        self._outputs, self._encoded, self._logits = [], {}, None

    def record(self, batch: Batch) -> Tensor:
        """A full forward, remembered. Returns logits at the answer positions: [answer tokens, V]."""
        self._start, self._outputs, self._encoded = None, [None] * self.layers, {}
        self._logits = answer_logits(self.model, batch)
        return self._logits

    def check(self, batch: Batch) -> None:
        """Once, after the first recording: find the MoE layers that a replay does not give the recorded bits from.

        What it runs is not counted in `layers_run`: it belongs to no measurement.

        Raises:
            UnknownLayout: not even a whole forward with recorded images gives them.
        """
        if self._whole is not None or self._logits is None:
            return
        before, recorded = self.layers_run, self._logits
        found = {block.layer for block in self._blocks if not self._gives(recorded, batch, block.layer)}
        if found and not self._gives(recorded, batch, 0):
            raise UnknownLayout(
                f"`{type(self.model).__name__}` does not give the same output twice for the same input",
                hint="importance cannot be measured by leaving experts out",
            )
        self._whole, self.layers_run = found, before

    def run(self, batch: Batch, layer: int) -> Tensor:
        """The recorded forward again, computing decoder layers from `layer` on."""
        self._start = 0 if self._whole and layer in self._whole else layer
        return answer_logits(self.model, batch)

    def differentiable(self, batch: Batch) -> Tensor:
        """The recorded forward again, from the first layer on, as a graph; call it where gradients are enabled.

        Each decoder layer keeps its inputs only and is computed again on the way back, one at a time; weights have no
        gradients. Vision modules return what was recorded.
        """
        self._start = 0
        with _without_gradients(self.model):
            return _answer_logits(self.model, batch)

    def _gives(self, recorded: Tensor, batch: Batch, layer: int) -> bool:
        try:
            return torch.equal(self.run(batch, layer), recorded)
        except (KeyError, IndexError, AttributeError, TypeError):  # what an earlier layer should have left is not there
            return False

    def _layer(self, position: int, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._start is None:
            self.layers_run += 1
            output = call(*args, **kwargs)
            self._outputs[position] = _clone(output)
            return output
        if position >= self._start:
            self.layers_run += 1
            if torch.is_grad_enabled():
                return checkpoint(call, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
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
    """Logits at a batch's answer positions, [answer tokens, V], rows in reading order.

    The head runs there only, in families that can be told to; the others give logits everywhere.
    """
    return _answer_logits(model, batch)


def _answer_logits(model: nn.Module, batch: Batch) -> Tensor:
    positions = batch.answer.any(0).nonzero(as_tuple=True)[0]
    out = model(**batch.inputs, logits_to_keep=positions, use_cache=False)
    everywhere = out.logits.shape[1] == batch.answer.shape[1]
    logits: Tensor = out.logits[batch.answer if everywhere else batch.answer[:, positions]]
    return logits


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """No parameter takes part in a graph that is built inside."""
    taking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in taking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in taking:
            parameter.requires_grad_(True)


def _clone(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.clone()
    return tuple(part.clone() if isinstance(part, Tensor) else part for part in output)


def _wrap(
    module: nn.Module, through: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
) -> Callable[[], None]:
    original = module.forward
    return replace_forward(module, lambda *args, **kwargs: through(original, args, kwargs))


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
