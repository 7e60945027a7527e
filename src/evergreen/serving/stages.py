"""Where the time of a request goes: a histogram by stage, and a span each where the request is traced."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum
from types import TracebackType
from typing import Protocol

from prometheus_client import Histogram

_SECONDS = Histogram(
    "evergreen_stage_seconds",
    "Seconds that a call spent in a stage.",
    ["stage"],
    buckets=(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0),
)


class Stage(StrEnum):
    """Parts of the way from a call to its answer."""

    PARSE = "parse"  # bytes to checked requests
    USER_FEATURES = "user_features"  # the online store's round trip
    RETRIEVE = "retrieve"  # candidates, for requests that bring none
    SCORE = "score"
    RULES = "rules"  # filters, diversity and order
    ENCODE = "encode"  # answers to bytes


class Span(Protocol):
    """What is asked of an OpenTelemetry span."""

    def end(self) -> None:
        """Now."""


_OF_STAGE = {stage: _SECONDS.labels(stage.value) for stage in Stage}
_start_span: Callable[[str], Span] | None = None


def trace_stages(start_span: Callable[[str], Span] | None) -> None:
    """Have every stage started as a span from now on; None: no longer.

    Args:
        start_span: from a name to a span that has begun, a child of the request's own.
    """
    global _start_span
    _start_span = start_span


class timed:  # noqa: N801  (a context manager, used like a function)
    """Measures a stage: `with timed(Stage.SCORE): …`. Made for hot code: a class costs a third of a generator."""

    __slots__ = ("_histogram", "_span", "_stage", "_started")

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._histogram = _OF_STAGE[stage]

    def __enter__(self) -> None:
        self._span = None if _start_span is None else _start_span(self._stage.value)
        self._started = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._histogram.observe(time.perf_counter() - self._started)
        if self._span is not None:
            self._span.end()
