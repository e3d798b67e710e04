"""A model that has every shape and no weights: what the exporter traces, whatever the model's size."""

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.initialization import no_init_weights

from modes_cli.errors import UnknownLayout


def build(
    config: Any, *, text_only: bool = False, trust_remote_code: bool = False, graphs: bool = True
) -> tuple[FakeTensorMode, PreTrainedModel]:
    """The model of a configuration with fake float32 parameters. Example inputs must be made in the same mode.

    Buffers that a checkpoint does not hold (rotary frequencies) are real: they end in the graph. Without `graphs` nobody
    needs them.

    Raises:
        UnknownLayout: a module has such a buffer and cannot be made again from its configuration.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    architecture = AutoModelForCausalLM if text_only else AutoModelForImageTextToText
    with mode, no_init_weights():  # there is nothing to fill with random numbers, and some ways of doing so look at them
        model: PreTrainedModel = architecture.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    model.tie_weights()
    model.eval()
    for name, module in model.named_modules() if graphs else ():
        _make_buffers_real(name, module, _config(model, name))
    return mode, model


def _config(model: nn.Module, name: str) -> Any:
    """The configuration of a module, or of the nearest one around it that has one."""
    while (config := getattr(model.get_submodule(name), "config", None)) is None and name:
        name = name.rpartition(".")[0]
    return config


def _make_buffers_real(name: str, module: nn.Module, config: Any) -> None:
    lacking = [
        key
        for key, value in module._buffers.items()
        if isinstance(value, FakeTensor) and key in module._non_persistent_buffers_set
    ]
    if not lacking:
        return
    try:
        real = type(module)(config)
    except Exception as error:  # whatever a foreign constructor raises, the answer is the same
        label = f"`{name}` (`{type(module).__name__}`)"
        raise UnknownLayout(
            f"{label} has buffers that no checkpoint holds, and cannot be made from its configuration"
        ) from error
    for key in lacking:
        value = real._buffers.get(key)
        if value is None or value.shape != _buffer(module, key).shape:
            raise UnknownLayout(f"buffer `{key}` of `{name}` (`{type(module).__name__}`) cannot be made from its configuration")
        module._buffers[key] = value


def _buffer(module: nn.Module, key: str) -> Tensor:
    value = module._buffers[key]
    assert value is not None
    return value


def wanted_tensors(model: nn.Module) -> tuple[dict[str, tuple[int, ...]], frozenset[str]]:
    """Shapes of everything a checkpoint must hold, and the names among them that are tied to another one."""
    shapes: dict[str, tuple[int, ...]] = {}
    first: dict[int, str] = {}
    tied = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        shapes[name] = tuple(tensor.shape)
        if id(tensor) in first:
            tied |= {name, first[id(tensor)]}
        first.setdefault(id(tensor), name)
    return shapes, frozenset(tied)


def keep_only(model: nn.Module, paths: list[str]) -> nn.Module:
    """A tree with only the given submodules at their own places, so that parameter names stay the checkpoint's."""
    root = nn.Module()
    for path in paths:
        owner = root
        *parents, leaf = path.split(".")
        for parent in parents:
            if not hasattr(owner, parent):
                owner.add_module(parent, nn.Module())
            owner = owner.get_submodule(parent)
        owner.add_module(leaf, model.get_submodule(path))
    return root


def narrow(model: nn.Module, mode: FakeTensorMode, dtype: torch.dtype) -> None:
    """Give all parameters another dtype, ties kept. Buffers (rotary frequencies, a router's biases) stay as they are."""
    made: dict[int, nn.Parameter] = {}
    with mode:
        for module in model.modules():
            for key, value in module._parameters.items():
                if value is not None:
                    module._parameters[key] = made.setdefault(id(value), nn.Parameter(value.to(dtype), requires_grad=False))
