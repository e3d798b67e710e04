"""The frontier search against the paper's two pointers on the built-in model; writes docs/benchmarks/search-digits.json.

    python -m tools.compare_search

Both run as users run them, as processes, on one calibration, with grid 100 and the paper's policy; `auto`, the default,
stands beside them. About 20 minutes on two cores, most of it the two pointers' passes.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent.parent / "docs" / "benchmarks" / "search-digits.json"
TARGETS = ("0.5", "0.67", "0.75", "0.83", "0.88")
WAYS = {
    "frontier": ["--policy", "modes:per_modality=0", "--strategy", "frontier", "--no-frontier"],
    "two-pointer": ["--policy", "modes:per_modality=0", "--strategy", "two-pointer", "--grid", "100", "--no-frontier"],
    "auto": ["--no-frontier"],
}


def modes(*arguments: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", "modes_cli", *arguments, "--json"], check=True, capture_output=True, text=True)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def main() -> None:
    targets = [word for target in TARGETS for word in ("--target", target)]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        calibration = modes("calibrate", "digits", "--run", folder)
        for way, options in WAYS.items():
            answer = modes("search", *targets, *options, "--run", folder, "--fresh")
            found[way] = {
                "command": " ".join(["modes search", *targets, *options, "--json"]),
                "seconds": answer["seconds"],
                "model_passes": answer["model_passes"],
                "results": answer["results"],
            }
        machine = modes("doctor")
    paper = found["two-pointer"]
    summary = {
        way: {
            "kl_over_two_pointer": {
                str(a["target"]): a["kl"] / b["kl"] for a, b in zip(found[way]["results"], paper["results"], strict=True)
            },
            "passes_over_two_pointer": found[way]["model_passes"] / paper["model_passes"],
        }
        for way in ("auto", "frontier")
    } | {
        "forward_equivalents_over_naive": calibration["forward_equivalents"] / calibration["naive_forwards"],
    }
    record = {
        "command": "python -m tools.compare_search",
        "machine": {"versions": machine["versions"], "cores": os.cpu_count()},
        "summary": summary,
        **found,
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
