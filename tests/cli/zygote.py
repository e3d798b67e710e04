"""A process that has imported torch and transformers, and forks one child for each command line it is given.

Each child runs `modes_cli.app.main` with its own descriptors, limits and exit code, as `python -m modes_cli` would; only the
5 seconds of imports are spent once. Run as `python -m tests.cli.zygote`: one JSON object per line on stdin asks for a
command, two lines on stdout answer, the child's process id and then how it ended.
"""

import gc
import importlib
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

PAGE = resource.getpagesize()
# Where a write can be cut: these are called before, between and after all steps that readers can see.
STEPS = ("fsync", "replace", "rename", "unlink")


# Everything that starts no thread: a fork keeps only the one that forks. So neither onnxruntime nor pyarrow.
PRELOADED = (
    "modes_cli.calibration.calibrate",
    "modes_cli.evaluation.evaluate",
    "modes_cli.export.bundle",
    "modes_cli.models.profiling",
    "modes_cli.runtime.torch_model",
    "modes_cli.search.find",
    "transformers.models.auto",
    "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe",
)


def child(asked: dict[str, Any]) -> NoReturn:
    """Become the command: descriptors, folder, environment and limits first."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, path in ((1, asked["out"]), (2, asked["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), descriptor)
    os.chdir(asked["cwd"])
    os.environ.update(asked["env"])
    if asked["file_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (asked["file_bytes"], asked["file_bytes"]))
    if asked["more_memory"] is not None:
        now = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE
        resource.setrlimit(resource.RLIMIT_AS, (now + asked["more_memory"],) * 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells switch it off for what runs in the background
    if asked["interval"] is not None:
        from modes_cli import unfinished

        unfinished.INTERVAL = asked["interval"]
    if asked["die_at"] is not None:
        die_at(asked["die_at"])
    from modes_cli import app

    code = 1
    try:
        app.main(asked["arguments"])
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
        sys.stdout.flush()
    except BaseException:  # as the interpreter would show it
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)  # tearing an interpreter down takes longer than the command


def die_at(step: int) -> None:
    """SIGKILL just before the file operation of that number, counted from 0."""
    left = [step]

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return original(*args, **kwargs)

        return operation

    for name in STEPS:
        setattr(os, name, counted(getattr(os, name)))
    from modes_cli import files

    files._rename_folder = counted(files._rename_folder)


def main() -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a thread is running: its locks would be copied in any state"
    gc.collect()
    gc.freeze()  # collecting in a child would copy all of this
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            child(json.loads(line))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
