"""A checkpoint's tensors under the names that the model has in memory, renamed and taken apart as transformers does on loading.

The rules are transformers' own, so that a bundle holds what `from_pretrained` would have made of the same files.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Transpose, WeightConverter, WeightRenaming, rename_source_key

from modes_cli.errors import UnknownLayout
from modes_cli.export.weights import Segment
from modes_cli.safetensors_header import Entry


def in_memory(source: Mapping[str, Entry], model: Any) -> tuple[dict[str, Entry], dict[str, Segment]]:
    """Names as in memory.

    Args:
        source: the checkpoint's tensors by the names its files have.
        model: of any device, a fake one included.

    Returns:
        the tensors that only change their name (those of single experts among them, which are stacked later), and those that
        are rows of another one (a fused query, key and value projection, say) or its transpose.

    Raises:
        UnknownLayout: two tensors would have the same name, or a tensor is taken apart in a way that is more than moving rows.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    # One source with several targets; experts, which are many sources of one target, are stacked in `weights`.
    splits = [t for t in converters if len(t.source_patterns) == 1 < len(t.target_patterns) and "*" not in t.source_patterns[0]]
    turned = [t for t in converters if len(t.source_patterns) == 1 and all(isinstance(op, Transpose) for op in t.operations)]
    shared = [t for t in converters if len(t.target_patterns) > 1 and "experts.*." in t.source_patterns[0]]
    sets = _sets(source, shared)
    wanted = model.state_dict()
    whole: dict[str, Entry] = {}
    rows: dict[str, Segment] = {}
    for name in sorted(source):  # some rules only apply after another one has, in this order
        renamed, _ = rename_source_key(name, renamings, [], model.base_model_prefix, wanted)
        renamed = _in_its_set(renamed, name, sets, shared)
        turn = next((t for t in turned if len(source[name].shape) == 2 and t.rename_source_key(renamed)[1] is not None), None)
        split = next((s for s in splits if s.rename_source_key(renamed)[1] is not None), None)
        parts = {} if split is None else _parts(split, renamed, source[name], model.config)
        if turn is not None:
            height, width = source[name].shape
            parts = {turn.rename_source_key(renamed)[0]: Segment(source[name], rows=height, cols=width)}
        if taken := sorted({renamed, *parts} & (whole.keys() | rows.keys())):
            raise UnknownLayout(f"the checkpoint holds `{taken[0]}` twice, once as `{name}`")
        rows |= parts
        if not parts:
            whole[renamed] = source[name]
    return whole, rows


_EXPERT = re.compile(r"(?<=experts\.)\d+(?=\.)")


def _sets(source: Iterable[str], shared: list[WeightConverter]) -> dict[str, int]:
    """Where several sets share one numbering of experts: how many experts each has, by what stands before the number."""
    if not shared:
        return {}
    last: dict[str, int] = {}
    for name in source:
        if (number := _EXPERT.search(name)) is not None:
            prefix = name[: number.start()]
            last[prefix] = max(last.get(prefix, 0), int(number[0]))
    return {prefix: -(-(most + 1) // len(shared[0].target_patterns)) for prefix, most in last.items()}


def _in_its_set(renamed: str, name: str, sets: dict[str, int], shared: list[WeightConverter]) -> str:
    """The name of one of many experts, below the set it belongs to and numbered there."""
    number, before = _EXPERT.search(renamed), _EXPERT.search(name)
    rule = next((t for t in shared if t.rename_source_key(renamed)[1] is not None), None)
    if rule is None or number is None or before is None:
        return renamed
    which, inside = divmod(int(number[0]), sets[name[: before.start()]])
    owner = rule.target_patterns[which].partition("experts.")[0]
    prefix = renamed[: number.start()].removesuffix("experts.")
    return f"{prefix}{owner}experts.{inside}{renamed[number.end() :]}"


def _parts(split: WeightConverter, name: str, entry: Entry, config: Any) -> dict[str, Segment]:
    """transformers' own operations, applied to the numbers of the rows instead of the rows."""
    first, _ = split.rename_source_key(name)
    count = entry.shape[0]
    numbers = torch.arange(count).reshape(count, *[1 for _ in entry.shape[1:]])
    found: dict[str, Any] = {split.source_patterns[0]: [numbers]}
    for operation in split.operations:
        found = operation.convert(
            found, source_patterns=split.source_patterns, target_patterns=split.target_patterns, config=config,
            full_layer_name=first, model=None, missing_keys=None,
        )  # fmt: skip
    parts = {}
    for target, value in found.items():
        order = value[0] if isinstance(value, list) else value
        if not isinstance(order, Tensor) or order.shape[1:] != numbers.shape[1:] or order.dtype != numbers.dtype:
            raise UnknownLayout(
                f"the checkpoint's `{entry.name}` is taken apart in a way that is not understood",
                hint="this checkpoint's layout is not supported yet",
            )
        parts[first.replace(split.target_patterns[0], target)] = Segment(entry, order=tuple(order.flatten().tolist()))
    return parts
