"""Every pair of thresholds on a grid against what the frontier search finds in 20 passes; for a run folder with a calibration.

    python -m tools.exhaustive_search RUN --policy salient:power=0.7 --output docs/benchmarks/exhaustive-digits.json

The grid's thresholds are evenly spaced quantiles of each modality's scores, as `modes search --strategy exhaustive` has them;
one measurement of all pairs serves every target. A pair counts for a target if it meets it by 0.01 at most, as everywhere.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from modes_cli.artifacts import Calibration
from modes_cli.models.loading import versions
from modes_cli.run_folder import RunFolder
from modes_cli.search.calibrated import model_spec, recalled
from modes_cli.search.candidates import ScoreCounts, candidate
from modes_cli.search.objective import Point
from modes_cli.search.problem import Problem, Target
from modes_cli.search.strategies import exhaustive, frontier
from modes_cli.skipping.measured import Measured
from modes_cli.skipping.registry import named

TARGETS = (0.5, 0.67, 0.75, 0.83, 0.88, 0.92)
PASSES = 20


def compare(run: RunFolder, policy: str, grid: int, passes: int = PASSES) -> dict[str, Any]:
    """Of each target: KL of the search's point and of the grid's best one, with what both skip."""
    calibration = run.read(Calibration)
    with recalled(run, calibration, model_spec(calibration, "auto", False)) as calibrated:
        objective = calibrated.objective
        made = candidate(named(policy), Measured(calibration, run), ScoreCounts(calibrated.counts, objective))
        scoring = objective.passes
        found = {}
        for target in TARGETS:
            objective.forget()
            problem, before = Problem(made, Target(target), objective), objective.passes
            frontier(problem, grid, passes - int(scoring))
            found[target] = problem.best(), objective.passes - before + scoring
        everything = Problem(made, Target(0.0), objective)
        before = objective.passes
        exhaustive(everything, grid, 0)
        pairs = objective.passes - before
    rows = []
    for target, (best, spent) in found.items():
        feasible = [point for point in everything.measured if Target(target).met_by(point) and Target(target).close_to(point)]
        least = min(feasible, key=lambda point: point.kl, default=None)
        rows.append(
            {"target": target, "search": _row(best), "passes": spent, "exhaustive": _row(least), "pairs": len(feasible)}
        )
        if best is not None and least is not None:
            rows[-1]["search_over_exhaustive"] = best.kl / least.kl
    return {"policy": policy, "grid": grid, "exhaustive_passes": pairs, "rows": rows}


def _row(point: Point | None) -> dict[str, Any] | None:
    return None if point is None else {"kl": point.kl, "skip_ratio": point.skip_ratio, "tau": point.tau}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--policy", action="append", required=True)
    parser.add_argument("--grid", type=int, default=20)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    run = RunFolder(given.run)
    compared = [compare(run, one, given.grid) for one in given.policy]
    content = {
        "command": f"python -m tools.exhaustive_search RUN --policy {' --policy '.join(given.policy)} --grid {given.grid}",
        "versions": versions().model_dump(),
        "samples": run.read(Calibration).samples,
        "policies": compared,
    }
    given.output.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    for policy in compared:
        print(policy["policy"], f"grid {policy['grid']}: {policy['exhaustive_passes']:g} passes")
        for row in policy["rows"]:
            print({name: row[name] for name in ("target", "passes", "search", "exhaustive")}, row.get("search_over_exhaustive"))


if __name__ == "__main__":
    main()
