"""A stream without Kafka: messages in lists, state in SQLite, rows in a dict."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from evergreen.contracts.instant import to_micros
from evergreen.contracts.mapping import Mapping
from evergreen.stream.clock import Clock, event_clock
from evergreen.stream.processor import Processor, Row
from evergreen.stream.records import Message, Records, Reject
from evergreen.stream.state import Event
from evergreen.stream.store import SqliteStateStore

START = datetime(2026, 3, 1, tzinfo=UTC)


def mapping(kind: str = "impressions", window: str = "10m", **more: Any) -> Mapping:
    labels: dict[str, dict[str, Any]] = {
        "impressions": {"label": {"column": "click"}},
        "interactions": {},
        "ratings": {"rating": {"column": "stars"}},
    }
    columns = {"user_id": "user", "item_id": "item"}
    if kind == "impressions":
        columns["click_timestamp"] = "clicked_at"
    parts = {"name": "log", "kind": kind, "timestamp": {"column": "time"}, "columns": columns}
    return Mapping.model_validate(parts | labels[kind] | {"split": {"attribution_window": window}} | more)


def event(minutes: float, item: str | None = "i", user: str = "u", **more: Any) -> dict[str, Any]:
    """An object as a producer sends it."""
    return {"time": (START + timedelta(minutes=minutes)).isoformat(), "user": user, "item": item, "click": True} | more


def message(body: dict[str, Any] | bytes | None, offset: int = 0, *, partition: int = 0, **more: Any) -> Message:
    value = json.dumps(body).encode() if isinstance(body, dict) else body
    key = str(body["user"]).encode() if isinstance(body, dict) and "user" in body else b"u"
    parts = {"partition": partition, "offset": offset, "key": key, "value": value, "timestamp_us": None}
    return Message(**(parts | more))


@dataclass
class Online:
    """The newest row of each user, as an online store keeps it."""

    rows: dict[str, tuple[int, dict[str, Any]]] = field(default_factory=dict)
    fail: bool = False

    def write(self, rows: Sequence[Row]) -> None:
        if self.fail:
            raise OSError("away")
        for user, at, features in rows:
            if user not in self.rows or self.rows[user][0] <= at:
                self.rows[user] = (at, features)

    def values(self, user: str = "u") -> dict[str, Any]:
        return {name.removeprefix("user_recent_"): value for name, value in self.rows[user][1].items()}


@dataclass
class Stream:
    """Everything that outlives a process, and the process."""

    folder: Path
    log: Mapping
    clock: Clock = event_clock
    online: Online = field(default_factory=Online)
    rejects: list[Reject] = field(default_factory=list)
    partitions: tuple[int, ...] = (0,)
    judge: Callable[[Event], Iterable[str]] | None = None

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> Processor:
        """A new process over the same stores."""
        store = SqliteStateStore(self.folder / "stream.db", "clicks")
        records = Records(self.log, self.folder)
        self.processor = Processor(
            records, store, clock=self.clock, write=self.online.write, reject=self.rejects.extend, judge=self.judge
        )
        self.processor.open(self.partitions)
        return self.processor

    def send(self, *bodies: dict[str, Any] | bytes | None, first: int) -> None:
        self.processor.process([message(body, first + i) for i, body in enumerate(bodies)])


@pytest.fixture
def stream(tmp_path: Path) -> Callable[..., Stream]:
    return lambda log=None, **more: Stream(tmp_path, log or mapping(), **more)


def micros(minutes: float) -> int:
    return to_micros(START + timedelta(minutes=minutes))
