"""A checkpoint with the built-in model's tokenizer and processor, but wide layers and random weights, for measuring time.

    python -m tools.wide_digits wide-1024

Hidden size 1024, 2 layers of 32 experts of 512, 8 of them for each token: 0.4 GB in float32, more than a cache holds. What it
answers means nothing.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
import transformers

from modes_cli.models.checkpoint import REFERENCE_FOLDER

TEXT = {"hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 2, "moe_intermediate_size": 512}
WEIGHTS = {"config.json", "model.safetensors", "training.json"}


def main() -> int:
    parser = argparse.ArgumentParser(description="A wide checkpoint with random weights.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    tree = json.loads((REFERENCE_FOLDER / "config.json").read_text("utf-8"))
    tree["text_config"] |= TEXT
    tree["vision_config"]["out_hidden_size"] = TEXT["hidden_size"]
    config = transformers.Qwen3VLMoeConfig.from_dict(tree)
    torch.manual_seed(0)
    model = transformers.Qwen3VLMoeForConditionalGeneration(config)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.mlp.gate.weight.normal_(std=0.08)  # so that a token's experts differ in weight, as trained ones do
    model.save_pretrained(folder)
    for path in REFERENCE_FOLDER.iterdir():
        if path.name not in WEIGHTS:
            shutil.copyfile(path, folder / path.name)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
