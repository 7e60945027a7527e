"""A stream for tests and benchmarks: events, a feature store on Redis, and members of the group that can be killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pyarrow as pa
import redis
from confluent_kafka import Producer

from evergreen.contracts.feature_tables import FeatureTables
from evergreen.contracts.mapping import Mapping
from evergreen.features.store import FeatureStore
from evergreen.features.tables import build_feature_tables
from evergreen.ingest.log import ingest_log
from evergreen.stream.store import Mark, RedisStateStore

START = datetime(2026, 3, 1, tzinfo=UTC)
TOPIC = "clicks"
DEAD_LETTERS = "clicks.dead-letter"
MAPPING = Mapping.model_validate(
    {
        "name": "clicks",
        "kind": "impressions",
        "timestamp": {"column": "time"},
        "columns": {"user_id": "user", "item_id": "item", "click_timestamp": "clicked_at"},
        "label": {"column": "click"},
        "split": {"attribution_window": "10m"},
    }
)
Body = dict[str, Any]


def events(number: int, *, users: int = 40, seed: int = 7) -> list[Body]:
    """A log over some hours: slates, clicks with and without a time, late rows, and rows that break the schema."""
    rng = random.Random(seed)
    now, bodies = START, []
    while len(bodies) < number:
        now += timedelta(seconds=rng.choice([0, 1, 5, 20]), microseconds=rng.randrange(1_000_000))
        at = now - rng.choice([0, 0, 0, 0, 1, 45, 300]) * timedelta(minutes=1)
        user = f"u{rng.randrange(users)}"
        for _ in range(rng.randint(1, 5)):
            click = rng.random() < 0.3
            clicked_at = (
                (at + timedelta(seconds=rng.randrange(400))).isoformat() if click and rng.random() < 0.5 else ""
            )
            body = {"time": at.isoformat(), "user": user, "item": f"i{len(bodies)}", "click": click}
            body["click"] = "perhaps" if rng.random() < 0.01 else click
            bodies.append(body | {"clicked_at": clicked_at})
    return bodies[:number]


def build_tables(bodies: Sequence[Body], folder: Path) -> FeatureTables:
    """What the batch job makes of the same events."""
    folder.mkdir(parents=True)
    lines = [",".join(str(v).lower() if isinstance(v, bool) else str(v) for v in body.values()) for body in bodies]
    (folder / "log.csv").write_text("\n".join([",".join(bodies[0]), *lines]) + "\n")
    as_of = datetime.fromisoformat(max(body["time"] for body in bodies)) + timedelta(hours=2)
    snapshot = ingest_log(MAPPING, str(folder / "log.csv"), folder / "snapshot", as_of=as_of)
    return build_feature_tables(snapshot, folder / "tables")


def create_store(path: Path, tables: FeatureTables, redis_address: str) -> FeatureStore:
    """A feature store whose online side is a Redis."""
    FeatureStore.create(path, tables)
    file = path / "feature_store.yaml"
    online = (
        "online_store:\n  type: evergreen.features.redis_online_store.GuardedRedisOnlineStore\n"
        f"  connection_string: {redis_address},socket_timeout=5\n  retry_seconds: 1\n"
    )
    file.write_text(re.sub(r"online_store:\n(  .*\n)+", online, file.read_text()))
    return FeatureStore.open(path)


def produce(address: str, bodies: Sequence[Body], *, per_second: float | None = None) -> None:
    """Send events, each user's to its partition, and wait until the broker has them."""
    producer = Producer({"bootstrap.servers": address, "enable.idempotence": True, "linger.ms": 5})
    started = time.monotonic()
    for number, body in enumerate(bodies):
        if per_second is not None and (early := started + number / per_second - time.monotonic()) > 0:
            time.sleep(early)
        producer.produce(TOPIC, json.dumps(body), key=body["user"])
        producer.poll(0)
    if left := producer.flush(60):
        raise RuntimeError(f"{left} events were not delivered")


class Member:
    """`evergreen stream` in a process of its own, forked from one that has done the imports."""

    def __init__(self, *arguments: str) -> None:
        self._arguments = arguments
        self._process: BaseProcess | None = None

    def start(self) -> None:
        """Start; it is reading a second or two later."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["evergreen.features.push", "evergreen.stream.consumer", "evergreen.cli.stream"])
        self._process = context.Process(target=_run, args=(self._arguments,))
        self._process.start()

    def kill(self) -> None:
        """kill -9."""
        assert self._process is not None
        os.kill(self.pid, signal.SIGKILL)
        self._process.join()

    def stop(self) -> int:
        """Ask it to end, and return its exit status."""
        os.kill(self.pid, signal.SIGTERM)
        return self.wait(30)

    def wait(self, seconds: float) -> int:
        """Wait until it ends, and return its exit status."""
        assert self._process is not None
        self._process.join(seconds)
        if self._process.exitcode is None:
            self.kill()
            raise RuntimeError(f"the member did not end within {seconds:.0f} s")
        return self._process.exitcode

    @property
    def pid(self) -> int:
        assert self._process is not None and self._process.pid is not None
        return self._process.pid

    def __enter__(self) -> Member:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.is_alive():
            self.kill()


def _run(arguments: tuple[str, ...]) -> None:
    from evergreen.cli.stream import stream

    stream.main(list(arguments), standalone_mode=False)


def member(address: str, store: Path, *more: str) -> Member:
    """A member that is quickly missed when it dies."""
    return Member(
        *("--brokers", address, "--topic", TOPIC, "--store", str(store)),
        *("--kafka-option", "session.timeout.ms=3000", "--kafka-option", "heartbeat.interval.ms=500"),
        *more,
    )


class Progress:
    """How far the stream is, by its own account in Redis."""

    def __init__(self, redis_address: str, partitions: int) -> None:
        host, port = redis_address.split(":")
        self._store = RedisStateStore(redis.Redis(host, int(port)), "evergreen", TOPIC)
        self._partitions = range(partitions)

    def marks(self) -> dict[int, Mark]:
        """Of the partitions that were read."""
        found = {p: self._store.mark(p) for p in self._partitions}
        return {p: mark for p, mark in found.items() if mark is not None}

    def wait(self, messages: int, *, seconds: float = 60) -> dict[int, Mark]:
        """Wait until this many messages are read and all rows are written; returns the marks."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                marks = self.marks()
                read = sum(mark.offset for mark in marks.values())
                if read == messages and not any(self._store.due(p, mark.clock, 1) for p, mark in marks.items()):
                    return marks
            except redis.ConnectionError:
                read = -1
            if time.monotonic() > deadline:
                raise TimeoutError(f"{read} of {messages} messages are read after {seconds:.0f} s")
            time.sleep(0.05)

    def users(self, partition: int) -> list[str]:
        """Users of a partition."""
        keys = self._store._client.hkeys(self._store._keys(partition)[1])
        return sorted(key.decode() for key in keys)


def online_values(store: FeatureStore, users: Sequence[str]) -> dict[str, Body]:
    """What a server would read, by user."""
    rows = store.online("recent_v1", pa.table({"user_id": pa.array(users, pa.string())})).to_pylist()
    return {row.pop("user_id"): row for row in rows}


def reasons(messages: Sequence[Any]) -> Counter[str]:
    """Dead letters by reason."""
    return Counter(dict(message.headers())["reason"].decode() for message in messages)
