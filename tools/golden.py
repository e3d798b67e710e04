"""Write tests/golden/VERSION/: one small real run of this version, which every later version must be able to read.

    python -m tools.golden

Profile, calibration, thresholds, evaluation, bench and a bundle without graphs, of a tiny random model. Done once for each
release, when nothing of its formats will change any more; a folder that is there is never written again.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from modes_cli import __version__

FOLDER = Path(__file__).parent.parent / "tests" / "golden"
SEED = 7
DATA = ("--data", "digits", "--samples", "2", "--batch-size", "1")
STEPS: tuple[tuple[str, ...], ...] = (
    ("profile", "checkpoint", *DATA),
    ("calibrate", "checkpoint", *DATA),
    ("search", "--target", "0.05", "--target", "0.15", "--policy", "modes", "--no-frontier", "--passes", "4"),
    ("export", "--output", "graphs"),  # for `bench` alone, and not kept
    ("bench", "--bundle", "graphs", "--no-stock", "--data", "digits", "--samples", "1", "--batch", "1", "--repeats", "1"),
    ("export", "--format", "safetensors"),
    ("evaluate", *DATA, "--split", "test", "--max-new-tokens", "2"),
)


def write_checkpoint(folder: Path) -> None:
    """Qwen3-VL-MoE with one MoE layer of four experts and random weights, with the built-in model's tokenizer."""
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    from tests.checkpoints import reference_config, save

    tree = reference_config()
    text, vision = dict(tree["text_config"]), dict(tree["vision_config"])
    text.pop("num_local_experts", None)
    text |= {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8,
        "num_key_value_heads": 1, "moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [],
    }  # fmt: skip
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    vision |= {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
        "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = Qwen3VLMoeConfig(text_config=text, vision_config=vision, **{name: tree[name] for name in ids})
    save(Qwen3VLMoeForConditionalGeneration(config), folder, SEED)


def main() -> int:
    """Make the folder of this version; 1 where it is there, or a command fails."""
    final = FOLDER / __version__
    if final.exists():
        print(f"{final} is there: a released version's files are never written again", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        write_checkpoint(work / "checkpoint")
        # Relative names, so that no file tells where it was made.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MODES_RUN": "run"}
        for step in STEPS:
            command = [sys.executable, "-m", "modes_cli", *step, "--quiet"]
            if subprocess.run(command, cwd=work, env=environment, stdout=subprocess.DEVNULL).returncode:
                print(f"`modes {' '.join(step)}` failed", file=sys.stderr)
                return 1
        shutil.copytree(work / "run", final, ignore=shutil.ignore_patterns("*.html", "*.unfinished.*"))
    files = [path for path in final.rglob("*") if path.is_file()]
    print(f"{final}: {len(files)} files, {sum(path.stat().st_size for path in files)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
