"""Which of several processes this is, as `torchrun` and `accelerate launch` say it in the environment. Free of torch."""

import os
from dataclasses import dataclass

from modes_cli.errors import BadOption

SHARDED = ("calibrate", "search")  # the commands that share their work out


@dataclass(frozen=True)
class Place:
    """`rank` of `world` processes; `local` is the rank among those of this machine."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0


def place() -> Place:
    """This process's place. Without WORLD_SIZE, or with 1, there is no other process.

    Raises:
        BadOption: the variables are no numbers, or contradict each other.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return Place()
    world, rank = _number("WORLD_SIZE"), _number("RANK")
    local = _number("LOCAL_RANK", rank)
    if not rank < world:
        raise BadOption(f"RANK is `{rank}` where WORLD_SIZE is `{world}`", hint=_HINT)
    return Place(rank, world, local)


def is_first() -> bool:
    """Whether this process writes and prints; so does one whose environment makes no sense."""
    try:
        return place().first
    except BadOption:
        return True


def require_shared(command: str) -> None:
    """Raises BadOption for a command that several processes cannot share."""
    if command and not command.startswith("-") and command not in SHARDED and (world := place().world) > 1:
        raise BadOption(
            f"`modes {command}` runs as one process, not as `{world}`",
            hint=f"start it without a launcher; {' and '.join(SHARDED)} share their work out",
        )


_HINT = "start it with `torchrun` or `accelerate launch -m modes_cli ...`, or unset WORLD_SIZE"


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal() or len(text) > 9:
        raise BadOption(f"{name} is `{text}`, not a number, while WORLD_SIZE is set", hint=_HINT)
    return int(text)
