"""Every error a user can meet: class, exit code, message, hint. The core raises these; commands never catch them.

`kind` is what `--json` reports; it is the class name in snake case. Messages carry the offending value in backticks.
"""

import errno
import re

LONGEST_MESSAGE = 400  # characters of a library's; it can be pages long
LONGEST_ERROR = 4000  # characters of one of ours: the value in it may be a tree that somebody else wrote
_MEMORY_WORDS = (
    "out of memory", "allocate memory", "not enough memory", "no memory for", "bad_alloc", "can't start new thread",
)  # fmt: skip
# oneDNN's whole words when memory for its generated code or its scratchpad is refused. What it does not support fails one
# step earlier, at "a primitive descriptor".
_MEMORY_MESSAGES = ("could not create a primitive", "could not execute a primitive", "could not create a memory object")


def _bounded(message: str) -> str:
    """At most LONGEST_ERROR characters: the beginning, which says what it is about, and the end, which says why."""
    half = LONGEST_ERROR // 2 - 3
    return message if len(message) <= LONGEST_ERROR else f"{message[:half]} [..] {message[-half:]}"


class ModesError(Exception):
    """Base class. `exit_code` is what the process returns, `hint` what the user can do next.

    `usual_hint` stands in where whoever raises the error knows nothing better.
    """

    exit_code = 1
    usual_hint: str | None = None

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(_bounded(message))
        self.hint = hint or self.usual_hint

    @property
    def kind(self) -> str:
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()


class BadModel(ModesError):
    """The checkpoint cannot be found, read or used: no MoE layers, text only, not a model."""

    usual_hint = "fetch it again, or give another checkpoint"


class UnknownLayout(ModesError):
    """The experts of a model have a class or shapes that are not understood. We never guess."""

    usual_hint = "this family is not supported yet"


class BadData(ModesError):
    """Samples are missing, unreadable or of the wrong form."""

    usual_hint = "correct the data, or choose other data with `--data`"


class BadOption(ModesError):
    """An option's value makes no sense here; the usage is right, the value is not."""

    usual_hint = "`--help` says what each option takes"


class UnreachableTarget(ModesError):
    """No thresholds skip as much as asked."""

    def __init__(self, target: float, largest: float, policy: str) -> None:
        super().__init__(
            f"no thresholds skip `{target:.4g}` of the experts; the most that policy `{policy}` reaches is `{largest:.4f}`",
            hint=f"ask for `--target {int(largest * 100) / 100:.2f}` or less; special tokens are never skipped but counted",
        )
        self.largest = largest


class MissingArtifact(ModesError):
    """A step before this one has not been run in this run folder."""

    def __init__(self, path: str, renew: str) -> None:
        super().__init__(f"`{path}` does not exist", hint=f"make it first: `{renew}`")


class StaleArtifact(ModesError):
    """An artifact was made from something else than what is being used now."""

    def __init__(self, path: str, field: str, found: object, expected: object, renew: str) -> None:
        super().__init__(f"`{path}` was made with {field} `{found}`, this run uses `{expected}`", hint=f"renew it: `{renew}`")


class BadArtifact(ModesError):
    """A file is truncated, altered or hostile. Nothing of it was loaded."""

    def __init__(self, path: str, where: str, problem: str, *, hint: str | None = None) -> None:
        super().__init__(f"`{path}`: {where}: {problem}", hint=hint or "make it again, or fetch an unaltered copy")


class WriteFailed(ModesError):
    """The disk is full or the folder cannot be written. What was finished before is still valid."""


class RunLocked(ModesError):
    """Another process is writing in the run folder."""


class ElsewhereFailed(ModesError):
    """Another of several processes failed, and this one ends with it: the same exit code, kind and hint."""

    def __init__(self, rank: int, world: int, exit_code: int, kind: str, message: str, hint: str | None) -> None:
        super().__init__(f"process `{rank}` of {world}: {message}", hint=hint)
        self.exit_code, self._kind = exit_code, kind

    @property
    def kind(self) -> str:
        return self._kind


class ProcessLost(ModesError):
    """One of several processes is gone, never came, or does not answer. `own`: what had gone wrong here by then."""

    def __init__(self, rank: int, world: int, own: str | None = None) -> None:
        lost = "has lost another one, which ended or does not answer"
        super().__init__(
            f"process `{rank}` of {world} {lost}" if own is None else f"process `{rank}` of {world}: {own}",
            hint="what the others wrote last may say more; what was finished is valid: the same command continues",
        )


class VllmMismatch(ModesError):
    """A vLLM, or a model in it, to which a bundle's thresholds cannot be applied exactly."""

    usual_hint = "docs/vllm.md says what is supported; unset `MODES_BUNDLE` to serve without skipping"


class GateFailed(ModesError):
    """A quality gate did not hold; pipelines stop here."""

    exit_code = 3


class KernelError(ModesError):
    """The operator library is missing, or refused its arguments."""

    exit_code = 2


def is_memory(error: BaseException) -> bool:
    """Whether an exception of any library means that memory ran out; nobody should report that as something else."""
    # torch raises RuntimeError on the CPU and its own OutOfMemoryError on CUDA; neither is a MemoryError
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    said = str(error).strip().lower()
    # ONNX Runtime's exceptions are its own, with no public base class.
    library = isinstance(error, RuntimeError) or type(error).__module__.startswith("onnxruntime")
    return library and (said in _MEMORY_MESSAGES or any(words in said for words in _MEMORY_WORDS))


def first_line(error: BaseException) -> str:
    """What a library's exception says, in one line of bearable length."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if len(text) <= LONGEST_MESSAGE else text[:LONGEST_MESSAGE] + "..."
