"""Qwen3-VL-MoE as onnxruntime-genai's model type `qwen3_vl`.

What that type brings: positions [3, B, S], one vision graph for any mix of sizes, and the places of images from
`<|vision_start|>`. DeepStack it does not know; the features lie beside the embeddings, and the decoder graph takes them off.
"""

from typing import Any

from modes_cli.errors import UnknownLayout
from modes_cli.export.genai import config as genai
from modes_cli.export.genai.image_steps import image_steps

TOKENS = {"<|vision_start|>": "vision_start_token_id", "<|image_pad|>": "image_token_id"}  # spelled out in its sources


class Qwen3VL:
    model_type = "qwen3_vl"

    def token_ids(self, config: Any, tokenizer: Any) -> dict[str, int]:
        """Raises UnknownLayout if the tokens that onnxruntime-genai writes into prompts are not the model's."""
        for token, field in TOKENS.items():
            if tokenizer.convert_tokens_to_ids(token) != getattr(config, field):
                raise UnknownLayout(f"`{token}` is not the tokenizer's token {getattr(config, field)}")
        return {name: int(getattr(config, name)) for name in ("image_token_id", "video_token_id", "vision_start_token_id")}

    def vision(self, config: Any, graph: str, steps: str) -> genai.Vision:
        return genai.Vision(
            filename=graph,
            config_filename=steps,
            patch_size=int(config.vision_config.patch_size),
            spatial_merge_size=int(config.vision_config.spatial_merge_size),
            inputs=genai.VisionInputs(pixel_values="pixel_values", image_grid_thw="image_grid_thw"),
            outputs=genai.VisionOutputs(image_features="image_features"),
        )

    def image_steps(self, processor: Any) -> dict[str, Any]:
        return image_steps(processor)
