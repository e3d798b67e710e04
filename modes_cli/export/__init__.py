"""From thresholds and a checkpoint to a folder that deploys. Loaded on first use: a runtime needs only the checks."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modes_cli.export.bundle import export_bundle

__all__ = ["export_bundle"]


def __getattr__(name: str) -> Any:
    if name == "export_bundle":
        from modes_cli.export.bundle import export_bundle

        return export_bundle
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
