"""`modes verify`: whether a bundle is whole and will run here."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from modes_cli import console, options
from modes_cli.errors import BadArtifact, MissingArtifact

if TYPE_CHECKING:
    from modes_cli.requests import Check


def verify(
    bundle: options.Bundle, json: options.Json = False, quiet: options.Quiet = False, debug: options.Debug = False
) -> None:
    """Check a bundle: digests, schemas, graphs, weights, kernels."""
    with console.session(json=json, quiet=quiet, debug=debug) as out:
        require_bundle(bundle)
        from modes_cli.export.verify import verify_bundle

        checks = verify_bundle(bundle)
        out.show(result(checks), *tables(checks))
        require_ok(bundle, checks)


def require_bundle(bundle: Path) -> Path:
    """Raises MissingArtifact where there is no bundle, before anything heavy is imported."""
    if not (bundle / "bundle.json").is_file():
        raise MissingArtifact(str(bundle / "bundle.json"), f"modes export --output {bundle}")
    return bundle


def require_ok(bundle: Path, checks: "list[Check]") -> None:
    """Raises BadArtifact, naming the first thing that is wrong."""
    wrong = [check for check in checks if not check.ok]
    if wrong:
        raise BadArtifact(
            str(bundle), wrong[0].name, wrong[0].detail, hint="export it again, or fetch an unaltered copy; do not use this one"
        )


def result(checks: "list[Check]") -> dict[str, Any]:
    """What scripts get of a verification."""
    return {
        "ok": all(check.ok for check in checks),
        "checks": [{"name": c.name, "ok": c.ok, "detail": c.detail} for c in checks],
    }


def tables(checks: "list[Check]") -> list[Any]:
    """What people get of a verification."""
    return [*(f"{'ok   ' if check.ok else 'WRONG'}  {check.name}: {check.detail}" for check in checks)]
