"""The impression log with real parts: a simulated world and Feast, a Kafka broker, processes that are told to end."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from confluent_kafka import Consumer

from evergreen.contracts.feature_tables import FeatureTables
from evergreen.contracts.impressions import feature_table, from_message, read_impressions
from evergreen.contracts.mapping import LogKind
from evergreen.contracts.snapshot import Snapshot
from evergreen.contracts.training_set import ColumnKind, Feature, FeatureOrigin
from evergreen.features.columns import feature_columns
from evergreen.features.online_reader import open_reader
from evergreen.features.store import FeatureStore
from evergreen.monitoring.skew import check_skew
from evergreen.serving.impression_sinks import KafkaSink, ParquetSink
from evergreen.serving.impressions import DROPPED, WRITTEN, ImpressionLog
from evergreen.serving.recommender import OnlineItems, Recommender
from evergreen.serving.schema import RankingRequest
from evergreen.serving.users import UserFeatures
from tests.kafka import KafkaBroker, kafka_broker
from tests.serving import make_answer
from tests.small_world import SmallWorld

TOPIC = "shown"
PRICE = Feature(name="price", kind=ColumnKind.NUMERIC, origin=FeatureOrigin.ITEM)


@dataclass(frozen=True)
class EveryFeature:
    """What a model package says of itself; the model reads all that the feature service has."""

    features: tuple[Feature, ...]
    kind: LogKind = LogKind.IMPRESSIONS
    feature_service: str = "ranker_v1"


@dataclass(frozen=True)
class ByRow:
    """A model that scores items by their row alone: what is logged does not depend on it."""

    info: EveryFeature
    path: Path = Path("by-row")
    version: str = "by-row-0123456789ab"

    def prepare(self, items: pa.Table) -> ByRow:
        return self

    def score_many(self, requests: Sequence[Any]) -> list[np.ndarray]:
        return [1 / (2 + rows) for _, _, rows in requests]


@dataclass(frozen=True)
class World:
    """A simulated log with its features; the server knows it as of `at`, two days before its end."""

    snapshot: Snapshot
    tables: FeatureTables
    store: FeatureStore
    at: datetime
    impressions: str


@pytest.fixture(scope="module")
def world(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    snapshot, tables = small_world.snapshot, small_world.tables
    store = FeatureStore.create(root / "feature_store", tables)
    at = snapshot.as_of - timedelta(days=2, minutes=-17, microseconds=123_457)
    store.materialize(at)
    model = ByRow(EveryFeature(feature_columns(snapshot.mapping)))
    events = pq.read_table(snapshot.files[-3], columns=["user_id", "item_id"])
    users = [*events["user_id"].unique().to_pylist()[:20], "never seen"]
    reader = open_reader(store, model.info.feature_service, deadline_seconds=5.0)
    with ImpressionLog(ParquetSink(str(root / "impressions")), flush_seconds=0.1) as log:
        recommender = Recommender(
            model, snapshot.mapping, OnlineItems(store, reader), UserFeatures(reader), model.prepare, impressions=log
        )
        items = events["item_id"].unique().to_pylist()
        requests = [
            RankingRequest(
                user_id=user,
                request_id=f"request-{number}",
                candidates=[*items[number : number + 5], "new item"] if number % 2 else None,
                context={"device": "phone"},
                event_timestamp=at,
            )
            for number, user in enumerate(users)
        ]

        async def serve() -> None:
            for request in requests:
                await recommender.answer([request])
            await recommender.close()

        asyncio.run(serve())
    return World(snapshot, tables, store, at, str(root / "impressions"))


def logged(world: World) -> pa.Table:
    return pa.concat_tables(read_impressions(world.impressions))


def with_feature(rows: pa.Table, name: str, change: Any) -> pa.Table:
    """Impressions in which one feature was served otherwise."""
    features = feature_table(rows)
    place = features.column_names.index(name)
    changed = pa.array([change(value) for value in features[name].to_pylist()], features.schema.field(name).type)
    features = features.set_column(place, features.schema.field(name), changed)
    structs = features.to_struct_array().combine_chunks().cast(rows.schema.field("features").type)
    return rows.set_column(rows.column_names.index("features"), rows.schema.field("features"), structs)


@pytest.mark.parametrize("offline", ["point-in-time join", "feast"])
def test_there_is_no_skew_in_the_simulated_world(world: World, tmp_path: Path, offline: str) -> None:
    join = world.store.historical if offline == "feast" else None
    report = check_skew(world.impressions, world.tables, tmp_path / "skew.json", join=join)
    assert report.differing == () and report.is_clean
    assert (report.requests, report.rows) == (21, 11 * 10 + 10 * 5) and report.first == report.last == world.at
    assert report.not_compared == {"device": "the offline store has no such feature: the request brings it"}
    compared = {feature.name for feature in feature_columns(world.snapshot.mapping)} - {"device", "user_id", "item_id"}
    assert set(report.features) == compared | {"category"}
    assert all(skew.equal == skew.rows == report.rows for skew in report.features.values())


def test_every_broken_feature_is_found_and_no_other(world: World, tmp_path: Path) -> None:
    rows = with_feature(logged(world), "user_events_7d", lambda value: value and value + 1)
    rows = with_feature(rows, "user_history", lambda value: value and value[::-1])
    rows = with_feature(rows, "item_rate_30d", lambda value: None)
    rows = with_feature(rows, "hour", lambda value: str((int(value) + 1) % 24))
    ParquetSink(str(tmp_path / "broken")).write("broken", rows)
    report = check_skew(str(tmp_path / "broken"), world.tables, tmp_path / "skew.json")
    assert set(report.differing) == {"user_events_7d", "user_history", "item_rate_30d", "hour"}
    assert report.features["hour"].differing == report.rows
    assert report.features["user_events_7d"].max_abs_difference == 1.0
    assert report.features["item_rate_30d"].only_offline == report.features["item_rate_30d"].differing > 0
    example = report.features["user_events_7d"].examples[0]
    assert example.served == example.offline + 1 and example.request_id == "request-0"


def test_store_that_is_behind_differs_and_is_told_from_one_that_is_wrong(world: World, tmp_path: Path) -> None:
    rows = logged(world)
    later = pa.array([world.at + timedelta(days=1)] * len(rows), rows.schema.field("event_timestamp").type)
    stale = rows.set_column(1, rows.schema.field("event_timestamp"), later)
    # What is computed at the request was right at its time; only the store has stood still.
    elapsed = [f.name for f in feature_columns(world.snapshot.mapping) if f.name.endswith("_seconds")]
    for name in elapsed:
        stale = with_feature(stale, name, lambda value: None if value is None else value + 86400.0)
    stale = with_feature(stale, "weekday", lambda value: str((int(value) + 1) % 7))
    ParquetSink(str(tmp_path / "stale")).write("stale", stale)
    out = tmp_path / "skew.json"
    assert "item_events_1d" in check_skew(str(tmp_path / "stale"), world.tables, out).differing
    assert check_skew(str(tmp_path / "stale"), world.tables, out, known_at=world.at).is_clean


@pytest.fixture(scope="module")
def broker() -> Iterator[KafkaBroker]:
    with kafka_broker() as running:
        running.create_topic(TOPIC)
        yield running


def read_topic(address: str, number: int) -> list[Any]:
    consumer = Consumer({"bootstrap.servers": address, "group.id": "reader", "auto.offset.reset": "earliest"})
    consumer.subscribe([TOPIC])
    found: list[Any] = []
    deadline = time.monotonic() + 60
    while len(found) < number and time.monotonic() < deadline:
        found += [message for message in consumer.consume(500, 0.5) if message.error() is None]
    found += [message for message in consumer.consume(500, 1.0) if message.error() is None]
    consumer.close()
    return found


def record(log: ImpressionLog, number: int, *, item_id: str = "item", rows: int = 1) -> None:
    answer = replace(make_answer(*[item_id] * rows, request_id=f"r{number}"), user_id=f"u{number % 3}")
    log.record(answer, (PRICE,), [{"price": float(number)}])


@pytest.mark.heavy
def test_kafka_gets_every_request_although_the_broker_is_killed(broker: KafkaBroker) -> None:
    written, refused = WRITTEN._value.get(), DROPPED.labels("refused")._value.get()
    log = ImpressionLog(KafkaSink(broker.address, TOPIC, {"log_level": "0"}), flush_seconds=0.1)
    for number in range(100):
        record(log, number, rows=2)
    wait_for(lambda: WRITTEN._value.get() - written == 100)
    broker.kill()
    for number in range(100, 200):
        record(log, number, rows=2)
    record(log, 200, item_id="x" * 2_000_000)  # larger than a broker takes
    time.sleep(1.5)  # long enough for attempts that fail
    assert WRITTEN._value.get() - written == 100
    broker.start()
    wait_for(lambda: WRITTEN._value.get() - written == 200)
    log.close(deadline_seconds=30)
    assert DROPPED.labels("refused")._value.get() - refused == 1
    messages = read_topic(broker.address, 200)
    rows = pa.concat_tables(from_message(message.value(), (PRICE,)) for message in messages)
    assert {message.key() for message in messages} == {b"u0", b"u1", b"u2"}
    assert set(rows["request_id"].to_pylist()) == {f"r{n}" for n in range(200)}
    prices = dict(zip(rows["request_id"].to_pylist(), feature_table(rows)["price"].to_pylist(), strict=True))
    assert prices == {f"r{n}": float(n) for n in range(200)}


def wait_for(condition: Any, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s"
        time.sleep(0.05)


CAPACITY_ROWS = 2000
SERVER = f"""
import signal, sys, time
from evergreen.serving.impression_sinks import ParquetSink
from evergreen.serving.impressions import WRITTEN, ImpressionLog
from tests.serving import make_answer

