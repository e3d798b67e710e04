"""Everything that an export reads and decides before it writes the first byte."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from modes_cli.artifacts import Thresholds
from modes_cli.artifacts.base import ModelInfo
from modes_cli.artifacts.thresholds import SearchResult
from modes_cli.errors import BadModel
from modes_cli.export import skeleton, weights
from modes_cli.export.families import FAMILIES, Family, family_of
from modes_cli.export.safetensors_header import merged, parse_header
from modes_cli.models.blocks import MoEBlock, find_moe_blocks
from modes_cli.models.groups import TokenGroups, token_groups
from modes_cli.models.loading import describe
from modes_cli.models.processor import load_processor
from modes_cli.requests import ModelSpec
from modes_cli.skipping.policy import Rule


@dataclass(frozen=True)
class Plan:
    """What to export. `model` is fake; `aliases`: names of tied tensors -> the name that the files hold."""

    thresholds: Thresholds
    result: SearchResult
    rule: Rule
    folder: Path
    info: ModelInfo
    config: Any
    mode: FakeTensorMode
    model: nn.Module
    family: Family | None
    blocks: list[MoEBlock]
    tokens: TokenGroups
    tokenizer: Any
    targets: list[weights.Target]
    aliases: dict[str, str]
    remote_code: bool


def make_plan(spec: ModelSpec, thresholds: Thresholds, result: SearchResult, rule: Rule, *, onnx: bool) -> Plan:
    """Read the checkpoint's configuration and headers, and decide where every tensor goes.

    Raises:
        UnknownLayout: this checkpoint's tensors, or with `onnx` this family's graphs, are not understood.
        BadModel: files are missing.
    """
    folder, info, config = describe(spec)
    family = family_of(config.model_type) if onnx else FAMILIES.get(config.model_type)
    mode, model = skeleton.build(config, text_only=spec.text_only, trust_remote_code=spec.trust_remote_code)
    wanted, tied = skeleton.wanted_tensors(model)
    source = merged([parse_header(path, path.stat().st_size) for path in checkpoint_files(folder)])
    targets = weights.plan(wanted, source, info.dtype, tied)
    tokenizer = _tokenizer(folder, spec)
    return Plan(
        thresholds, result, rule, folder, info, config, mode, model, family, find_moe_blocks(model),
        token_groups(config, tokenizer.all_special_ids), tokenizer, targets, _aliases(model, targets), spec.trust_remote_code,
    )  # fmt: skip


def checkpoint_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint: those its index names, or the only one.

    Raises:
        BadModel: there are several and no index says which belong together.
    """
    index = folder / weights.INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise BadModel(f"`{index}` is no index of weights") from error
        paths = [folder / str(name) for name in names if Path(str(name)).name == name]
        if len(paths) != len(names) or not paths:
            raise BadModel(f"`{index}` names files outside its folder, or none")
    else:
        paths = [folder / "model.safetensors"]
    for path in paths:
        if not path.is_file():
            raise BadModel(f"`{path}` does not exist", hint="is the checkpoint complete?")
    return paths


def _tokenizer(folder: Path, spec: ModelSpec) -> Any:
    if spec.text_only:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
    return load_processor(folder, trust_remote_code=spec.trust_remote_code).tokenizer


def _aliases(model: nn.Module, targets: list[weights.Target]) -> dict[str, str]:
    """Tied tensors: each absent name -> the name that the files hold."""
    held = {target.name for target in targets}
    by_id: dict[int, str] = {}
    tensors = model.state_dict(keep_vars=True)
    for name in held:
        by_id.setdefault(id(tensors[name]), name)
    return {name: by_id[id(tensor)] for name, tensor in tensors.items() if name not in held}
