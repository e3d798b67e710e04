"""What is saved of unfinished work, and what is not used again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modes_cli import unfinished
from modes_cli.unfinished import State, Unfinished
from tests.notes import Notes

MADE_FROM = {"model.digest": "a", "options.batch_size": 2, "options.none": None}
TENSORS = {
    "bytes": torch.arange(3, dtype=torch.uint8),
    "sums": torch.tensor([[0.1, -0.0], [float("inf"), 1e-300]], dtype=torch.float64),
    "counts": torch.arange(5),
    "turned": torch.arange(6, dtype=torch.float32).view(2, 3).T,
    "narrow": torch.tensor([1.5], dtype=torch.bfloat16),
    "nothing": torch.zeros(0, 4),
    "one": torch.tensor(7),
}
NOTES = {"texts": ["ü", "\ud800", ""], "seconds": 0.1 + 0.2, "none": None}


@pytest.fixture(autouse=True)
def _save_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unfinished, "INTERVAL", 0.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / unfinished.file_name("calibration.json")
    Unfinished(path, MADE_FROM).save(State(3, TENSORS, NOTES))
    return path


def test_everything_comes_back_to_the_bit(path: Path) -> None:
    assert path.name == "calibration.unfinished.safetensors"
    notes = Notes()
    found = Unfinished(path, dict(reversed(MADE_FROM.items())), notes).restore()
    assert found is not None
    assert (found.done, found.notes, notes.said) == (3, NOTES, [])
    assert found.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)
    assert load_file(path).keys() == {*TENSORS, unfinished.NOTES}  # as the library reads it


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({**MADE_FROM, "options.batch_size": 3}, "options.batch_size was `2` and is `3`"),
        ({k: v for k, v in MADE_FROM.items() if k != "options.none"}, "options.none was `None` and is `(missing)`"),
        ({**MADE_FROM, "options.seed": None}, "options.seed was `(missing)` and is `None`"),
        ({}, "model.digest was `a`"),
    ],
)
def test_of_something_else_it_is_not_used(path: Path, other: dict[str, object], says: str) -> None:
    notes = Notes()
    assert Unfinished(path, other, notes).restore() is None
    (said,) = notes.said
    assert says in said or not other
    assert str(path) in said


def test_not_one_altered_byte_is_used(path: Path) -> None:
    raw = path.read_bytes()
    for place in range(0, len(raw), 7):
        altered = bytearray(raw)
        altered[place] ^= 1
        path.write_bytes(altered)
        found = Unfinished(path, MADE_FROM, notes := Notes()).restore()
        # Spaces and the order of keys carry nothing.
        assert found is None or (found.done, found.notes) == (3, NOTES), place
        assert found is None or all(torch.equal(found.tensors[name], TENSORS[name]) for name in TENSORS), place
        assert bool(notes.said) == (found is None)
    for length in (0, 7, 100, len(raw) - 1):
        path.write_bytes(raw[:length])
        assert Unfinished(path, MADE_FROM, notes := Notes()).restore() is None
        assert "is damaged; it is not used" in notes.said[0]


def test_nothing_is_said_where_nothing_is(tmp_path: Path) -> None:
    notes = Notes()
    assert Unfinished(tmp_path / "none", MADE_FROM, notes).restore() is None
    assert notes.said == []


def test_saved_by_time_and_seldom_where_that_takes_long(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now = [0.0]
    monkeypatch.setattr(unfinished, "INTERVAL", 60.0)
    monkeypatch.setattr(unfinished.time, "monotonic", lambda: now[0])
    interval = unfinished.Interval()
    for then, due in ((59.9, False), (60.0, True)):
        now[0] = then
        assert interval.due is due
    with interval.spending():
        now[0] = 70.0  # it took 10 seconds
    for then, due in ((140.0, False), (269.0, False), (270.0, True)):
        now[0] = then
        assert interval.due is due
    file = Unfinished(tmp_path / "file", MADE_FROM)
    file.save(State(1))
    assert list(tmp_path.iterdir()) == []
