"""The stream with a real broker and a real Redis: killed, cut off, emptied, and compared with the batch job."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pytest
from confluent_kafka import Consumer

from evergreen.contracts.feature_tables import FeatureTables
from evergreen.contracts.instant import from_micros
from evergreen.features.point_in_time import asof_features, table_source
from evergreen.features.store import FeatureStore
from evergreen.stream.store import Mark
from tests.kafka import KafkaBroker, kafka_broker
from tests.servers import RedisServer, free_port, redis_server
from tests.streams import (
    DEAD_LETTERS,
    TOPIC,
    Body,
    Progress,
    build_tables,
    create_store,
    events,
    member,
    online_values,
    produce,
    reasons,
)

PARTITIONS = 3


@dataclass
class World:
    broker: KafkaBroker
    redis: RedisServer
    store: FeatureStore
    folder: Path

    @property
    def progress(self) -> Progress:
        return Progress(self.redis.address, PARTITIONS)

    def batch_values(self, tables: FeatureTables, marks: dict[int, Mark]) -> dict[str, Body]:
        """What the batch job says of every user at the time of the user's partition."""
        users = [(user, mark.clock) for p, mark in marks.items() for user in self.progress.users(p)]
        names, clocks = zip(*users, strict=True)
        times = pa.array([from_micros(clock) for clock in clocks], pa.timestamp("us", tz="UTC"))
        spine = pa.table({"user_id": pa.array(names, pa.string()), "event_timestamp": times})
        rows = asof_features(spine, table_source(tables, "user_recent")).to_pylist()
        return dict(zip(names, rows, strict=True))


@pytest.fixture(scope="module")
def broker() -> Iterator[KafkaBroker]:
    with kafka_broker() as running:
        yield running


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> FeatureTables:
    return build_tables(events(100), tmp_path_factory.mktemp("first") / "batch")


@pytest.fixture
def world(broker: KafkaBroker, tables: FeatureTables, tmp_path: Path) -> Iterator[World]:
    """Empty topics, an empty Redis and a store."""
    with redis_server() as redis:
        broker.create_topic(TOPIC, PARTITIONS)
        broker.create_topic(DEAD_LETTERS)
        try:
            yield World(broker, redis, create_store(tmp_path / "store", tables, redis.address), tmp_path)
        finally:
            broker.delete_topics(TOPIC, DEAD_LETTERS)


def dead_letters(address: str, number: int) -> list[Any]:
    consumer = Consumer({"bootstrap.servers": address, "group.id": "undertaker", "auto.offset.reset": "earliest"})
    consumer.subscribe([DEAD_LETTERS])
    try:
        return list(consumer.consume(number, timeout=20))
    finally:
        consumer.close()


def test_killed_at_random_it_says_what_the_batch_job_says(world: World) -> None:
    log, rng = events(3000), random.Random(3)
    process = member(world.broker.address, world.store.path, "--clock", "event")
    process.start()
    sent = 0
    world.progress.wait(0)
    for until in (700, 1900, 3000):  # the values are compared after each of three portions
        flow = threading.Thread(
            target=produce, args=(world.broker.address, log[sent:until]), kwargs={"per_second": 500}
        )
        flow.start()
        sent = until
        time.sleep(rng.uniform(0.5, 2))
        process.kill()
        process.start()
        flow.join()
        marks = world.progress.wait(sent)
        expected = world.batch_values(build_tables(log[:sent], world.folder / f"batch-{sent}"), marks)
        assert len(expected) == 40
        assert online_values(world.store, list(expected)) == expected
    assert process.stop() == 0
    bad = sum(body["click"] == "perhaps" for body in log)
    # A kill between the delivery and the save delivers again: at least once, told apart by their offsets.
    letters = {
        (dict(m.headers())["partition"], dict(m.headers())["offset"]): m
        for m in dead_letters(world.broker.address, bad)
    }
    assert reasons(list(letters.values())) == {"clicked: not one of the label's values": bad}


def test_survivor_takes_over_the_partitions_of_a_dead_member(world: World) -> None:
    log = events(1200)
    with (
        member(world.broker.address, world.store.path, "--clock", "event") as one,
        member(world.broker.address, world.store.path, "--clock", "event"),
    ):
        produce(world.broker.address, log[:600])
        world.progress.wait(600)
        one.kill()
        produce(world.broker.address, log[600:])
        marks = world.progress.wait(1200)
        expected = world.batch_values(build_tables(log, world.folder / "batch"), marks)
        assert online_values(world.store, list(expected)) == expected


