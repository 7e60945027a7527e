"""Run a pipeline on this machine by kfp.local: the same steps as on a cluster, each in a process of its own."""

import builtins
import contextlib
import io
import json
import logging
import re
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from kfp import local

from evergreen.contracts import errors
from evergreen.step import ERROR_MARKER, PROGRESS_MARKER

_ANSI = re.compile(r"\x1b\[\d+m")
_TAIL_LINES = 30


class _StepLog(io.TextIOBase):
    """Takes what kfp.local prints: everything goes to the log file, lines meant for a person also to `on_progress`."""

    def __init__(self, file: TextIO, on_progress: Callable[[str], None]) -> None:
        self._file = file
        self._on_progress = on_progress
        self._partial = ""
        self._lock = threading.Lock()  # two steps of a ParallelFor print at a time
        self.tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self.error: errors.EvergreenError | None = None

    def write(self, text: str) -> int:
        """Take text; complete lines are looked at."""
        with self._lock:
            self._file.write(text)
            *lines, self._partial = (self._partial + text).split("\n")
            for line in lines:
                self._look_at(_ANSI.sub("", line).strip())
        return len(text)

    def _look_at(self, line: str) -> None:
        if line:
            self.tail.append(line)
        if line.startswith(PROGRESS_MARKER):
            self._on_progress(line.removeprefix(PROGRESS_MARKER))
        elif line.startswith(ERROR_MARKER):
            said = json.loads(line.removeprefix(ERROR_MARKER))
            self.error = getattr(errors, said["type"], errors.EvergreenError)(said["message"])

    def flush(self) -> None:
        """Pass on to the log file."""
        self._file.flush()


def run_locally(
    pipeline: Callable[..., Any],
    arguments: dict[str, Any],
    *,
    root: Path,
    log: Path,
    on_progress: Callable[[str], None],
) -> dict[str, Any]:
    """Run a pipeline with kfp.local's SubprocessRunner.

    Args:
        pipeline: a function decorated with @dsl.pipeline.
        arguments: its parameters.
        root: folder that the artifacts go under.
        log: file that everything the steps print goes to.
        on_progress: called with each line that tells a person how a step is getting on.

    Returns:
        The pipeline's outputs by name: parameters as values, artifacts as kfp artifacts with a `path`.

    Raises:
        EvergreenError: a step said what is wrong; the same error that it raised.
        RuntimeError: a step failed without saying so; the message ends with the last lines of its log.
    """
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(root))
    own_print, root_logger = builtins.print, logging.getLogger()
    own_handlers, own_level = root_logger.handlers[:], root_logger.level
    with log.open("w", encoding="utf-8") as file:
        stream = _StepLog(file, on_progress)
        try:
            root_logger.handlers[:] = [logging.StreamHandler(stream)]  # or a failed step is also reported on stderr
            with contextlib.redirect_stdout(stream):  # type: ignore[type-var]
                outputs: dict[str, Any] = pipeline(**arguments).outputs
        except RuntimeError as error:
            if stream.error is not None:
                raise stream.error from error
            tail = "\n".join(f"    {line}" for line in stream.tail)
            raise RuntimeError(f"{_ANSI.sub('', str(error))}\n{tail}\nThe whole log is {log}.") from error
        finally:
            # kfp.local wraps both, and two parallel steps may restore them in the wrong order.
            builtins.print = own_print
            root_logger.handlers[:] = own_handlers
            root_logger.setLevel(own_level)
    return outputs
