"""Progress for tests of what people are told."""


class Notes:
    """Progress that keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def start(self, label: str, total: int) -> None:
        pass

    def advance(self, pieces: int = 1) -> None:
        pass

    def note(self, text: str) -> None:
        self.said.append(text)
