"""Writing and checking what onnxruntime-genai reads: its settings, the image processor's steps, a graph per operating point.

Tokenizer and chat template it takes from the files that transformers reads.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from modes_cli import files
from modes_cli.artifacts.bundle import Bundle
from modes_cli.errors import BadArtifact, UnknownLayout
from modes_cli.export.genai import RUNS, points
from modes_cli.export.genai import config as genai
from modes_cli.export.genai.image_steps import FILE as STEPS
from modes_cli.export.integrity import LIBRARY

if TYPE_CHECKING:
    from modes_cli.export.plan import Plan

CONFIG = genai.FILE
_EMBEDDING, _VISION = "embedding.onnx", "vision.onnx"
_SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")


def obstacle(family: str, detail: str = "") -> str:
    """Why a bundle has no files for onnxruntime-genai, for people."""
    why = detail or ("it cannot be told what this checkpoint does" if family in RUNS else "it has no model type for it")
    return f"no {CONFIG}: onnxruntime-genai cannot run this `{family}` ({why}); ONNX Runtime runs the graphs"


def write(folder: Path, plan: "Plan", described: Bundle) -> str | None:
    """Write the files into a bundle that has its graphs. None, or why there are none."""
    family = plan.config.model_type
    runs = RUNS.get(family)
    if runs is None:
        return obstacle(family)
    from modes_cli.models.processor import load_processor  # transformers, which checking does without

    try:
        processor = load_processor(plan.folder, trust_remote_code=plan.remote_code)
        if plan.tokenizer.pad_token_id is None or int(plan.tokenizer.pad_token_id) in _prompt_tokens(processor):
            raise UnknownLayout("its tokenizer has no token for padding alone")
        settings, steps = _config(plan, described), runs.image_steps(processor.image_processor)
    except UnknownLayout as error:
        return obstacle(family, str(error))
    (folder / CONFIG).write_text(files.canonical_json(settings.model_dump(mode="json", exclude_none=True)), "utf-8")
    (folder / STEPS).write_text(files.canonical_json(steps), "utf-8")
    points.write_graphs(folder, described.points)
    return None


def _prompt_tokens(processor: Any) -> set[int]:
    """Ids that a prompt holds whatever it asks. onnxruntime-genai takes a prompt's tokens for padding by their id."""
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    return set(processor.tokenizer.encode(processor.apply_chat_template(chat, add_generation_prompt=True)))


def _config(plan: "Plan", described: Bundle) -> genai.GenaiConfig:
    text, runs = plan.config.get_text_config(), RUNS[plan.config.model_type]
    context = int(text.max_position_embeddings)
    return genai.GenaiConfig(
        model=genai.Model(
            type=runs.model_type,
            context_length=context,
            vocab_size=described.decoder.vocab_size,
            pad_token_id=int(plan.tokenizer.pad_token_id),
            eos_token_id=described.eos_token_ids,
            **runs.token_ids(plan.config, plan.tokenizer),
            decoder=_decoder(described, int(text.num_attention_heads)),
            embedding=genai.Embedding(
                filename=_EMBEDDING,
                inputs=genai.EmbeddingInputs(input_ids="input_ids", image_features="image_features"),
                outputs=genai.EmbeddingOutputs(inputs_embeds="inputs_embeds"),
            ),
            vision=runs.vision(plan.config, _VISION, STEPS),
        ),
        search=_search(plan.folder, context),
    )


def _decoder(bundle: Bundle, heads: int) -> genai.Decoder:
    decoder = bundle.decoder
    return genai.Decoder(
        filename=points.graph_name(bundle),
        session_options=genai.SessionOptions(custom_ops_library=LIBRARY, provider_options=[]),
        head_size=decoder.head_dim,
        hidden_size=(1 + decoder.deepstack) * decoder.hidden_size,
        num_attention_heads=heads,
        num_hidden_layers=decoder.layers,
        num_key_value_heads=decoder.kv_heads,
        inputs=genai.DecoderInputs(
            **{name: name for name in ("input_ids", "inputs_embeds", "attention_mask", "position_ids")},
            past_key_names="past_key_values.%d.key",
            past_value_names="past_key_values.%d.value",
        ),
        outputs=genai.DecoderOutputs(
            logits="logits", present_key_names="present.%d.key", present_value_names="present.%d.value"
        ),
    )


def _search(folder: Path, context: int) -> genai.Search:
    """As the model's own generation_config.json has it."""
    from transformers import GenerationConfig

    try:
        own = GenerationConfig.from_pretrained(folder)
    except OSError:
        own = GenerationConfig()
    sampled = bool(own.do_sample)
    values: dict[str, Any] = {name: getattr(own, name, None) for name in (_SAMPLING if sampled else _SAMPLING[-1:])}
    return genai.Search(do_sample=sampled, max_length=context, past_present_share_buffer=False, **values)


def check(folder: Path, bundle: Bundle) -> str:
    """What `modes verify` says about these files.

    Raises:
        BadArtifact: genai_config.json has other keys, names other files or another library than the bundle's, or does not
            fit bundle.json; or a graph is not what it should be.
    """
    path = folder / CONFIG
    if bundle.format != "onnx":
        raise BadArtifact(str(path), "file", f"a bundle in format `{bundle.format}` has no graphs that it could name")
    try:
        found = genai.GenaiConfig.model_validate_json(files.read_text(path, 1 << 20))
    except ValidationError as error:
        first = error.errors()[0]
        raise BadArtifact(str(path), f"field `{'.'.join(map(str, first['loc']))}`", first["msg"]) from error
    model = found.model
    runs = RUNS.get(bundle.family)
    expected = {
        "type": None if runs is None else runs.model_type,
        "vocab_size": bundle.decoder.vocab_size,
        "eos_token_id": bundle.eos_token_ids,
        "pad_token_id": bundle.pad_token_id,
        "decoder": _decoder(bundle, model.decoder.num_attention_heads),
    }
    for name, value in expected.items():
        if getattr(model, name) != value:
            raise BadArtifact(str(path), f"field `model.{name}`", "does not fit bundle.json")
    listed = {file.path for file in bundle.files}
    names = (model.embedding.filename, model.vision.filename, model.vision.config_filename)
    if names != (_EMBEDDING, _VISION, STEPS):
        raise BadArtifact(str(path), "file names", f"are {', '.join(names)}, should be {_EMBEDDING}, {_VISION}, {STEPS}")
    if missing := set(names) - listed:
        raise BadArtifact(str(path), "file names", f"{', '.join(sorted(missing))} is not listed in bundle.json")
    graphs = points.check_graphs(folder, bundle)
    return f"model type {model.type}, {len(graphs)} graphs beside decoder.onnx"
