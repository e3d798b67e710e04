"""docs/trust.md, from the files of the sections and nothing else: the same files give the same bytes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tools.trust import SECTIONS, record

PAGE = record.FOLDER.parent / "trust.md"
Rows = Callable[[str, dict[str, Any]], list[tuple[str, str]]]
HEAD = """# What was tried

What is promised of [files](artifacts.md#rules-for-all-of-them) and [security](security.md) was put to the test and counted.
`python -m tools.trust` does it again and writes this page; parts of it run in CI as tests.
"""


def render(folder: Path = record.FOLDER, rows: Rows = record.rows) -> str:
    """The page. A section that was not measured is said to be missing."""
    table, how = ["| | what | number |", "|---|---|---:|"], []
    for name, title in SECTIONS.items():
        file = record.path(name, folder).name
        tree = record.read(name, folder)
        if tree is None:
            table.append(f"| {title} | not measured: there is no `{file}` | |")
            continue
        found = rows(name, tree["result"])
        if not found:
            raise ValueError(f"the section `{name}` has no rows")
        for number, (what, value) in enumerate(found):
            table.append(f"| {title if number == 0 else ''} | {_cell(what)} | {_cell(value)} |")
        where = f"{_words(tree['machine'])}; {_words(tree['versions'])}"
        how.append(f"- **{title}**: `{tree['command']}`, on {where}. [{file}](benchmarks/{file})")
    return "\n".join([HEAD, *table, *(["", "How each part was measured:", "", *how] if how else [])]) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _words(tree: Mapping[str, Any]) -> str:
    """`{"cpu": "X", "cores": 2, "memory": 8589934592}`: X, 2 cores, 8 GB."""
    units = {
        "memory": lambda n: f"{n / 1e9:.0f} GB memory",
        "cores": lambda n: f"{n} cores",
        "threads": lambda n: f"{n} threads",
    }
    plain = {"cpu", "device", "system", "isa"}
    return ", ".join(
        units[key](value) if key in units else f"{value}" if key in plain else f"{key} {value}"
        for key, value in tree.items()
        if value is not None
    )


def write(folder: Path = record.FOLDER) -> Path:
    from modes_cli import files

    files.write_bytes(PAGE, render(folder).encode())
    return PAGE
