"""The files of a bundle beside weights and graphs: settings, thresholds, bundle.json."""

import json
import shutil
from pathlib import Path

from modes_cli import files
from modes_cli.artifacts import Bundle
from modes_cli.artifacts.bundle import BundleFile, DecoderInfo, OperatingPoint, Quantization
from modes_cli.artifacts.provenance import Provenance
from modes_cli.artifacts.thresholds import SearchResult
from modes_cli.errors import BadModel
from modes_cli.export.decoder import cache_shape
from modes_cli.export.plan import Plan
from modes_cli.export.thresholds import rule_bytes
from modes_cli.models.groups import GROUPS
from modes_cli.models.loading import versions
from modes_cli.models.quantization import BLOCK

# What from_pretrained needs beside the weights. Anything else in a checkpoint's folder stays there.
_COPIED = (
    "generation_config.json", "*tokenizer*", "vocab*", "merges.txt", "added_tokens.json", "special_tokens_map.json",
    "*processor_config.json", "chat_template*", "*.tiktoken",
)  # fmt: skip


def copy_settings(folder: Path, plan: Plan) -> None:
    patterns = (*_COPIED, "*.model", *(("*.py",) if plan.remote_code else ()))
    for path in sorted({path for pattern in patterns for path in plan.folder.glob(pattern) if path.is_file()}):
        shutil.copyfile(path, folder / path.name)
    config = json.loads((plan.folder / "config.json").read_text("utf-8"))
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for field in ("dtype", "torch_dtype"):  # what from_pretrained(dtype="auto") will take
            if field in part:
                part[field] = plan.info.dtype
    (folder / "config.json").write_text(files.canonical_json(config), "utf-8")


def thresholds_bytes(plan: Plan) -> bytes:
    decode = plan.result.decode_target
    metadata = {
        "policy": plan.result.policy,
        "target": repr(plan.result.target),
        **({} if decode is None else {"decode_target": repr(decode)}),
        "groups": ",".join(GROUPS),
        "moe_layers": ",".join(str(block.layer) for block in plan.blocks),
        **{f"parameter.{name}": repr(value) for name, value in plan.result.parameters.items()},
    }
    return rule_bytes(plan.rule, metadata)


def describe_bundle(plan: Plan, format: str, provenance: Provenance, listed: list[BundleFile]) -> Bundle:
    text, result = plan.config.get_text_config(), plan.result
    family = plan.family
    alike = [r for r in plan.thresholds.results if (r.policy, r.parameters) == (result.policy, result.parameters)]
    ends = _end_ids(plan)
    cache = cache_shape(text)
    pad = plan.tokenizer.pad_token_id
    return Bundle(
        model=plan.info,
        family=plan.config.model_type,
        calibration_data=plan.thresholds.data,
        versions=versions(),
        provenance=provenance,
        format="onnx" if format == "onnx" else "safetensors",
        quantization=None if plan.scheme is None else Quantization.model_validate({"scheme": plan.scheme.name, "block": BLOCK}),
        policy=result.policy,
        parameters=result.parameters,
        groups=list(GROUPS),
        target=result.target,
        decode_target=result.decode_target,
        tau=result.tau,
        points=[_point(one) for one in alike],
        moe_layers=[block.layer for block in plan.blocks],
        experts=plan.blocks[0].num_experts,
        top_k=plan.blocks[0].top_k,
        vision_token_ids=list(plan.tokens.vision_ids),
        special_token_ids=list(plan.tokens.special_ids),
        audio_token_ids=list(plan.tokens.audio_ids),
        eos_token_ids=ends,
        pad_token_id=ends[0] if pad is None else int(pad),
        decoder=DecoderInfo(
            layers=int(text.num_hidden_layers),
            kv_heads=cache.heads,
            head_dim=cache.key,
            value_dim=None if cache.value == cache.key else cache.value,
            hidden_size=int(text.hidden_size),
            vocab_size=int(text.vocab_size),
            deepstack=0 if family is None else family.deepstack(plan.config),
            frames_together=family is not None and family.frames_together,
            position_rows=3 if family is not None and family.position_rows == 3 else 1,
        ),
        files=listed,
    )


def _point(found: SearchResult) -> OperatingPoint:
    shared = ("target", "decode_target", "tau", "skip_ratio", "kl")
    return OperatingPoint(**{name: getattr(found, name) for name in shared})


def _end_ids(plan: Plan) -> list[int]:
    from transformers import GenerationConfig

    try:
        end = GenerationConfig.from_pretrained(plan.folder).eos_token_id
    except OSError:
        end = None
    end = plan.tokenizer.eos_token_id if end is None else end
    if end is None:
        raise BadModel(
            f"`{plan.info.id}` does not say which token ends an answer", hint="its generation_config.json or tokenizer should"
        )
    return [int(end)] if isinstance(end, int) else [int(token) for token in end]
