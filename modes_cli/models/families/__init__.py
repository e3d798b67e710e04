"""Model families that transformers does not have: one file each, and a line in `register`."""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from modes_cli.models.families.kimi_vl import KimiVLConfig, KimiVLForConditionalGeneration
from modes_cli.models.families.kimi_vl_processing import KimiVLProcessor


def register() -> None:
    """Make transformers' Auto classes know them, before any code that comes with a checkpoint. Calling it again is harmless."""
    AutoConfig.register(KimiVLConfig.model_type, KimiVLConfig, exist_ok=True)
    AutoModelForImageTextToText.register(KimiVLConfig, KimiVLForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(KimiVLConfig, KimiVLProcessor, exist_ok=True)
