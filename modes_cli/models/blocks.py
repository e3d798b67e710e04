"""Finding the routed experts of a model, by shape and not by name."""

import inspect
import re
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from torch import Tensor, nn

from modes_cli.errors import BadModel, UnknownLayout
from modes_cli.models.layouts import LAYOUTS, Layout

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True)
class MoEBlock:
    """The experts of one MoE layer: one set, or several that share its tokens between them (`sets`).

    `experts(hidden [T, H], top_k_index [T, k], top_k_weights [T, k]) -> [T, H]` is the boundary everything works at:
    the router and shared experts stay outside. Weights are `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I], or with
    `transposed` [E, H, 2I] and [E, I, H].
    """

    layer: int  # decoder layer
    index: int  # among the MoE layers
    name: str  # module path of `experts` in the model
    experts: nn.Module
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    transposed: bool
    interleaved: bool
    has_bias: bool
    activation: str  # silu | gelu_tanh | swiglu_oai
    moe: str = ""  # module path of what owns the experts: router, shared experts, further sets
    layout: Layout | None = None  # None: the common form
    further: tuple["MoEBlock", ...] = ()  # the layer's other sets, with the same `layer` and `index`

    @property
    def sets(self) -> tuple["MoEBlock", ...]:
        return (self, *self.further)

    @property
    def scales_input(self) -> bool:
        """Whether a weight multiplies what goes into an expert, not what comes out."""
        return self.layout is not None and self.layout.scales_input


def find_moe_blocks(model: nn.Module) -> list[MoEBlock]:
    """The MoE layers of the decoder, in order. A vision tower's own experts are left alone.

    Raises:
        BadModel: there are none.
        UnknownLayout: something looks like routed experts but is of a form that is not understood.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]
    if decoder is None:
        raise BadModel(f"`{type(model).__name__}` has no decoder", hint="a generative model is needed")
    prefix = next((name for name, module in model.named_modules() if module is decoder), "")
    found: list[MoEBlock] = []
    layouts = _layouts(decoder)
    for name, module in decoder.named_modules():
        match = _LAYER.search(name)
        if match is None or not _looks_like_experts(name, module):
            continue
        path = f"{prefix}.{name}" if prefix else name
        moe, layout = layouts.get(name, (name.rpartition(".")[0], None))
        block = _describe(path, int(match.group(1)), module, _top_k(decoder, model), layout)
        found.append(replace(block, moe=f"{prefix}.{moe}" if prefix else moe, layout=layout))
    if not found:
        config: Any = getattr(model, "config", None)
        kind = getattr(config, "model_type", "?")
        raise BadModel(
            f"`{type(model).__name__}` (model type `{kind}`) has no MoE layers: no module with stacked expert weights",
            hint="skipping needs a Mixture-of-Experts model; a dense one has nothing to skip",
        )
    found.sort(key=lambda block: block.layer)
    layers = [tuple(sets) for _, sets in groupby(found, key=lambda block: block.layer)]
    return [_one_layer(model, index, sets) for index, sets in enumerate(layers)]


def _layouts(decoder: nn.Module) -> dict[str, tuple[str, Layout]]:
    """By the path of a set of experts: the path of its MoE module and that one's layout."""
    return {
        f"{name}.{path}": (name, layout)
        for name, module in decoder.named_modules()
        if (layout := LAYOUTS.get(type(module).__name__)) is not None
        for path in layout.sets
    }


def _one_layer(model: nn.Module, index: int, sets: tuple[MoEBlock, ...]) -> MoEBlock:
    first, *further = (replace(block, index=index) for block in sets)
    alike = {(block.moe, block.num_experts, block.top_k, block.hidden_size) for block in sets}
    if len(alike) != 1 or len(sets) != (1 if first.layout is None else len(first.layout.sets)):
        raise UnknownLayout(
            f"`{type(model).__name__}` has more than one set of experts in a layer", hint="this family is not supported yet"
        )
    return replace(first, further=tuple(further))


def _looks_like_experts(path: str, module: nn.Module) -> bool:
    # One module per expert, in a list: not understood, but not to be taken for a dense model either.
    if type(module).__name__.endswith("Experts") or (path.endswith(".experts") and isinstance(module, nn.ModuleList)):
        return True
    down = getattr(module, "down_proj", None)
    return isinstance(down, Tensor) and down.dim() == 3


def _top_k(decoder: nn.Module, model: nn.Module) -> int:
    for owner in (decoder, model):
        config: Any = getattr(owner, "config", None)
        config = getattr(config, "text_config", config)
        for field in ("num_experts_per_tok", "top_k_experts", "moe_k", "moe_topk", "num_experts_per_token"):
            value = getattr(config, field, None)
            if isinstance(value, int) and value > 0:
                return value
    raise UnknownLayout(f"the configuration of `{type(model).__name__}` does not say how many experts a token uses")


def _describe(path: str, layer: int, experts: nn.Module, top_k: int, layout: Layout | None) -> MoEBlock:
    label = f"`{type(experts).__name__}` at `{path}`"
    gate_up, down = getattr(experts, "gate_up_proj", None), getattr(experts, "down_proj", None)
    if not (isinstance(gate_up, Tensor) and isinstance(down, Tensor) and gate_up.dim() == 3 and down.dim() == 3):
        shapes = [f"{name} {tuple(p.shape)}" for name, p in experts.named_parameters()]
        shown = ", ".join([*shapes[:6], *(["..."] if len(shapes) > 6 else [])])
        raise UnknownLayout(
            f"{label} has parameters {shown}; needed are 3-D gate_up_proj and down_proj",
            hint="this family is not supported yet",
        )
    arguments = [p for p in inspect.signature(type(experts).forward).parameters if p != "self"]
    label += f" has gate_up_proj {tuple(gate_up.shape)} and down_proj {tuple(down.shape)}"
    if len(arguments) != (3 if layout is None else layout.arguments):
        raise UnknownLayout(f"{label} and takes ({', '.join(arguments)}); needed is (hidden, top_k_index, top_k_weights)")
    transposed = bool(getattr(experts, "is_transposed", False))
    if layout is not None and layout.transposed is not None:
        transposed = layout.transposed
    num_experts = gate_up.shape[0]
    hidden, double = (gate_up.shape[1], gate_up.shape[2]) if transposed else (gate_up.shape[2], gate_up.shape[1])
    expected = (num_experts, double // 2, hidden) if transposed else (num_experts, hidden, double // 2)
    if double % 2 or tuple(down.shape) != expected:
        raise UnknownLayout(f"{label}, which do not fit together")
    # Whether gate and up rows alternate is not visible in a shape; transformers says it on the class.
    interleaved = not bool(getattr(experts, "is_concatenated", True))
    has_bias = bool(getattr(experts, "has_bias", getattr(experts, "gate_up_proj_bias", None) is not None))
    return MoEBlock(
        layer,
        0,
        path,
        experts,
        num_experts,
        top_k,
        hidden,
        double // 2,
        transposed,
        interleaved,
        has_bias,
        _activation(experts, label),
    )


def _activation(experts: nn.Module, label: str) -> str:
    act = getattr(experts, "act_fn", None)
    if act is None and hasattr(experts, "limit") and hasattr(experts, "alpha"):
        return "swiglu_oai"
    name = type(act).__name__
    known = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh", "GELUTanhActivation": "gelu_tanh"}
    if name not in known:
        raise UnknownLayout(f"{label} and uses activation `{name}`; known are {', '.join(sorted(set(known)))}")
    return known[name]
