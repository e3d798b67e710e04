"""Reading JSON so that no two readers understand it differently: no key twice, no NaN, no half characters."""

import json
import re
from pathlib import Path
from typing import Any, NoReturn

from modes_cli import files
from modes_cli.errors import BadArtifact

_HALF_A_CHARACTER = re.compile("[\ud800-\udfff]")


class _Twice(ValueError):
    pass


def read(path: Path, limit: int) -> Any:
    """What a JSON file of at most `limit` bytes holds.

    Raises:
        BadArtifact: too large, not UTF-8, not JSON, or JSON that readers differ about. Names the place.
    """
    text = files.read_text(path, limit)
    try:
        tree = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise BadArtifact(str(path), f"line {error.lineno} column {error.colno}", f"not JSON: {error.msg}") from error
    except RecursionError as error:
        raise BadArtifact(str(path), "nesting", "too deep") from error
    except _Twice as error:
        raise BadArtifact(str(path), f"field `{error}`", "occurs twice in one object") from error
    except ValueError as error:
        raise BadArtifact(str(path), "number", str(error)) from error
    if "\\u" in text and (half := _HALF_A_CHARACTER.search(json.dumps(tree, ensure_ascii=False))):
        raise BadArtifact(str(path), "text", f"`{ascii(half[0])[1:-1]}` is half a character")
    return tree


def _object(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) != len(items):
        seen: set[str] = set()
        raise _Twice(next(key for key, _ in items if key in seen or seen.add(key))[:200])  # type: ignore[func-returns-value]
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"`{name}` is not a finite number")
