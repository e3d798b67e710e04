"""A checkpoint's chat template is a program. transformers runs it in Jinja's sandbox, where it reaches neither files nor
Python's insides; that it ends, nobody can promise.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from jinja2 import TemplateError

from modes_cli.errors import BadData, BadModel, first_line


@contextmanager
def prompting(what: str) -> Iterator[None]:
    """Around turning a question into a prompt. `what`: which, for people.

    Raises:
        BadModel: the template is none, breaks out of the sandbox or runs too far; or the tokenizer breaks down.
        BadData: the processor does not take the question.
    """
    try:
        yield
    except (TemplateError, OverflowError, RecursionError) as error:
        raise BadModel(f"{what}: the chat template fails: {type(error).__name__}: {first_line(error)}") from error
    except (ValueError, TypeError, IndexError) as error:
        raise BadData(f"{what} cannot be turned into a prompt: {first_line(error)}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of the tokenizers library, which is written in Rust
            raise
        raise BadModel(f"{what}: the tokenizer breaks down: {first_line(error)}") from error
