"""genai_config.json, which onnxruntime-genai reads. It refuses keys that it does not know, and so do these classes.

Field names are its own (https://onnxruntime.ai/docs/genai/reference/config.html); tried with version 0.18.
"""

from typing import Annotated

from pydantic import Field

from modes_cli.artifacts.base import Count, Finite, NonNegative, Positive, Strict

FILE = "genai_config.json"
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]*$")]  # beside genai_config.json


class SessionOptions(Strict):
    """Of all three graphs. Without providers: the CPU."""

    custom_ops_library: FileName
    provider_options: list[dict[str, dict[str, str]]]


class DecoderInputs(Strict):
    input_ids: str  # beside the embeddings: the graph finds each token's group with them
    inputs_embeds: str
    attention_mask: str
    position_ids: str
    past_key_names: str
    past_value_names: str


class DecoderOutputs(Strict):
    logits: str
    present_key_names: str
    present_value_names: str


class Decoder(Strict):
    """`hidden_size` is the width of what lies between the graphs: embeddings, and DeepStack's features beside them."""

    filename: FileName
    session_options: SessionOptions
    head_size: Positive
    hidden_size: Positive
    num_attention_heads: Positive
    num_hidden_layers: Positive
    num_key_value_heads: Positive
    inputs: DecoderInputs
    outputs: DecoderOutputs


class EmbeddingInputs(Strict):
    input_ids: str
    image_features: str


class EmbeddingOutputs(Strict):
    inputs_embeds: str


class Embedding(Strict):
    filename: FileName
    inputs: EmbeddingInputs
    outputs: EmbeddingOutputs


class VisionInputs(Strict):
    pixel_values: str
    image_grid_thw: str


class VisionOutputs(Strict):
    image_features: str


class Vision(Strict):
    """`config_filename`: the image processor's steps."""

    filename: FileName
    config_filename: FileName
    patch_size: Positive
    spatial_merge_size: Positive
    inputs: VisionInputs
    outputs: VisionOutputs


class Model(Strict):
    """Prompt tokens with `pad_token_id` are taken for padding."""

    type: str
    context_length: Positive
    vocab_size: Positive
    pad_token_id: Count
    eos_token_id: list[Count] = Field(min_length=1)
    image_token_id: Count
    video_token_id: Count
    vision_start_token_id: Count
    decoder: Decoder
    embedding: Embedding
    vision: Vision


class Search(Strict):
    """How the next token is chosen where a program does not say; `max_length` counts prompt and answer."""

    do_sample: bool
    max_length: Positive
    past_present_share_buffer: bool
    temperature: NonNegative | None = None
    top_k: Count | None = None
    top_p: NonNegative | None = None
    repetition_penalty: Finite | None = None


class GenaiConfig(Strict):
    model: Model
    search: Search
