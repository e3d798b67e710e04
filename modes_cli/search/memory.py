"""What passes over the calibration set have found, for a search that is stopped.

Strategies decide by measured points alone. So a search that is continued runs again from its start, and finds in the file what
every pass had found until it comes to the one that was stopped; that goes on after its last saved batch. What a pass cost
counts as if it had been made, so the artifact has the same bytes.

Several processes save after each pass, not after each batch, since a batch is known only to the one that measured it; and not
what listeners heard, which is made again.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from modes_cli.distributed import ALONE, Ranks
from modes_cli.skipping.policy import Rule
from modes_cli.unfinished import State, Unfinished

Tensors = Mapping[str, Tensor]


class Memory:
    """Found points and heard states by name, and the pass that is under way.

    Args:
        unfinished: the file, if there is one to be; only the first process uses it.
        fresh: begin with nothing.
    """

    def __init__(self, unfinished: Unfinished | None = None, ranks: Ranks = ALONE, *, fresh: bool = False) -> None:
        self._file, self._ranks = unfinished if ranks.first else None, ranks
        self._points: dict[str, dict[str, Any]] = {}
        self._heard: dict[str, Tensors] = {}
        self._half: tuple[str, int, Tensors] | None = None
        before = None if self._file is None or fresh else self._file.restore()
        if before is not None:
            self._take(before)
        self._points = json.loads(ranks.tell(json.dumps(self._points)))

    def point(self, name: str) -> dict[str, Any] | None:
        """What a pass has found."""
        return self._points.get(name)

    def heard(self, name: str) -> Tensors | None:
        """What a listener has heard in a pass."""
        return self._heard.get(name)

    def half(self, name: str) -> tuple[int, Tensors]:
        """How many batches of a pass are done, and what is known of them."""
        if self._half is None or self._half[0] != name:
            return 0, {}
        _, done, tensors = self._half
        return done, tensors

    @property
    def due(self) -> bool:
        """Whether `keep_half` would save."""
        return self._file is not None and self._ranks.world == 1 and self._file.due

    def keep_half(self, name: str, done: int, tensors: Tensors) -> None:
        """A pass has come so far. Call it where `due`."""
        self._half = name, done, tensors
        self._save()

    def keep_point(self, name: str, found: dict[str, Any]) -> None:
        self._points[name] = found
        self._ended(name)

    def keep_heard(self, name: str, found: Tensors) -> None:
        if self._ranks.world == 1:
            self._heard[name] = found
        self._ended(name)

    def remove(self) -> None:
        """The command is done."""
        if self._file is not None:
            self._file.remove()

    def _ended(self, name: str) -> None:
        if self._half is not None and self._half[0] == name:
            self._half = None
        self._save()

    def _save(self) -> None:
        if self._file is None or not self._file.due:
            return
        names = list(self._heard)
        tensors = {f"heard.{names.index(name)}.{key}": one for name in names for key, one in self._heard[name].items()}
        half = None
        if self._half is not None:
            half = self._half[:2]
            tensors |= {f"half.{key}": one for key, one in self._half[2].items()}
        self._file.save(State(len(self._points) + len(names), tensors, {"points": self._points, "heard": names, "half": half}))

    def _take(self, before: State) -> None:
        def below(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): one for name, one in before.tensors.items() if name.startswith(prefix)}

        self._points = before.notes["points"]
        if self._ranks.world == 1:
            self._heard = {name: below(f"heard.{number}.") for number, name in enumerate(before.notes["heard"])}
            if before.notes["half"] is not None:
                name, done = before.notes["half"]
                self._half = name, done, below("half.")


def pass_name(what: str, rule: Rule, batches: int) -> str:
    """Of a pass with a rule over the first `batches` batches: equal for passes that find the same."""
    scale, tau, contribution = rule.key
    digest = hashlib.sha256()
    for part in (scale, tau, contribution.encode()):
        digest.update(len(part).to_bytes(8, "little") + part)
    return f"{what} {batches} {digest.hexdigest()}"
