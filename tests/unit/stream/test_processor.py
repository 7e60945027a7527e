"""The stream without Kafka: late, repeated and broken messages, time that passes, and processes that die."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable
from typing import Any

import pytest

from evergreen.stream.processor import Processor
from evergreen.stream.store import Mark, PartitionMovedError, SqliteStateStore
from tests.unit.stream.conftest import Stream, event, mapping, message, micros

MakeStream = Callable[..., Stream]


class Watch:
    """A clock that stands where it is put, and like the real one never goes back."""

    def __init__(self, minutes: float = 0) -> None:
        self.minutes = minutes

    def __call__(self, before: int, seen: object) -> int:
        return max(before + 1, micros(self.minutes))


def test_row_holds_what_was_known_before_it(stream: MakeStream) -> None:
    s = stream(mapping("interactions"))
    s.send(event(0, "a"), event(20, "b"), first=0)
    assert s.online.rows["u"][0] == micros(20) + 1
    assert s.online.values() == {
        "events_10m": 1,
        "events_1h": 2,
        "positives_10m": 1,
        "positives_1h": 2,
        "items": ["a", "b"],
    }


def test_late_event_takes_the_place_it_would_have_had(stream: MakeStream) -> None:
    s = stream(mapping("interactions"))
    s.send(event(0, "a"), event(20, "c"), first=0)
    s.send(event(15, "b"), first=2)
    assert s.online.values() | {"items": ["a", "b", "c"], "events_10m": 2, "events_1h": 3} == s.online.values()


def test_event_older_than_every_window_is_only_an_item(stream: MakeStream) -> None:
    s = stream(mapping("interactions"))
    s.send(event(120, "new"), event(0, "old"), first=0)
    assert (s.online.values()["events_1h"], s.online.values()["items"]) == (1, ["old", "new"])


def test_message_that_is_read_again_counts_once(stream: MakeStream) -> None:
    s = stream(mapping("interactions"))
    s.send(event(0), event(1), first=0)
    before = dict(s.online.rows)
    s.send(event(0), event(1), first=0)
    s.restart()
    s.send(event(1), first=1)
    assert s.online.rows == before


def test_event_that_was_sent_twice_counts_twice_as_two_rows_of_a_log_do(stream: MakeStream) -> None:
    s = stream(mapping("interactions"))
    s.send(event(0), event(0), first=0)
    assert (s.online.values()["events_1h"], s.online.values()["items"]) == (2, ["i", "i"])


def test_bad_messages_are_handed_over_and_the_good_ones_count(stream: MakeStream) -> None:
    s = stream(mapping("interactions"))
    s.send(event(0), b"?", event(1), first=5)
    assert [(r.message.offset, r.reason) for r in s.rejects] == [(6, "message: not JSON")]
    assert s.online.values()["events_1h"] == 2
    assert s.processor.marks[0] is not None and s.processor.marks[0].offset == 8


def test_windows_run_out_though_nothing_happens(stream: MakeStream) -> None:
    watch = Watch(1)
    s = stream(mapping("interactions"), clock=watch)
    s.send(event(0), event(0, user="v"), first=0)
    for minutes, expected in ((9, 1), (10.1, 0)):
        watch.minutes = minutes
        s.send(first=9)
        assert (s.online.values()["events_10m"], s.online.values("v")["events_1h"]) == (expected, 1)
    watch.minutes = 61
    s.send(first=9)
    assert s.online.values("v")["events_1h"] == 0


def test_click_without_a_time_is_known_when_the_attribution_window_has_passed(stream: MakeStream) -> None:
    watch = Watch(1)
    s = stream(mapping("impressions", "30m"), clock=watch)
    s.send(event(0), first=0)
    assert (s.online.values()["positives_1h"], s.online.values()["items"]) == (0, [])
    watch.minutes = 31
    s.send(first=1)
    assert (s.online.values()["positives_1h"], s.online.values()["items"]) == (1, ["i"])


def test_clock_that_jumps_back_does_not_turn_rows_back(stream: MakeStream) -> None:
    watch = Watch(30)
    s = stream(mapping("interactions"), clock=watch)
    s.send(event(29), first=0)
    before = s.online.rows["u"][0]
    watch.minutes = 5
    s.send(event(29.5), first=1)
    assert s.online.rows["u"][0] > before
    assert s.online.values()["events_10m"] == 2


def test_row_that_was_not_written_is_still_due_after_a_crash(stream: MakeStream) -> None:
    s = stream(mapping("interactions"))
    s.online.fail = True
    with pytest.raises(OSError, match="away"):
        s.send(event(0), first=0)
    s.online.fail = False
    s.restart()
    s.send(first=1)
    assert s.online.values()["events_1h"] == 1


def test_process_that_lost_its_partition_saves_nothing(stream: MakeStream) -> None:
    s = stream(mapping("interactions"))
    s.send(event(0), first=0)
    zombie = s.processor
    s.restart()
    s.send(event(1), first=1)
    rows = dict(s.online.rows)
    with pytest.raises(PartitionMovedError):
        zombie.process([message(event(1), 1)])
    assert s.online.rows == rows
    with pytest.raises(PartitionMovedError):
        zombie.check_marks()


def test_store_that_lost_everything_is_noticed(stream: MakeStream) -> None:
    s = stream(mapping("interactions"))
    s.send(event(0), first=0)
    store = SqliteStateStore(s.folder / "stream.db", "clicks")
    for table in ("mark", "state", "due"):
        store._db.execute(f"DELETE FROM {table}")
    with pytest.raises(PartitionMovedError, match="is at None"):
        s.processor.check_marks()
    assert s.processor.open([0]) == {0: None}


def test_full_disk_saves_nothing_and_nothing_is_lost_when_there_is_room_again(stream: MakeStream) -> None:
    s = stream(mapping("interactions"))
    s.send(event(0), first=0)
    store = s.processor._store
    assert isinstance(store, SqliteStateStore)
    many = [event(1, user=f"user-{i:0>900}") for i in range(100)]
    store._db.execute("PRAGMA max_page_count = 12")
    with pytest.raises(sqlite3.OperationalError, match="disk is full"):
        s.send(*many, first=1)
    assert s.processor.open([0])[0] == store.mark(0) == Mark(1, micros(0) + 1, 1)
    assert list(s.online.rows) == ["u"]
    store._db.execute("PRAGMA max_page_count = 100000")
    s.send(*many, first=1)
    assert len(s.online.rows) == 101


def test_save_is_all_or_nothing(tmp_path: Any) -> None:
    store = SqliteStateStore(tmp_path / "s.db", "t")
    store.save(0, None, Mark(1, 5, 1), {"u": b"x"}, {"u": 5})
    with pytest.raises(PartitionMovedError):
        store.save(0, None, Mark(2, 6, 1), {"u": b"y"}, {"u": None})
    assert (store.mark(0), store.load(0, ["u", "v"]), store.due(0, 5, 9)) == (Mark(1, 5, 1), [b"x", None], ["u"])
    assert (store.mark(1), store.due(1, 5, 9)) == (None, [])


class Killed(BaseException):
    """kill -9, as far as a test within the process can have it."""


@pytest.mark.parametrize("seed", range(3))
def test_values_after_any_number_of_crashes_equal_those_of_one_undisturbed_run(
    seed: int, stream: MakeStream, tmp_path: Any
) -> None:
    rng = random.Random(seed)
    bodies: list[Any] = []
    minutes = 0.0
    for i in range(120):
        minutes += rng.choice([0, 0, 0.5, 7])
        at = max(minutes - rng.choice([0, 0, 0, 3, 80]), 0)
        bodies.append(event(at, f"i{i}", rng.choice("uvw")) if rng.random() > 0.05 else b"bad")
    s = stream(mapping("impressions", "10m"))
    read = 0
    while read < len(bodies):
        point = rng.choice(["check", "reject", "save", "write", None])
        _kill_at(s.processor, point)
        size = rng.randint(1, 20)
        try:
            s.processor.process([message(b, read + i) for i, b in enumerate(bodies[read : read + size])])
        except Killed:
            s.restart()
        mark = s.processor.marks[0]
        read = 0 if mark is None else mark.offset
    s.restart()
    s.send(first=len(bodies))

    (tmp_path / "oracle").mkdir()
    oracle = Stream(tmp_path / "oracle", mapping("impressions", "10m"))
    for i in range(0, len(bodies), 4):
        oracle.send(*bodies[i : i + 4], first=i)
    assert {u: row[1] for u, row in s.online.rows.items()} == {u: row[1] for u, row in oracle.online.rows.items()}
    bad = [i for i, body in enumerate(bodies) if body == b"bad"]
    assert sorted({r.message.offset for r in s.rejects}) == bad


def _kill_at(processor: Processor, point: str | None) -> None:
    """Make one of the processor's parts die, before or after it has done its work."""
    parts: dict[str, tuple[Any, str]] = {
        "check": (processor._records, "check"),
        "reject": (processor, "_reject"),
        "save": (processor._store, "save"),
        "write": (processor, "_write"),
    }
    if point is None:
        return
    owner, name = parts[point]
    work = getattr(owner, name)

    def die(*args: Any) -> Any:
        work(*args)
        raise Killed

    setattr(owner, name, die)
