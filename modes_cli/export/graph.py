"""From a module that is traced on shapes to a small, clean ONNX graph. The same steps for decoder, vision and embedding."""

import contextlib
import gc
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from modes_cli.export import attention, grouped, norms, operator, rotary
from modes_cli.export.operator import DOMAIN, VERSION
from modes_cli.export.optimiser import optimise

OPSET = 23  # the first with Attention and RMSNormalization
IR_VERSION = 10
AUTO = torch.export.Dim.AUTO
Shape = list[str | int]


def trace(
    module: nn.Module, example: dict[str, Any], dynamic: dict[str, Any], inputs: dict[str, Shape], outputs: dict[str, Shape]
) -> ir.Model:
    """The ONNX graph of a module.

    Args:
        module: its parameters may be fake; initializers take their names.
        example: keyword inputs, fake or real.
        dynamic: which axes may vary, as torch.export wants it.
        inputs, outputs: names in order, with the shapes to be written into the graph.
    """
    with _quiet(), _nothing_collected(), torch.no_grad():
        program = torch.export.export(module, (), kwargs=example, dynamic_shapes=dynamic, strict=False)
        exported = torch.onnx.export(
            program,
            (),
            kwargs=example,
            input_names=list(inputs),
            output_names=list(outputs),
            custom_translation_table=_translations(),
            opset_version=OPSET,
            optimize=False,  # it would try to fold constants out of weights that do not exist
            dynamo=True,
            verbose=False,
        )
        assert exported is not None
        model = exported.model
        _optimise(model)
    _set_shapes(model, inputs | outputs)
    model.opset_imports[DOMAIN] = VERSION
    if any(node.domain == grouped.DOMAIN for node in model.graph):
        model.opset_imports[grouped.DOMAIN] = grouped.VERSION
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "modes", None
    return model


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What becomes of operators that only exist while tracing."""
    tables = (module.translation_table() for module in (attention, grouped, norms, operator, rotary))
    return {traced: made for table in tables for traced, made in table.items()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters log and warn about things that are meant to be so (fake weights)."""
    loggers = [
        logging.getLogger(name) for name in ("onnx_ir", "onnxscript", "torch.onnx", "torch.export", "torch.fx", "torch.__trace")
    ]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextlib.contextmanager
def _nothing_collected() -> Iterator[None]:
    """Tracing makes millions of objects that live until its end. Looking through them for garbage again and again takes a
    tenth of the time and finds little.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _optimise(model: ir.Model) -> None:
    """Optimised, with the weights hidden from constant folding, and without notes about where nodes came from."""
    for value in model.graph.initializers.values():
        if _is_fake(getattr(value.const_value, "raw", None)):
            value.const_value = None
    optimise(model)
    for node in model.graph.all_nodes():  # stack traces: nine tenths of the file
        node.metadata_props.clear()
        node.doc_string = None
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()


def _is_fake(tensor: object) -> bool:
    if isinstance(tensor, nn.Parameter) and isinstance(tensor.data, FakeTensor):
        return True
    return isinstance(tensor, FakeTensor) or (isinstance(tensor, Tensor) and tensor.is_meta)


def _set_shapes(model: ir.Model, shapes: dict[str, Shape]) -> None:
    """Readable names for the axes of inputs and outputs; the runtime infers what lies between."""
    outer = {id(value) for value in (*model.graph.inputs, *model.graph.outputs)}
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert value.name is not None
        value.shape = ir.Shape(shapes[value.name])
        value.metadata_props.clear()
    for node in model.graph.all_nodes():
        for value in node.outputs:
            value.metadata_props.clear()
            if id(value) not in outer:
                value.shape, value.type = None, None


def give_default(model: ir.Model, name: str, values: Tensor) -> None:
    """Make an input optional: an initializer of the same name is its value where nothing is fed."""
    value = next(value for value in model.graph.inputs if value.name == name)
    value.const_value = ir.tensor(values.numpy(), name=name)
    model.graph.register_initializer(value)
