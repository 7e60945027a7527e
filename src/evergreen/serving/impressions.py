"""Writes the impression log beside the requests: they leave references in a bounded queue, one thread does all else.

`ImpressionLog.record` never blocks and never raises. What cannot be kept is dropped and counted by its reason. A
process that is killed (kill -9) loses what it holds: what came in since the last flush, and while the sink is away all
since it went, at most `capacity_rows` rows. What the counter of written requests counts is in the sink.
"""

from __future__ import annotations

import itertools
import logging
import os
import socket
import threading
import time
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from operator import attrgetter
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from prometheus_client import Counter, Gauge

from evergreen.contracts.impressions import ITEM_FIELDS, REQUEST_FIELDS, first_rows, impression_schema, impression_table
from evergreen.contracts.training_set import Feature
from evergreen.serving.answer import Answer
from evergreen.serving.impression_sinks import Sink

if TYPE_CHECKING:
    from evergreen.models.split.request import PairColumns

# The writer shares the interpreter with the requests: woken for each of them it would hold up the next, and rows cost a
# twentieth when they are built for many requests at once.
_DRAIN_SECONDS = 1.0
_ENCODED_AT_ONCE = 500  # requests; what the queue refers to may be large, so it is let go soon
_FIRST_RETRY_SECONDS = 0.5
_LAST_RETRY_SECONDS = 30.0
_SHOWN_FIELDS = [field for field in ITEM_FIELDS if field.name != "category"]
_QUIET_SECONDS = 60.0  # between two lines about requests that cannot be encoded

logger = logging.getLogger(__name__)


class Drop(StrEnum):
    """Why impressions are lost."""

    FULL = "full"  # the sink is away, or slower than the requests
    ENCODING = "encoding"  # they cannot be written as rows of the log: a fault in the server
    REFUSED = "refused"  # the sink will not take them ever: a message too large, no such topic, no right to write
    CLOSING = "closing"  # the deadline of `close` was too short, or they came after it


class LeftOut(StrEnum):
    """Why a request is not in the log, and need not be."""

    SAMPLING = "sampling"
    NOTHING_SHOWN = "nothing_shown"


WRITTEN = Counter("evergreen_impressions_written", "Requests whose impressions are in the sink.")
DROPPED = Counter("evergreen_impressions_dropped", "Requests whose impressions were lost.", ["reason"])
LEFT_OUT = Counter("evergreen_impressions_left_out", "Requests that were not to be logged.", ["reason"])
FAILURES = Counter("evergreen_impressions_sink_failures", "Attempts to write that failed; they are repeated.")
HELD = Gauge("evergreen_impressions_held_rows", "Rows in memory, not yet in the sink.")

for _reason in Drop:  # a counter that does not exist until its first loss cannot be alarmed on
    DROPPED.labels(_reason.value)
for _left_out in LeftOut:
    LEFT_OUT.labels(_left_out.value)


class Rows(NamedTuple):
    """Rows of a table that outlives the request unchanged: Arrow tables do."""

    table: pa.Table
    rows: NDArray[np.int64]
    """(num_shown,) row of the table for each shown item; -1: nulls."""


class PairValues(NamedTuple):
    """Numbers of each shown item, of the user and the item at once."""

    names: tuple[str, ...]
    values: NDArray[np.float64]
    """(num_shown, len(names)) nan where unknown."""

    @classmethod
    def of(cls, pairs: PairColumns, places: NDArray[np.int64]) -> PairValues:
        """Those of the candidates at `places`."""
        if pairs.of is None:
            return cls(pairs.names, pairs.values[places])
        rows = pairs.of[places]
        unknown = np.full((1, len(pairs.names)), np.nan)
        return cls(pairs.names, np.concatenate([pairs.values, unknown])[rows])


Source: TypeAlias = Rows | PairValues | Mapping[str, Any]
"""Columns of the shown items; a mapping holds what is alike for all of them."""


@dataclass(frozen=True, slots=True)
class Served:
    """One answered request, by reference."""

    answer: Answer
    features: tuple[Feature, ...]
    sources: Sequence[Source]
    served_at_us: int
    sampling_rate: float

    @property
    def num_rows(self) -> int:
        """Rows that it makes; one for a log without items."""
        return len(self.answer.scores)


