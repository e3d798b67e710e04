"""One table of several evaluations with `modes evaluate --policies`: the mean over runs, which differ in their calibration.

    python -m tools.policy_table RUN... --output docs/benchmarks/policies-digits.json

Prints the table as Markdown: share of the unskipped accuracy that is retained, by policy and target; the first row is what
`modes search` chose.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

from modes_cli.artifacts import Evaluation
from modes_cli.artifacts.evaluation import PolicyAccuracy
from modes_cli.errors import ModesError
from modes_cli.run_folder import RunFolder

CHOSEN = "auto"


def table(evaluations: list[Evaluation]) -> list[dict[str, Any]]:
    """One row for each policy and target that every run has.

    Raises:
        ModesError: the runs are about other models or samples, or have no comparison.
    """
    subjects = {(one.model.digest, one.data.digest) for one in evaluations}
    if len(subjects) != 1 or not all(one.comparison for one in evaluations):
        raise ModesError("the runs do not compare policies on the same model and samples", hint="modes evaluate --policies")
    found: dict[tuple[float, float | None, str], list[PolicyAccuracy]] = defaultdict(list)
    for evaluation in evaluations:
        for one in evaluation.comparison:
            at = one.target, one.decode_target
            found[(*at, one.policy)].append(one)
            if one.chosen:
                found[(*at, CHOSEN)].append(one)
    return [
        {
            "target": target,
            "decode_target": decode,
            "policy": policy,
            "retained": fmean(one.retained for one in rows),
            "retained_by_run": [one.retained for one in rows],
            "kl": fmean(one.kl for one in rows),
            "skip_ratio": {group: fmean(one.skip_ratio[group] for one in rows) for group in rows[0].skip_ratio},
            "chose": [[one.policy, one.parameters] for one in rows] if policy == CHOSEN else None,
        }
        for (target, decode, policy), rows in sorted(found.items(), key=lambda item: (item[0][0], item[0][1] or -1, item[0][2]))
        if len(rows) == len(evaluations)
    ]


def markdown(rows: list[dict[str, Any]]) -> str:
    """Policies by targets, retained in percent."""
    columns = list(dict.fromkeys((row["target"], row["decode_target"]) for row in rows))
    cells = {(row["policy"], row["target"], row["decode_target"]): row["retained"] for row in rows}
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    policies.sort(key=lambda name: (name != CHOSEN, -fmean(v for (p, *_), v in cells.items() if p == name)))
    heads = [f"{target:g}" if decode is None else f"{target:g}, decode {decode:g}" for target, decode in columns]
    lines = ["| policy | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name in policies:
        values = [cells.get((name, *column)) for column in columns]
        lines.append(f"| `{name}` | " + " | ".join("" if value is None else f"{100 * value:.1f}" for value in values) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--commands", nargs="*", default=[], help="how the runs were made, for the file")
    given = parser.parse_args()
    evaluations = [RunFolder(run).read(Evaluation) for run in given.run]
    rows = table(evaluations)
    first = evaluations[0]
    content = {
        "commands": given.commands,
        "versions": first.versions.model_dump(),
        "model": first.model.model_dump(),
        "data": first.data.model_dump(),
        "runs": len(evaluations),
        "full": first.full,
        "rows": rows,
    }
    given.output.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    print(markdown(rows))


if __name__ == "__main__":
    main()
