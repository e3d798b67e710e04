"""docs/trust.md: a page from the files of its sections, and the counting that stands behind the faults."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.cli.process import Ended
from tools.trust import SECTIONS, fuzz, page, record
from tools.trust.__main__ import main
from tools.trust.faults import rows
from tools.trust.tally import Tally

REFUSED = "error: cannot write `x`: File too large\nhint: free some space\n"


def made_up(name: str, result: dict[str, Any]) -> list[tuple[str, str]]:
    return [(f"{name} a|b\nc", f"{result['n']:,}"), ("second", "0")]


def test_the_page_of_some_sections(tmp_path: Path) -> None:
    for name, number in (("kills", 150), ("soak", 12_000)):
        record.write(name, f"python -m tools.trust {name}", {"n": number}, tmp_path)
    text = page.render(tmp_path, made_up)
    lines = text.splitlines()
    assert lines[lines.index("|---|---|---:|") + 1 :][:7] == [
        "| Killed | kills a\\|b c | 150 |",
        "|  | second | 0 |",
        *(f"| {SECTIONS[name]} | not measured: there is no `trust-{name}.json` | |" for name in ("faults", "hostile", "fuzz")),
        "| Under load | soak a\\|b c | 12,000 |",
        "|  | second | 0 |",
    ]
    (told,) = [line for line in lines if line.startswith("- **Under load**")]
    machine = record.machine()
    assert f"`python -m tools.trust soak`, on {machine['cpu']}, {machine['cores']} cores, " in told
    assert "; modes " in told
    assert "None" not in told
    assert "(benchmarks/trust-soak.json)" in told
    assert page.render(tmp_path, made_up) == text


def test_no_section_at_all(tmp_path: Path) -> None:
    assert page.render(tmp_path, made_up).count("not measured: ") == len(SECTIONS)


def test_a_result_that_cannot_be_told(tmp_path: Path) -> None:
    record.path("kills", tmp_path).write_text(json.dumps({"result": {}}))
    with pytest.raises(ValueError, match="does not hold command, machine, result, versions"):
        page.render(tmp_path, made_up)
    record.write("kills", "x", {}, tmp_path)
    with pytest.raises(ValueError, match="has no rows"):
        page.render(tmp_path, lambda name, result: [])


def test_the_page_in_docs_is_what_the_results_give() -> None:
    """`python -m tools.trust --page` writes it."""
    assert page.PAGE.read_text("utf-8") == page.render()


@pytest.mark.parametrize("name", SECTIONS)
def test_what_is_published_is_as_it_should_be(name: str) -> None:
    tree = record.read(name)
    assert tree is not None
    assert tree["command"].startswith(record.command(name, True))
    assert record.is_sound(name, tree["result"])


def test_a_result_that_is_not_as_it_should_be_ends_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    published = record.read("fuzz")
    assert published is not None
    monkeypatch.setattr(record, "write", partial(record.write, folder=tmp_path))
    monkeypatch.setattr(page, "write", lambda: tmp_path / "trust.md")
    monkeypatch.setattr("sys.argv", ["trust", "fuzz"])
    monkeypatch.setattr(fuzz, "measure", lambda long: published["result"])
    assert main() == 0
    published["result"]["targets"]["zip_archive"]["defects"] = {"ValueError at a.py:1": {}}
    assert main() == 1
    assert capsys.readouterr().err == "not as it should be: fuzz\n"


# -- counting -------------------------------------------------------------------------------------------------------------


def test_what_is_whole(tmp_path: Path) -> None:
    before, after = {"a.bin": b"old", "kept": b"1"}, {"a.bin": b"new", "kept": b"1", "profile.json": b'{"seconds": 1, "n": 2}'}
    tally = Tally()
    for name, data in {"kept": b"1", "a.bin": b"new", ".a.bin.7.part": b"n", "profile.json": b'{"seconds": 3, "n": 2}'}.items():
        (tmp_path / name).write_bytes(data)
    tally.whole("x", tmp_path, before, after)
    assert tally.problems == []
    (tmp_path / "a.bin").write_bytes(b"ne")
    (tmp_path / "profile.json").write_bytes(b'{"n": 2')
    (tmp_path / "kept").unlink()
    tally.whole("x", tmp_path, before, after)
    assert tally.problems == [
        "x: `a.bin` is neither old nor new", "x: `profile.json` is neither old nor new", "x: `kept` is lost",
    ]  # fmt: skip


def test_what_is_the_same() -> None:
    tally = Tally()
    tally.same("x", {"a": b"12", "b": b"3"}, {"a": b"12", "b": b"3"})
    assert (tally.problems, tally.compared_files, tally.compared_bytes) == ([], 2, 3)
    tally.same("x", {"a": b"1", "more": b""}, {"a": b"12", "b": b"3"})
    assert [problem.split("`")[1] for problem in tally.problems] == ["a", "b", "more"]


def test_how_a_command_must_end() -> None:
    tally = Tally()
    assert not tally.broke("disk", "x", Ended(0, "", ""), "write_failed")
    assert tally.broke("disk", "x", Ended(1, "", REFUSED), "write_failed", "File too large")
    assert (tally.faults, tally.problems) == ({"disk": 1}, [])
    for ended in (Ended(1, "", "Traceback (most recent call last)\n"), Ended(-9, "", ""), Ended(2, "", REFUSED)):
        assert tally.broke("disk", "x", ended, "write_failed")
    assert len(tally.problems) == 3


def test_the_words_for_faults() -> None:
    compared = {"files_compared": 9, "bytes_compared": 12345}
    told = rows({"faults": {"full disk": 3, "rank killed": 2}, "problems": [], "not_tried": ["y"]} | compared)
    assert told[0] == ("faults (full disk 3, rank killed 2)", "5")
    assert told[1][1] == "0"
    assert told[2][1] == "12,345 in 9 files"
    assert told[3] == ("y", "not tried")