class ImpressionLog:
    """Logs what was served. One for each process; safe to call from several threads."""

    def __init__(
        self,
        sink: Sink,
        *,
        sampling_rate: float = 1.0,
        flush_seconds: float = 30.0,
        flush_rows: int = 20_000,
        capacity_rows: int = 100_000,
    ) -> None:
        """Start the writer.

        Args:
            sink: where the rows go; closed with the log.
            sampling_rate: share of requests that are logged, in (0, 1]; drawn by request_id, so that every server and
                every later join agrees which.
            flush_seconds: between two batches, at most.
            flush_rows: a batch is written early when it has this many.
            capacity_rows: rows held in memory at most, in the queue and in batches that wait for the sink; about 1 kB
                each, once encoded.

        Raises:
            ValueError: an argument is out of its range.
        """
        if not 0 < sampling_rate <= 1:
            raise ValueError(
                f"sampling_rate={sampling_rate}: must be above 0 and at most 1; to log nothing, have no log"
            )
        if flush_seconds <= 0 or not 1 <= flush_rows <= capacity_rows:
            raise ValueError(
                f"flush_seconds={flush_seconds}, flush_rows={flush_rows}, capacity_rows={capacity_rows}: "
                "must be positive, and flush_rows at most capacity_rows"
            )
        self._sink = sink
        self._sampling_rate = sampling_rate
        self._flush_seconds = flush_seconds
        self._flush_rows = flush_rows
        self._capacity_rows = capacity_rows
        self._lock = threading.Lock()
        self._queue: list[Served] = []
        self._held_rows = 0
        self._held_requests = 0
        self._closing = threading.Event()
        self._deadline = float("inf")
        # All below is the writer's alone.
        self._encoded: list[pa.Table] = []
        self._batches: deque[tuple[str, pa.Table]] = deque()
        self._next_flush = time.monotonic() + flush_seconds
        self._retry_seconds = 0.0
        self._quiet_until = 0.0
        self._numbers = itertools.count(1)
        self._writer = threading.Thread(target=self._run, name="impressions", daemon=True)
        self._writer.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def record(
        self,
        answer: Answer,
        features: tuple[Feature, ...],
        sources: Sequence[Source],
    ) -> None:
        """Log one answer, or count why not. Keeps references; nothing is computed or copied here.

        Args:
            answer: as it was given.
            features: that the model reads.
            sources: what together holds the features of the shown items and, where it is known, `category`; the first
                that has a column counts.
        """
        if self._sampling_rate < 1 and not _is_sampled(answer.request_id, self._sampling_rate):
            LEFT_OUT.labels(LeftOut.SAMPLING.value).inc()
            return
        served_at_us = time.time_ns() // 1000
        served = Served(answer, features, sources, served_at_us, self._sampling_rate)
        num_rows = served.num_rows
        if num_rows == 0:
            LEFT_OUT.labels(LeftOut.NOTHING_SHOWN.value).inc()
            return
        with self._lock:
            closed = self._closing.is_set()
            kept = not closed and self._held_rows + num_rows <= self._capacity_rows
            if kept:
                self._queue.append(served)
                self._held_rows += num_rows
                self._held_requests += 1
        if not kept:
            DROPPED.labels((Drop.CLOSING if closed else Drop.FULL).value).inc()

    def close(self, deadline_seconds: float = 10.0) -> None:
        """Write what is held, and stop; what is not written by the deadline is counted as lost. Safe to call again."""
        with self._lock:
            if self._closing.is_set():
                return
            self._deadline = time.monotonic() + deadline_seconds
            self._closing.set()
        self._writer.join(deadline_seconds + _FIRST_RETRY_SECONDS)
        with self._lock:
            lost, self._held_requests, self._held_rows = self._held_requests, 0, 0
        HELD.set(0)
        if lost:
            DROPPED.labels(Drop.CLOSING.value).inc(lost)
            logger.error("impressions of %d requests are lost: not written within %g s", lost, deadline_seconds)
        if not self._writer.is_alive():
            self._sink.close()

    def _run(self) -> None:
        while not self._closing.wait(min(_DRAIN_SECONDS, self._flush_seconds)):
            self._drain()
            if time.monotonic() >= self._next_flush or (
                not self._retry_seconds and sum(table.num_rows for table in self._encoded) >= self._flush_rows
            ):
                self._flush()
        self._drain()
        while not self._flush() and (left := self._deadline - time.monotonic()) > 0:
            time.sleep(min(left, _FIRST_RETRY_SECONDS))

    def _drain(self) -> None:
        """Turn what is in the queue into rows."""
        with self._lock:
            served, self._queue = self._queue, []
        for _, alike in itertools.groupby(served, key=attrgetter("features")):
            requests = list(alike)
            for start in range(0, len(requests), _ENCODED_AT_ONCE):
                self._encoded += self._encode(requests[start : start + _ENCODED_AT_ONCE])
        HELD.set(self._held_rows)

    def _encode(self, requests: list[Served]) -> list[pa.Table]:
        try:
            return [encode(requests)]
        except Exception as error:  # noqa: BLE001  (whatever it is, the other requests are still to be logged)
            if half := len(requests) // 2:  # one bad request must not take the others along
                return self._encode(requests[:half]) + self._encode(requests[half:])
            self._release(requests[0].num_rows, 1)
            DROPPED.labels(Drop.ENCODING.value).inc()
            if time.monotonic() >= self._quiet_until:
                self._quiet_until = time.monotonic() + _QUIET_SECONDS
                logger.error("request %r cannot be logged: %r", requests[0].answer.request_id, error)
            return []

    def _flush(self) -> bool:
        """Write all rows; False if the sink is away, and then they are kept."""
        self._batches += self._cut()
        try:
            while self._batches:
                self._write(*self._batches[0])
                self._batches.popleft()
        except Exception as error:  # noqa: BLE001  (each file system has errors of its own; none may end the writer)
            FAILURES.inc()
            if not self._retry_seconds:  # said once, however long it lasts
                logger.warning("impressions wait in memory, up to %d rows: %r", self._capacity_rows, error)
            self._retry_seconds = min(max(self._retry_seconds * 2, _FIRST_RETRY_SECONDS), _LAST_RETRY_SECONDS)
            self._next_flush = time.monotonic() + self._retry_seconds
            return False
        if self._retry_seconds:
            logger.warning("impressions are written again")
        self._retry_seconds = 0.0
        self._next_flush = time.monotonic() + self._flush_seconds
        HELD.set(self._held_rows)
        return True

    def _write(self, name: str, rows: pa.Table) -> None:
        requests = len(first_rows(rows))
        try:
            refused = self._sink.write(name, rows)
        except pa.ArrowException as error:  # no later attempt can mend that; a sink that is away raises other errors
            refused = requests
            logger.error("impressions of %d requests cannot be written as %s: %r", requests, name, error)
        WRITTEN.inc(requests - refused)
        DROPPED.labels(Drop.REFUSED.value).inc(refused)
        self._release(rows.num_rows, requests)

    def _cut(self) -> Iterator[tuple[str, pa.Table]]:
        """Batches of one schema and one date, named for good: a write that is repeated makes the same file."""
        tables, self._encoded = self._encoded, []
        for _, alike in itertools.groupby(tables, key=attrgetter("schema")):
            rows = pa.concat_tables(alike)
            dates = rows["served_at"].cast(pa.date32())
            for date in dates.unique():
                now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
                name = f"{now}-{socket.gethostname()}-{os.getpid()}-{next(self._numbers):06d}"
                yield name, rows.filter(pc.equal(dates, date))

    def _release(self, num_rows: int, num_requests: int) -> None:
        with self._lock:
            self._held_rows = max(self._held_rows - num_rows, 0)  # `close` may have given up on them
            self._held_requests = max(self._held_requests - num_requests, 0)


