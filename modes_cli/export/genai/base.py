"""What a family that onnxruntime-genai can run says about itself."""

from typing import Any, Protocol

from modes_cli.export.genai import config as genai


class Runs(Protocol):
    model_type: str  # as onnxruntime-genai names it

    def token_ids(self, config: Any, tokenizer: Any) -> dict[str, int]:
        """`image_token_id`, `video_token_id` and `vision_start_token_id`. Raises UnknownLayout where they do not fit."""
        ...

    def vision(self, config: Any, graph: str, steps: str) -> genai.Vision:
        """The vision part, for the graph's file and that of the image processor's steps."""
        ...

    def image_steps(self, processor: Any) -> dict[str, Any]:
        """The image processor as a file for onnxruntime-extensions. Raises UnknownLayout if it does something else."""
        ...
