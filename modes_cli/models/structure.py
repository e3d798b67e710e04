"""What a checkpoint's model is made of, from its configuration and the headers of its files: no weight is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from modes_cli.errors import UnknownLayout
from modes_cli.models.blocks import MoEBlock, find_moe_blocks
from modes_cli.models.checkpoint import checkpoint_files
from modes_cli.safetensors_header import Entry, merged, parse_header

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Structure:
    """A model without weights, and where its weights are.

    Attributes:
        model: its parameters are on the meta device, in the dtype asked for.
        layers: module path of the list of decoder layers.
        source: the checkpoint's tensors, by the names its files have.
        place: the same names -> the (first) tensor of the model that each becomes a part of.
    """

    model: PreTrainedModel
    dtype: torch.dtype
    blocks: list[MoEBlock]
    layers: str
    source: dict[str, Entry]
    place: dict[str, str]

    def layer_of(self, tensor: str) -> int | None:
        """The decoder layer that a tensor of the model belongs to; None outside them."""
        prefix, _, rest = tensor.partition(f"{self.layers}.")
        number = rest.partition(".")[0]
        return int(number) if not prefix and number.isdigit() else None


def read_structure(folder: Path, config: Any, dtype: torch.dtype, *, text_only: bool, trust_remote_code: bool) -> Structure:
    """Raises BadModel, UnknownLayout: there are no MoE layers, or none that are understood."""
    architecture: Any = AutoModelForCausalLM if text_only else AutoModelForImageTextToText
    with torch.device("meta"):
        model = architecture.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    blocks = find_moe_blocks(model)
    source = merged([parse_header(path, path.stat().st_size) for path in checkpoint_files(folder)])
    return Structure(model, dtype, blocks, _layers_of(model, blocks), source, _places(source, model))


def _layers_of(model: torch.nn.Module, blocks: list[MoEBlock]) -> str:
    path = blocks[0].name.split(".layers.")[0] + ".layers"
    layers = model.get_submodule(path)
    if not isinstance(layers, torch.nn.ModuleList):
        raise UnknownLayout(f"`{path}` is a `{type(layers).__name__}`, not a list of layers")
    return path


def _places(source: Mapping[str, Entry], model: Any) -> dict[str, str]:
    """By transformers' own rules, as it applies them while it loads."""
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    wanted, prefix = model.state_dict(), model.base_model_prefix
    place = {}
    for name in sorted(source):
        renamed, _ = rename_source_key(name, renamings, converters, prefix, wanted)
        if renamed not in wanted and name in wanted:
            renamed, _ = rename_source_key(name, [], [], prefix, wanted)
        place[name] = renamed
    return place
