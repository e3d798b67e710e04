"""Everything that an export reads and decides before it writes the first byte."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from modes_cli.artifacts import Thresholds
from modes_cli.artifacts.base import ModelInfo
from modes_cli.artifacts.thresholds import SearchResult
from modes_cli.errors import BadOption
from modes_cli.export import packing, skeleton, weights
from modes_cli.export.conversion import in_memory
from modes_cli.export.families import Family, family_of, known_family
from modes_cli.models.blocks import MoEBlock, find_moe_blocks
from modes_cli.models.checkpoint import checkpoint_files
from modes_cli.models.groups import TokenGroups, token_groups
from modes_cli.models.loading import describe
from modes_cli.models.processor import load_processor
from modes_cli.models.quantization import SCHEMES, Scheme
from modes_cli.requests import ModelSpec
from modes_cli.safetensors_header import merged, parse_header
from modes_cli.skipping.policy import Rule
from modes_cli.skipping.registry import policy


@dataclass(frozen=True)
class Plan:
    """What to export. `model` is fake; `aliases`: names of tied tensors -> the name that the files hold. `scheme`: of the
    expert weights; the shapes of `blocks` are then those of what is stored.
    """

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
    scheme: Scheme | None = None


def require_exportable(result: SearchResult, *, onnx: bool) -> None:
    """Raises BadOption if no graph can have the policy. Weights alone go with any: PyTorch runs them all."""
    chosen = policy(result.policy, **result.parameters)
    if onnx and not chosen.exportable:
        raise BadOption(
            f"policy `{result.policy}` has no graph: {chosen.obstacle}",
            hint="`--format safetensors` makes a bundle for PyTorch; or search with another `--policy`",
        )


def make_plan(spec: ModelSpec, thresholds: Thresholds, result: SearchResult, rule: Rule, *, onnx: bool) -> Plan:
    """Read the checkpoint's configuration and headers, and decide where every tensor goes.

    Raises:
        UnknownLayout: this checkpoint's tensors, or with `onnx` this family's graphs, are not understood.
        BadModel: files are missing.
    """
    folder, info, config = describe(spec)
    family = family_of(config) if onnx else known_family(config)
    mode, model = skeleton.build(config, text_only=spec.text_only, trust_remote_code=spec.trust_remote_code, graphs=onnx)
    wanted, tied = skeleton.wanted_tensors(model)
    stored = merged([parse_header(path, path.stat().st_size) for path in checkpoint_files(folder)])
    source, parts = in_memory(stored, model)
    targets = weights.plan(wanted, source, info.dtype, tied, parts)
    tokenizer = _tokenizer(folder, spec)
    blocks, aliases = find_moe_blocks(model), _aliases(model, targets)
    scheme = None if spec.quantize is None else SCHEMES[spec.quantize]
    if scheme is not None:
        targets = packing.packed(targets, blocks, scheme)
        blocks = [packing.pack_shapes(block, mode, scheme) for block in blocks]
    return Plan(
        thresholds, result, rule, folder, info, config, mode, model, family, blocks,
        token_groups(config, tokenizer.all_special_ids, spec.special), tokenizer, targets, aliases,
        spec.trust_remote_code, scheme,
    )  # fmt: skip


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
