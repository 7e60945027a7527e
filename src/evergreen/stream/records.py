"""Kafka messages as events: JSON objects in the columns of the log, checked by the very rules that ingest has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa

from evergreen.contracts.errors import MappingError
from evergreen.contracts.mapping import LogKind, Mapping
from evergreen.ingest.columns import check_mapping, needed_columns
from evergreen.ingest.engine import connect
from evergreen.ingest.schema import BLOCK, LEFT_OUT, ORDINAL, REASON, ROW, TIME_US, block_query
from evergreen.stream.state import Event

_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class Message:
    """A Kafka message."""

    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    timestamp_us: int | None
    """Kafka's own time of it, in microseconds since 1970."""


@dataclass(frozen=True, slots=True)
class Reject:
    """A message that breaks the schema."""

    message: Message
    reason: str


@dataclass(frozen=True)
class Checked:
    """What became of some messages; each is in exactly one of the three."""

    events: list[tuple[Message, Event]] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    """Good messages that the mapping leaves out, by reason."""


class Records:
    """Checks messages.

    A value of an object is read as its text would be in a CSV file: `true`, `12`, `0.5`, spaces around it do not count,
    and null or an absent key is an empty field. A list is a multi-valued feature.
    """

    def __init__(self, mapping: Mapping, scratch: Path, *, future_tolerance: timedelta = timedelta(minutes=5)) -> None:
        """Prepare the rules.

        Args:
            mapping: how the objects' keys become the event schema.
            scratch: a folder for DuckDB.
            future_tolerance: how far an event may be ahead of Kafka's time of its message. Kafka's, not this machine's:
                a replay then decides the same.

        Raises:
            MappingError: the mapping knows no user, or takes its time from the order of the rows.
        """
        check_mapping(mapping)
        if mapping.columns.user_id is None:
            raise MappingError(f"mapping {mapping.name}: no columns.user_id: the stream keeps what users did")
        if mapping.timestamp.column is None:
            raise MappingError(f"mapping {mapping.name}: no timestamp.column: messages need a time of their own")
        self._mapping = mapping
        self._tolerance_us = future_tolerance // _MICROSECOND
        self._window_us = mapping.split.attribution_window // _MICROSECOND
        self._separators = {f.column: f.separator for f in mapping.all_features.values()}
        self._schema = pa.schema([(name, pa.string()) for name in needed_columns(mapping)])
        wanted = f"user_id, item_id, request_id, clicked, rating, epoch_us(click_timestamp), {TIME_US}"
        query = block_query(mapping, self._schema, None)
        self._query = f"SELECT {ROW}, {REASON}, {LEFT_OUT}, {wanted} FROM ({query}) ORDER BY {ROW}"
        self._connection = connect(mapping, scratch)
        self._connection.execute("SET threads = 1")  # a few hundred rows: handing them round would take longer

    def check(self, messages: Sequence[Message]) -> Checked:
        """Check messages and read the good ones."""
        checked = Checked()
        readable: list[Message] = []
        rows: list[list[str]] = []
        for message in messages:
            row = self._texts(message)
            if isinstance(row, str):
                checked.rejects.append(Reject(message, row))
            else:
                readable.append(message)
                rows.append(row)
        for index, reason, left_out, *values in self._typed(rows):
            message = readable[index]
            if reason is None and left_out is not None:
                checked.left_out[left_out] += 1
                continue
            if reason is None:
                event = self._event(message, *values)
                reason = self._refusal(message, event)
            if reason is None:
                checked.events.append((message, event))
            else:
                checked.rejects.append(Reject(message, reason))
        return checked

    def _texts(self, message: Message) -> list[str] | str:
        """The columns' values as text, or the reason why there are none."""
        if message.value is None:
            return "message: empty"
        try:
            values = orjson.loads(message.value)
        except orjson.JSONDecodeError:
            return "message: not JSON"
        if not isinstance(values, dict):
            return "message: not a JSON object"
        texts = []
        for name in self._schema.names:
            value = values.get(name)
            text = self._text(name, value)
            if text is None:
                return f"{name}: not a single value"
            if "\0" in text:
                return f"{name}: NUL byte"
            texts.append(text)
        return texts

    def _text(self, name: str, value: Any) -> str | None:
        if isinstance(value, str):
            return value.strip(" \t")
        if value is None:
            return ""
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, int | float):
            return repr(value)
        if isinstance(value, list) and name in self._separators and all(isinstance(part, str) for part in value):
            return self._separators[name].join(value)
        return None

    def _typed(self, rows: list[list[str]]) -> list[tuple[Any, ...]]:
        """Rows of (row number, reason, why left out, values for `_event`)."""
        if not rows:
            return []
        columns = [pa.array(column, pa.string()) for column in zip(*rows, strict=True)]
        numbers = pa.array(range(len(rows)), pa.int64())
        block = pa.table([*columns, numbers, numbers], names=[*self._schema.names, ROW, ORDINAL])
        self._connection.register(BLOCK, block)
        try:
            typed: list[tuple[Any, ...]] = self._connection.execute(self._query).fetchall()
        finally:
            self._connection.unregister(BLOCK)
        return typed

    def _event(
        self,
        message: Message,
        user: str,
        item: str | None,
        request: str | None,
        clicked: bool | None,
        rating: float | None,
        click_us: int | None,
        at: int,
    ) -> Event:
        """What counts, as `activity.with_labels` and `recent` have it."""
        match self._mapping.kind:
            case LogKind.IMPRESSIONS if clicked and click_us is not None:
                return Event(user, item, at, click_us, click_us, message.offset, request, click_us)
            case LogKind.IMPRESSIONS:
                known = at + self._window_us if clicked else None
            case LogKind.RATINGS:
                known = at if rating is not None else None
            case LogKind.INTERACTIONS:
                known = at
        return Event(user, item, at, known, seen=at, offset=message.offset, request_id=request)

    def _refusal(self, message: Message, event: Event) -> str | None:
        """What only a stream can get wrong."""
        if message.key != event.user_id.encode():
            # Kafka chooses the partition by the key; a user in two partitions would be counted by halves.
            return "key: not the user_id"
        if message.timestamp_us is not None and event.seen > message.timestamp_us + self._tolerance_us:
            return "timestamp: in the future"
        return None
