"""Run sections and write docs/trust.md: `python -m tools.trust [--long] [--page] [NAME...]`.

Without names, all sections. `--long` is what is done for a release; `--page` measures nothing and only writes the page. The
exit code is 1 if a result is not as it should be; it is written nevertheless.
"""

import argparse
import importlib
import sys
import time

from tools.trust import SECTIONS, page, record


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.trust", description="Try to break modes, and count.")
    parser.add_argument("--long", action="store_true", help="as often as for a release")
    parser.add_argument("--page", action="store_true", help="only write docs/trust.md from the results that are there")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"sections, of {', '.join(SECTIONS)}; all, if none is named")
    asked = parser.parse_args()
    unknown = [name for name in asked.names if name not in SECTIONS]
    if unknown or (asked.page and asked.names):
        parser.error(f"no section `{unknown[0]}`" if unknown else "--page measures no section")
    unsound = []
    for name in () if asked.page else asked.names or SECTIONS:
        began = time.monotonic()
        result = importlib.import_module(f"tools.trust.{name}").measure(asked.long)
        written = record.write(name, record.command(name, asked.long), result)
        print(f"{name}: {time.monotonic() - began:.0f} s, written: {written}", flush=True)
        for what, number in record.rows(name, result):
            print(f"  {what}: {number}", flush=True)
        unsound += [] if record.is_sound(name, result) else [name]
    print(f"written: {page.write()}")
    if unsound:
        print(f"not as it should be: {', '.join(unsound)}", file=sys.stderr)
    return 1 if unsound else 0


if __name__ == "__main__":
    raise SystemExit(main())