def encode(requests: Sequence[Served]) -> pa.Table:
    """The rows of some requests whose models read the same features.

    Returns:
        (sum of num_rows) with `impression_schema`.

    Raises:
        KeyError, ValueError, pyarrow.ArrowException: a feature is missing or of another type, or rows do not fit the
            answer.
    """
    schema = impression_schema(requests[0].features)
    counts = [request.num_rows for request in requests]
    owner = pa.array(np.repeat(np.arange(len(requests)), counts))
    columns = dict(
        zip([field.name for field in REQUEST_FIELDS], zip(*map(_of_request, requests), strict=True), strict=True)
    )
    arrays = {field.name: pa.array(columns[field.name], field.type).take(owner) for field in REQUEST_FIELDS}
    shown = [row for request in requests for row in _of_items(request.answer)]
    for field, values in zip(_SHOWN_FIELDS, zip(*shown, strict=True), strict=True):
        arrays[field.name] = pa.array(values, field.type)
    fields = schema.field("features").type if "features" in schema.names else ()
    features = _features(requests, counts, {field.name: field.type for field in fields} | {"category": pa.string()})
    arrays["category"] = features.get("category", pa.nulls(len(shown), pa.string()))
    return impression_table(arrays, features, schema)


def _of_request(served: Served) -> tuple[Any, ...]:
    """Values of REQUEST_FIELDS."""
    answer = served.answer
    return (
        answer.request_id,
        answer.event_timestamp,
        served.served_at_us,
        answer.user_id,
        answer.known_user,
        answer.model_version,
        answer.degraded,
        served.sampling_rate,
    )


