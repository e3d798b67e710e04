"""What was done to break `modes`, counted: each section is a module that measures, and says its numbers as rows of a table.

A section `NAME` is `tools/trust/NAME.py` with `measure(long: bool) -> dict`, whose result JSON can hold,
`rows(result: dict) -> list[tuple[str, str]]`, (what, number), and `is_sound(result: dict) -> bool`. `python -m tools.trust`
runs sections, keeps each result in docs/benchmarks/trust-NAME.json, and writes docs/trust.md from these files.
"""

# In the order of the page, with what a reader calls them.
SECTIONS = {
    "kills": "Killed",
    "faults": "Disk, memory, processes",
    "hostile": "Hostile files",
    "fuzz": "Fuzzing",
    "soak": "Under load",
}
