"""Writes the second task's samples as `--data` reads them.

python tools/second_data.py FOLDER
modes calibrate MODEL --data FOLDER/calibration; modes search; modes evaluate --data FOLDER/test
"""

import argparse
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import second_task as tiles
from PIL import Image


def write_folder(folder: Path, split: str, count: int, seed: int, kinds: Sequence[str] = tiles.KINDS) -> Path:
    """The first `count` samples as `--data` reads them: samples.jsonl with image, question, answer and task, and PNG files."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        for number, (scene, question) in enumerate(islice(tiles.samples(split, seed, kinds), count)):
            name = f"images/{number:05d}.png"
            Image.fromarray(scene.canvas).save(folder / name)
            row = {"image": name, "question": question.text, "answer": question.answer, "task": question.kind}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return folder


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path)
    p.add_argument("--calibration", type=int, default=10 * len(tiles.TRAINED), help="samples of the validation split")
    p.add_argument("--test", type=int, default=120 * len(tiles.TRAINED), help="samples of the test split")
    p.add_argument("--kinds", choices=tiles.KINDS, nargs="+", default=tiles.TRAINED)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    write_folder(args.folder / "calibration", "validation", args.calibration, args.seed, args.kinds)
    write_folder(args.folder / "test", "test", args.test, args.seed, args.kinds)


if __name__ == "__main__":
    main()
