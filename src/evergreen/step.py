"""What every pipeline step does around its one call: say what went wrong to a person, and measure itself."""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from evergreen.contracts.errors import EvergreenError

PROGRESS_MARKER = "» "
"""Starts every line that tells a person how a step is getting on."""

ERROR_MARKER = "EVERGREEN-ERROR "
"""Starts the one line that a failed step writes for whoever runs the pipeline; JSON (`type`, `message`) follows."""


@contextmanager
def pipeline_step(name: str) -> Iterator[dict[str, Any]]:
    """Run the body of a step: log to the step's log, measure, and turn a person's mistake into one plain line.

    Yields a dictionary that is filled in when the block ends, to be returned as the step's `usage` output:
    `step`, `wall_seconds` (since the process started, imports included), `compute_seconds` (the block alone),
    `cpu_seconds` and `peak_memory_mb` (of the process).

    Raises:
        SystemExit: an EvergreenError was raised in the block; its message has been written behind ERROR_MARKER.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout, force=True)
    logger = logging.getLogger("evergreen")
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter(f"{PROGRESS_MARKER}{name}: %(message)s"))
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    usage: dict[str, Any] = {}
    start = time.perf_counter()
    try:
        yield usage
    except EvergreenError as error:
        print(ERROR_MARKER + json.dumps({"type": type(error).__name__, "message": str(error)}), flush=True)
        raise SystemExit(1) from error
    own = resource.getrusage(resource.RUSAGE_SELF)
    kilobytes = own.ru_maxrss if sys.platform != "darwin" else own.ru_maxrss / 1024
    usage.update(
        step=name,
        wall_seconds=round(time.time() - psutil.Process().create_time(), 2),
        compute_seconds=round(time.perf_counter() - start, 2),
        cpu_seconds=round(own.ru_utime + own.ru_stime, 2),
        peak_memory_mb=round(kilobytes / 1024, 1),
    )
    logger.info(
        "done in %.1f s (%.1f s of work), %.0f MB at most",
        usage["wall_seconds"],
        usage["compute_seconds"],
        usage["peak_memory_mb"],
    )
