"""A tiny random Qwen3-VL-MoE checkpoint, a run folder with thresholds for it, and bundles made from them."""

import functools
import json
import shutil
from pathlib import Path

import torch
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from modes_cli import files
from modes_cli.artifacts import Bundle, Calibration, Thresholds
from modes_cli.artifacts.base import DataInfo, TensorFile
from modes_cli.artifacts.calibration import LayerImportance
from modes_cli.artifacts.thresholds import SearchResult
from modes_cli.export import export_bundle
from modes_cli.models.checkpoint import REFERENCE_FOLDER
from modes_cli.models.groups import GROUPS
from modes_cli.models.loading import describe, versions
from modes_cli.requests import ExportRequest, ModelSpec
from modes_cli.run_folder import RunFolder
from tests.once import once

LAYERS, MOE_LAYERS, EXPERTS, TOP_K = 4, (1, 2, 3), 16, 4
TAU = {"text": 0.07, "vision": 0.1}
# Importance of each layer, as shares.
COLUMNS = ("all", "text", "vision", "prompt", "decode")
SHARES = {1: (0.5, 0.4, 0.7, 0.6, 0.2), 2: (0.2, 0.35, 0.2, 0.3, 0.5), 3: (0.3, 0.25, 0.1, 0.1, 0.3)}


def make_checkpoint(folder: Path, dtype: torch.dtype = torch.float32, *, tied: bool = False) -> Path:
    """Layer 0 is dense. Tokenizer and processor are the reference model's."""
    reference = json.loads((REFERENCE_FOLDER / "config.json").read_text())
    text, vision = dict(reference["text_config"]), dict(reference["vision_config"])
    text |= {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "mlp_only_layers": [0],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "moe_intermediate_size": 32,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True},
    }
    text.pop("num_local_experts", None)
    vision |= {"hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64, "num_position_embeddings": 64}
    ids = {
        name: reference[name] for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    }
    config = Qwen3VLMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids)
    torch.manual_seed(0)
    model = Qwen3VLMoeForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:  # spread, so that routing and logits are not degenerate
                parameter.normal_(0, 1.0 / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.to(dtype).save_pretrained(folder)
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "processor_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ):
        shutil.copy(REFERENCE_FOLDER / name, folder / name)
    return folder


def make_run(
    folder: Path,
    checkpoint: Path | str,
    tau: dict[str, float] | None = None,
    shares: dict[int, tuple[float, ...]] = SHARES,
    experts: int = EXPERTS,
    top_k: int = TOP_K,
    dtype: str = "auto",
    family: str = "qwen3_vl_moe",
) -> Path:
    """calibration.json and thresholds.json with two targets of policy `modes`."""
    _, info, _ = describe(ModelSpec(str(checkpoint), dtype=dtype))
    data = DataInfo(source="digits", split="validation", samples=1, seed=0, digest="0" * 64)
    shared = {"model": info, "data": data, "options": {"text_only": False, "special": "keep"}, "versions": versions()}
    folder.mkdir(parents=True, exist_ok=True)
    run = RunFolder(folder)
    importance = {
        str(layer): LayerImportance(**dict(zip(COLUMNS, own, strict=True)), **{f"kl_{column}": 1.0 for column in COLUMNS})
        for layer, own in shares.items()
    }
    calibration = Calibration(
        **shared,
        family=family,
        moe_layers=len(shares),
        experts=experts,
        top_k=top_k,
        groups=list(GROUPS),
        importance=importance,
        tokens={},
        answer_tokens=1,
        samples=1,
        forward_equivalents=1,
        naive_forwards=1,
        tensors=TensorFile(file="calibration.safetensors", sha256="0" * 64, bytes=1),
    )
    run.write(calibration)
    result = SearchResult(
        target=0.3,
        decode_target=None,
        policy="modes",
        parameters={"per_modality": 0.0},
        tau=tau or TAU,
        skip_ratio=0.35,
        skip_ratio_per_group={},
        skip_ratio_per_layer={},
        kl=0.01,
        kl_selection=0.01,
        kl_held_out=0.01,
        predicted_skip_ratio=0.35,
        model_passes=1,
        distinct_experts=[],
        frontier=[],
        alternatives=[],
    )
    small = result.model_copy(update={"target": 0.1, "tau": {"text": 0.02, "vision": 0.03}, "skip_ratio": 0.12})
    thresholds = Thresholds(
        **shared,
        calibration=files.sha256(run.file(Calibration.FILE)),
        groups=list(GROUPS),
        results=[small, result],
        frontier=[],
        model_passes=1,
        grid=100,
    )
    run.write(thresholds)
    return folder


@functools.cache
def shared_bundle(base: Path) -> Path:
    """One float32 bundle for all tests of a session; copy it before changing anything. Beside it: `checkpoint`."""

    def make(folder: Path) -> None:
        export_bundle(ExportRequest(run=make_run(folder / "run", make_checkpoint(folder / "checkpoint"))))

    return once(base, "tiny", make) / "run" / "bundle"


def shared_checkpoint(base: Path) -> Path:
    return shared_bundle(base).parent.parent / "checkpoint"


@functools.cache
def shared_bfloat16(base: Path) -> tuple[Path, Path]:
    """(checkpoint, bundle) in bfloat16 and with tied embeddings, else as `shared_bundle`."""

    def make(folder: Path) -> None:
        checkpoint = make_checkpoint(folder / "checkpoint", torch.bfloat16, tied=True)
        export_bundle(ExportRequest(run=make_run(folder / "run", checkpoint)))

    folder = once(base, "tiny-bfloat16", make)
    return folder / "checkpoint", folder / "run" / "bundle"


def relist(bundle: Path, *names: str) -> None:
    """Make bundle.json fit files that a test has changed, as an attacker would."""
    path = bundle / "bundle.json"
    tree = json.loads(path.read_text())
    for file in tree["files"]:
        if file["path"] in names:
            changed = bundle / file["path"]
            file |= {"bytes": changed.stat().st_size, "sha256": files.sha256(changed)}
    digests = {file["path"]: file["sha256"] for file in tree["files"]}
    for kernel in tree["provenance"]["kernels"]:
        kernel["sha256"] = digests.get(kernel["file"], kernel["sha256"])
    path.write_text(json.dumps(tree))


def read(bundle: Path) -> Bundle:
    return Bundle.model_validate_json((bundle / "bundle.json").read_text())
