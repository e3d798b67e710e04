"""How the core says how far it is, without printing."""

from typing import Protocol


class Progress(Protocol):
    """A caller may show this as a bar, as lines, or not at all."""

    def start(self, label: str, total: int) -> None:
        """A stage of `total` equal pieces begins; it replaces the stage before."""
        ...

    def advance(self, pieces: int = 1) -> None:
        """That many pieces are done. Also called from other threads than the one that called `start`."""
        ...

    def note(self, text: str) -> None:
        """Something that the user should know although it stops nothing."""
        ...


class Silent:
    """Shows nothing."""

    def start(self, label: str, total: int) -> None:
        pass

    def advance(self, pieces: int = 1) -> None:
        pass

    def note(self, text: str) -> None:
        pass
