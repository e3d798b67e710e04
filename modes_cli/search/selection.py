"""Which of a search's results a later step uses."""

from modes_cli import files
from modes_cli.artifacts import Calibration, Thresholds
from modes_cli.artifacts.thresholds import SearchResult
from modes_cli.errors import BadArtifact, BadOption, StaleArtifact
from modes_cli.run_folder import RunFolder
from modes_cli.skipping.policy import tau_vector
from modes_cli.skipping.registry import policy


def found_in(run: RunFolder) -> tuple[Thresholds, Calibration]:
    """A run's thresholds, and the calibration that they were found with.

    Raises:
        MissingArtifact, BadArtifact: one of the two is not there, or damaged.
        StaleArtifact: the calibration that is there now is another one.
    """
    calibration, thresholds = run.read(Calibration), run.read(Thresholds)
    digest = files.sha256(run.file(Calibration.FILE))
    if thresholds.calibration != digest:
        path, renew = str(run.file(Thresholds.FILE)), f"{run.renew(Thresholds)} --fresh"
        raise StaleArtifact(path, "calibration", thresholds.calibration[:12], digest[:12], renew)
    return thresholds, calibration


def select(thresholds: Thresholds, target: float | None, decode_target: float | None = None) -> SearchResult:
    """The result for a target; without one, the only result or the one with the largest target.

    Where there are several for a target: the one for `decode_target`; without that, the one that was searched without.

    Raises:
        BadOption: no result for that target.
        BadArtifact: its policy, parameters or groups do not exist.
    """
    for result in reversed(thresholds.results):  # in rising order
        if target in (None, result.target) and (decode_target is None or result.decode_target == decode_target):
            same = [one for one in thresholds.results if one.target == result.target and decode_target is None]
            return _checked(next((one for one in same if one.decode_target is None), result))
    known = ", ".join(_named(result.target, result.decode_target) for result in thresholds.results)
    largest = thresholds.results[-1].target if target is None else target
    options = f"--target {largest:g}" + ("" if decode_target is None else f" --decode-target {decode_target:g}")
    raise BadOption(
        f"no thresholds for target `{_named(largest, decode_target)}`; there are some for {known}",
        hint=f"search it first: `modes search {options}`",
    )


def _named(target: float, decode_target: float | None) -> str:
    return f"{target:g}" if decode_target is None else f"{target:g} (decode {decode_target:g})"


def _checked(result: SearchResult) -> SearchResult:
    where = f"result for target `{result.target:g}`"
    try:
        made = policy(result.policy, **result.parameters)
        tau_vector(result.tau)
    except (BadOption, TypeError) as error:
        raise BadArtifact(Thresholds.FILE, where, str(error)) from error
    if made.parameters != result.parameters:
        wanted, found = ", ".join(made.parameters) or "none", ", ".join(result.parameters) or "none"
        problem = f"policy `{result.policy}` has parameters {wanted}, not {found}"
        raise BadArtifact(Thresholds.FILE, where, problem)
    return result