def _of_items(answer: Answer) -> Iterator[tuple[str | None, int | None, float]]:
    """Values of ITEM_FIELDS of each row but for the category, which the sources have."""
    scores = answer.scores.tolist()
    if answer.item_ids is None:
        yield None, None, scores[0]
    else:
        yield from zip(answer.item_ids, range(1, len(scores) + 1), scores, strict=True)


def _features(
    requests: Sequence[Served], counts: Sequence[int], types: Mapping[str, pa.DataType]
) -> dict[str, pa.Array]:
    """Columns of all requests by name, from the first source that has each.

    The n-th sources of all requests are taken from at once: most are of the same columns.
    """
    found: dict[str, pa.Array] = {}
    for sources in zip(*(request.sources for request in requests), strict=True):
        wanted = {name: dtype for name, dtype in types.items() if name not in found}
        first = sources[0]
        if isinstance(first, PairValues):
            found |= _of_pairs(sources, counts, wanted)
        elif isinstance(first, Rows):
            found |= _of_tables(sources, counts, wanted)
        else:
            owner = pa.array(np.repeat(np.arange(len(requests)), counts))
            for name in wanted.keys() & first.keys():
                found[name] = pa.array([source[name] for source in sources], wanted[name]).take(owner)
    return found


def _of_pairs(
    sources: Sequence[PairValues], counts: Sequence[int], wanted: Mapping[str, pa.DataType]
) -> dict[str, pa.Array]:
    _check_counts([len(source.values) for source in sources], counts)
    names = sources[0].names
    if any(source.names != names for source in sources):
        raise ValueError("the pairs of requests of one model have other features")
    values = np.concatenate([source.values for source in sources])
    columns = {name: values[:, place] for place, name in enumerate(names) if name in wanted}
    return {name: pa.array(column, from_pandas=True) for name, column in columns.items()}


def _of_tables(
    sources: Sequence[Rows], counts: Sequence[int], wanted: Mapping[str, pa.DataType]
) -> dict[str, pa.Array]:
    names = [name for name in wanted if name in sources[0].table.column_names]
    if not names:
        return {}
    _check_counts([len(source.rows) for source in sources], counts)
    tables = {id(source.table): source.table for source in sources}
    starts = dict(zip(tables, itertools.accumulate((t.num_rows for t in tables.values()), initial=0), strict=False))
    rows = pa.array(np.concatenate([source.rows for source in sources]))
    rows = pc.if_else(pc.less(rows, 0), None, rows)
    offsets = np.repeat([starts[id(source.table)] for source in sources], counts)
    table = pa.concat_tables([table.select(names) for table in tables.values()])
    if len(tables) > 1:  # one after the other: taking from many chunks is slow
        table = table.combine_chunks()
    taken = table.take(pc.add(rows, pa.array(offsets)))
    return {name: taken[name].combine_chunks() for name in names}


def _check_counts(given: Sequence[int], counts: Sequence[int]) -> None:
    for rows, count in zip(given, counts, strict=True):
        if rows != count:
            raise ValueError(f"a source has {rows} rows for {count} shown items")


def _is_sampled(request_id: str, rate: float) -> bool:
    return zlib.crc32(request_id.encode("utf-8", "surrogatepass")) < rate * 2**32
