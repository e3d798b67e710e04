"""From a model id to a model that is ready to be measured: checkpoint, processor, MoE blocks, token groups."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from modes_cli import __version__
from modes_cli.artifacts.base import Dtype, ModelInfo, Versions
from modes_cli.errors import BadModel, BadOption, first_line, is_memory
from modes_cli.models.blocks import MoEBlock, find_moe_blocks
from modes_cli.models.checkpoint import check_settings, checkpoint_digest, checkpoint_folder, read_config
from modes_cli.models.families import register
from modes_cli.models.groups import TokenGroups, token_groups
from modes_cli.models.placement import check_placement, first_device
from modes_cli.models.processor import load_processor
from modes_cli.models.quantization import SCHEMES, quantise_experts
from modes_cli.models.structure import read_structure
from modes_cli.ranks import place
from modes_cli.requests import ModelSpec

DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Marks of a multimodal configuration; a text-only one has none of them.
_MULTIMODAL_FIELDS = (
    "vision_config",
    "audio_config",
    "thinker_config",
    "image_token_id",
    "image_token_index",
    "media_placeholder_token_id",
)


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory. `model` is in eval mode on `device`; `processor` is a bare tokenizer with `--text-only`."""

    model: PreTrainedModel
    processor: Any
    info: ModelInfo
    family: str
    blocks: list[MoEBlock]
    tokens: TokenGroups
    path: Path
    device: torch.device

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)


def versions() -> Versions:
    """The versions that belong to an artifact's identity."""
    return Versions(modes=__version__, torch=torch.__version__.split("+")[0], transformers=transformers.__version__)


def pick_device(name: str) -> torch.device:
    """`auto` takes a GPU where there is one.

    Raises:
        BadOption: `cuda` was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise BadOption("`--device cuda`: no usable GPU was found", hint="`modes doctor` says why")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and (here := place()).world > 1:  # one GPU for each of the processes of this machine
        if here.local >= (there := torch.cuda.device_count()):
            raise BadOption(f"process `{here.local}` of this machine has no GPU of its own; there are {there}")
        return torch.device("cuda", here.local)
    return torch.device(name)


def describe(spec: ModelSpec) -> tuple[Path, ModelInfo, Any]:
    """Folder, identity and configuration of a checkpoint, read without its weights.

    Raises:
        BadModel: not found, not understood by transformers, or text-only without `--text-only`.
    """
    folder = checkpoint_folder(spec)
    raw = read_config(folder)
    check_settings(folder)
    register()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
    except Exception as error:  # transformers raises nearly anything about settings that make no sense
        if is_memory(error):
            raise
        kind = raw.get("model_type", "(none)")
        raise BadModel(
            f"`{spec.id}`: transformers {transformers.__version__} cannot read model type `{kind}`: {str(error)[:200]!r}",
            hint="`--trust-remote-code` runs the code that comes with a checkpoint, if you trust it",
        ) from error
    if not spec.text_only and not any(getattr(config, field, None) is not None for field in _MULTIMODAL_FIELDS):
        raise BadModel(
            f"`{spec.id}` is a text-only model (model type `{config.model_type}`)",
            hint="`--text-only` calibrates it with one modality and one threshold",
        )
    if (thinker := getattr(config, "thinker_config", None)) is not None:  # the part that answers; the other one speaks
        thinker.dtype = thinker.dtype or config.dtype
        config = thinker
    info = ModelInfo(id=spec.id, revision=spec.revision, digest=checkpoint_digest(folder), dtype=_dtype(spec, config))
    return folder, info, config


def _dtype(spec: ModelSpec, config: Any) -> Dtype:
    stored = getattr(config, "dtype", None) or getattr(getattr(config, "text_config", None), "dtype", None)
    name = str(stored or torch.float32).removeprefix("torch.") if spec.dtype == "auto" else spec.dtype
    for dtype in DTYPES:
        if dtype == name:
            return dtype
    raise BadModel(f"`{spec.id}` is stored as `{name}`; float32, bfloat16 and float16 are supported")


def load(spec: ModelSpec) -> Loaded:
    """Load a checkpoint with its weights.

    Raises:
        BadModel: it cannot be found or used.
        UnknownLayout: its experts are of a form that is not understood.
        BadOption: `quantize` is unknown, or does not go with `offload`.
    """
    check_placement(spec)
    if spec.quantize is not None and (spec.offload or spec.quantize not in SCHEMES):
        problem = "does not go with `--offload`" if spec.quantize in SCHEMES else f"is not one of {', '.join(SCHEMES)}"
        raise BadOption(f"`--quantize {spec.quantize}` {problem}")
    device = pick_device(spec.device)
    folder, info, config = describe(spec)
    try:
        model, report = _with_weights(spec, folder, info, config, device)
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        if is_memory(error):
            raise
        raise BadModel(f"`{spec.id}` cannot be loaded: {first_line(error)}", hint="is the checkpoint complete?") from error
    except Exception as error:
        if type(error).__name__ == "SafetensorError":  # the class is not public
            raise BadModel(f"`{spec.id}` has a damaged weight file: {error}", hint="fetch it again") from error
        raise
    if missing := sorted(report["missing_keys"]):  # transformers fills these with random numbers
        raise BadModel(
            f"`{spec.id}` lacks `{len(missing)}` of the tensors of `{type(model).__name__}`, among them `{missing[0]}`",
            hint="is the checkpoint complete?",
        )
    if spec.device_map is not None:
        device = first_device(model)
    elif not spec.offload:
        torch.nn.Module.to(model, device)
    model.eval().requires_grad_(False)
    blocks = find_moe_blocks(model)
    if spec.quantize is not None:
        quantise_experts(blocks, SCHEMES[spec.quantize])
    processor = _processor(spec, folder)
    tokenizer = getattr(processor, "tokenizer", processor)
    groups = token_groups(config, tokenizer.all_special_ids, spec.special)
    return Loaded(model, processor, info, config.model_type, blocks, groups, folder, device)


def _with_weights(
    spec: ModelSpec, folder: Path, info: ModelInfo, config: Any, device: torch.device
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model and what transformers reports of its loading. Not on `device` yet, unless it was spread or is offloaded."""
    dtype = DTYPES[info.dtype]
    if spec.offload:
        from modes_cli.models.offload import load_offloaded

        structure = read_structure(folder, config, dtype, text_only=spec.text_only, trust_remote_code=spec.trust_remote_code)
        return load_offloaded(structure, folder, config, device)
    architecture: Any = AutoModelForCausalLM if spec.text_only else AutoModelForImageTextToText
    found: tuple[PreTrainedModel, dict[str, Any]] = architecture.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        trust_remote_code=spec.trust_remote_code,
        use_safetensors=True,
        output_loading_info=True,
        device_map=spec.device_map,
    )
    return found


def _processor(spec: ModelSpec, folder: Path) -> Any:
    if not spec.text_only:
        return load_processor(folder, trust_remote_code=spec.trust_remote_code)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
    except Exception as error:  # as load_processor
        if is_memory(error):
            raise
        raise BadModel(f"`{folder}` has no usable tokenizer: {type(error).__name__}: {first_line(error)}") from error