@pytest.mark.heavy
def test_nothing_is_lost_when_broker_and_redis_go_away_and_redis_comes_back_empty(world: World) -> None:
    log = events(1200)
    with member(world.broker.address, world.store.path, "--clock", "event") as process:
        produce(world.broker.address, log[:500])
        world.progress.wait(500)
        world.broker.kill()
        restart = threading.Timer(3, world.broker.start)
        restart.start()
        produce(world.broker.address, log[500:800])
        restart.join()
        world.progress.wait(800)
        world.redis.stop()
        produce(world.broker.address, log[800:])
        time.sleep(2)
        world.redis.start()
        marks = world.progress.wait(1200)
        expected = world.batch_values(build_tables(log, world.folder / "batch"), marks)
        assert online_values(world.store, list(expected)) == expected
        assert process.stop() == 0


def test_on_the_wall_clock_a_click_is_readable_and_then_runs_out_on_its_own(world: World) -> None:
    def click(item: str, age: timedelta) -> Body:
        now = datetime.now(UTC)
        return {
            "time": (now - age).isoformat(),
            "user": "u1",
            "item": item,
            "click": True,
            "clicked_at": now.isoformat(),
        }

    port = free_port()
    with member(world.broker.address, world.store.path, "--metrics-port", str(port)):
        produce(world.broker.address, [click("old", timedelta(minutes=30))])
        old = _until(world, "user_recent_events_1h", 1)  # now the stream is running
        produce(world.broker.address, [click("new", timedelta(minutes=9, seconds=52)), {"user": "u1"}])
        produce(world.broker.address, [{"user": "u1", "time": "soon" * 240_000}])
        new = _until(world, "user_recent_events_1h", 2)
        over = _until(world, "user_recent_events_10m", 0)
        metrics = _metrics(port)
    assert (old["user_recent_events_10m"], old["user_recent_items"]) == (0, ["old"])
    assert (new["user_recent_events_10m"], new["user_recent_items"]) == (1, ["old", "new"])
    assert over == new | {"user_recent_events_10m": 0}
    letters = dead_letters(world.broker.address, 2)
    assert [len(letter.value()) for letter in letters] == [len('{"user": "u1"}'), 900_000]
    for line in (
        "evergreen_stream_events_total 2.0",
        'evergreen_stream_dead_letters_total{reason="timestamp: missing"} 1.0',
        "evergreen_stream_freshness_seconds_count 2.0",
        "evergreen_stream_rebalances_total 1.0",
        *(f'evergreen_stream_lag_messages{{partition="{p}"}} 0.0' for p in range(PARTITIONS)),
    ):
        assert line in metrics


def test_messages_that_kafka_deleted_unread_are_counted_and_another_topic_is_refused(world: World) -> None:
    log, address = events(400), world.broker.address
    with member(address, world.store.path, "--clock", "event") as process:
        produce(address, log[:200])
        marks = world.progress.wait(200)
        assert process.stop() == 0
    produce(address, log[200:])
    world.broker.delete_before(TOPIC, {p: mark.offset + 2 for p, mark in marks.items()})
    port = free_port()
    with member(address, world.store.path, "--clock", "event", "--metrics-port", str(port)) as process:
        world.progress.wait(400)
        assert f"evergreen_stream_missed_total {2.0 * PARTITIONS}" in _metrics(port)
        assert process.stop() == 0
    world.broker.delete_topics(TOPIC)
    world.broker.create_topic(TOPIC, PARTITIONS)
    with member(address, world.store.path, "--clock", "event") as process:
        assert process.wait(30) == 1


def _metrics(port: int) -> list[str]:
    return httpx.get(f"http://127.0.0.1:{port}/metrics").text.splitlines()


def _until(world: World, feature: str, value: int) -> Body:
    """Wait until a feature of u1 has a value; returns all of them."""
    deadline = time.monotonic() + 30
    while (row := online_values(world.store, ["u1"])["u1"])[feature] != value:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{feature} is {row[feature]}, not {value}")
        time.sleep(0.1)
    return row
