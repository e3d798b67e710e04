"""Writes modes_cli/data/scans.safetensors from scikit-learn's bundled digits: scans, labels, split of each scan.

python tools/make_scans.py
"""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from sklearn.datasets import load_digits

OUT = Path(__file__).parent.parent / "modes_cli" / "data" / "scans.safetensors"


def main() -> None:
    digits = load_digits()
    rng = np.random.default_rng(0)
    split = np.zeros(len(digits.target), dtype=np.uint8)  # 0 train
    for digit in range(10):
        order = rng.permutation(np.flatnonzero(digits.target == digit))
        a, b = int(len(order) * 0.72), int(len(order) * 0.80)
        split[order[a:b]] = 1  # validation
        split[order[b:]] = 2  # test
    save_file(
        {"scans": digits.images.astype(np.uint8), "labels": digits.target.astype(np.uint8), "split": split},
        OUT,
        metadata={"source": "UCI Optical Recognition of Handwritten Digits (CC BY 4.0), as bundled with scikit-learn"},
    )


if __name__ == "__main__":
    main()
