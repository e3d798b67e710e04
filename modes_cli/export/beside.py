"""Two things at a time: tracing needs the interpreter all the time, while reading, writing and digesting let go of it."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
Check = Callable[[], None]


class Stopped(Exception):
    """What `check` raises in work whose result nobody waits for any more."""


@contextlib.contextmanager
def beside(work: Callable[[Check], T]) -> Iterator[Future[T]]:
    """Do `work` in a thread of its own while the block runs. After the block its result is there, or its error is raised.

    Args:
        work: calls the function it is given every now and then. That raises Stopped there once the block has failed or was
            interrupted; the block's own error is then what leaves here, and no thread is left.

    Yields:
        The future, so that a long block can ask whether work has failed meanwhile: `raise_failure`.
    """
    stop = threading.Event()

    def check() -> None:
        if stop.is_set():
            raise Stopped

    with ThreadPoolExecutor(1, "beside") as pool:
        future = pool.submit(work, check)
        try:
            yield future
            future.result()
        except BaseException:  # an interrupt as well: the thread must not write into a folder that is being removed
            stop.set()
            raise


def raise_failure(future: "Future[T]") -> None:
    """Raises what the work beside has raised, if it has ended so."""
    if future.done():
        future.result()
