"""MoDES expert skipping for mixture-of-experts multimodal models.

The names below are loaded on first use, so that `import modes_cli` costs nothing and `modes --help` imports no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modes_cli.runtime.session import session
    from modes_cli.runtime.torch_model import load, skip_statistics

    __version__: str

__all__ = ["__version__", "load", "session", "skip_statistics"]

_HOME = {
    "load": "modes_cli.runtime.torch_model",
    "skip_statistics": "modes_cli.runtime.torch_model",
    "session": "modes_cli.runtime.session",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name in _HOME:
        import importlib

        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version("modes")
    except importlib.metadata.PackageNotFoundError:  # a source tree that was not installed
        return "0.1.0"
