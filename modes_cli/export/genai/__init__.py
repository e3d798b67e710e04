"""What onnxruntime-genai needs to run a bundle's folder as it is. A family that it can run is one file and one line in RUNS."""

from modes_cli.export.genai.base import Runs
from modes_cli.export.genai.qwen3_vl import Qwen3VL

# By model type of the checkpoint.
RUNS: dict[str, Runs] = {"qwen3_vl_moe": Qwen3VL()}

__all__ = ["RUNS", "Runs"]