sources = [{{"category": "c"}}]
path, flush_seconds = sys.argv[1:]
held = {{"flush_rows": {CAPACITY_ROWS}, "capacity_rows": {CAPACITY_ROWS}}}
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
with ImpressionLog(ParquetSink(path), flush_seconds=float(flush_seconds), **held) as log:
    for number in range(1_000_000):
        written = int(WRITTEN._value.get())
        log.record(make_answer("item", request_id=f"r{{number}}"), (), sources)
        print(number, written, flush=True)
        time.sleep(0.002)
"""


def end_server(log: Path, *, flush_seconds: float, after: int, by: signal.Signals) -> tuple[int, int]:
    """Let a process serve this many requests, end it, and return how many it recorded and how many it knew written."""
    command = [sys.executable, "-c", SERVER, str(log), str(flush_seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        number = written = 0
        for line in process.stdout:
            number, written = map(int, line.split())
            if number == after:
                process.send_signal(by)
        process.wait(timeout=30)
    return number + 1, written


def request_numbers(log: Path) -> list[int]:
    tables = list(read_impressions(str(log)))
    return [int(request_id[1:]) for table in tables for request_id in table["request_id"].to_pylist()]


def test_kill_loses_at_most_what_was_held(tmp_path: Path) -> None:
    recorded, written = end_server(tmp_path, flush_seconds=0.2, after=600, by=signal.SIGKILL)
    found = request_numbers(tmp_path)
    assert found == list(range(len(found))), "no gap, nothing twice, no half file"
    assert 0 < written <= len(found), "what was counted as written is there"
    assert recorded - len(found) <= CAPACITY_ROWS


def test_process_that_is_told_to_end_writes_all(tmp_path: Path) -> None:
    recorded, written = end_server(tmp_path, flush_seconds=3600, after=200, by=signal.SIGTERM)
    assert written == 0, "everything was still held"
    # The signal may come between the last record and its line.
    assert recorded <= len(found := request_numbers(tmp_path)) <= recorded + 1
    assert found == list(range(len(found)))
