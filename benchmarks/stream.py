"""How fresh the stream keeps the features, what an event costs it, and what twenty kills leave behind.

Usage: uv run python -m benchmarks.stream [--seconds 30] [--rate 1000] [--kills 20]

A real broker (KRaft, three partitions) and a real Redis run beside producer, stream and reader on one machine.

Freshness: events are sent at a steady rate, stamped with the time of sending. Twenty times a second one of them belongs
to a user of its own, and Feast's `get_online_features` is asked for those users until it returns their event: the time
from the event's own timestamp to the answer that shows it. Stream on the wall clock, one member.
Cost: the CPU time of the stream's process while it reads a topic that is full already.
Kills: `kill -9` of the one member at random moments while events come in; afterwards the values of all users are
compared with those of a process that reads the topic once, undisturbed (`Processor` over an in-memory online store),
and with the batch job's table.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
from confluent_kafka import OFFSET_BEGINNING, Consumer, TopicPartition

from benchmarks.quality.hardware import hardware
from evergreen.contracts.instant import from_micros
from evergreen.features.point_in_time import asof_features, table_source
from evergreen.features.store import FeatureStore
from evergreen.stream.clock import event_clock
from evergreen.stream.processor import Processor, Row
from evergreen.stream.records import Message, Records
from evergreen.stream.store import Mark, SqliteStateStore
from tests.kafka import KafkaBroker, kafka_broker
from tests.servers import redis_server
from tests.streams import (
    DEAD_LETTERS,
    MAPPING,
    TOPIC,
    Body,
    Progress,
    build_tables,
    create_store,
    events,
    member,
    online_values,
    produce,
)

PARTITIONS = 3
PROBES_PER_SECOND = 20
USERS = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=30)
    parser.add_argument("--rate", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--backlog", type=int, default=50_000)
    options = parser.parse_args()
    lines = [f"# The stream: freshness, cost and kills\n\n{hardware()}\n"]
    with kafka_broker() as broker, tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tables = build_tables(events(100), folder / "first")
        for name, measure in {
            "freshness": lambda store, address: freshness(broker, store, options.seconds, options.rate),
            "cost": lambda store, address: cost(broker, store, address, options.backlog),
            "kills": lambda store, address: kills(broker, store, address, options.kills, folder),
        }.items():
            with redis_server() as redis:
                broker.create_topic(TOPIC, PARTITIONS)
                broker.create_topic(DEAD_LETTERS)
                lines.append(measure(create_store(folder / name, tables, redis.address), redis.address))
                print(lines[-1], flush=True)
                broker.delete_topics(TOPIC, DEAD_LETTERS)
    Path(__file__).with_suffix(".md").write_text("\n".join(lines))


def freshness(broker: KafkaBroker, store: FeatureStore, seconds: int, rate: int) -> str:
    """Percentiles of event → readable."""
    sent: dict[str, float] = {}
    latencies: list[float] = []
    done = threading.Event()

    def click(user: str) -> Body:
        now = datetime.now(UTC).isoformat()
        return {"time": now, "user": user, "item": "i", "click": True, "clicked_at": now}

    def flow() -> None:
        rng = random.Random(1)
        gap = rate // PROBES_PER_SECOND

        def bodies() -> Any:
            for number in range(seconds * rate):
                user = f"probe{number}" if number % gap == 0 else f"u{rng.randrange(USERS)}"
                body = click(user)
                if number % gap == 0 and number > 2 * rate:  # the first two seconds warm up
                    sent[user] = datetime.fromisoformat(body["time"]).timestamp()
                yield body

        produce(broker.address, bodies(), per_second=rate)
        done.set()

    with member(broker.address, store.path) as process:
        produce(broker.address, [click("first")])
        while online_values(store, ["first"])["first"]["user_recent_events_1h"] != 1:
            time.sleep(0.05)
        before = _cpu(process.pid)
        thread = threading.Thread(target=flow)
        thread.start()
        while not done.is_set() or sent:
            waiting = list(sent)[:50]
            if not waiting:
                time.sleep(0.002)
                continue
            for user, row in online_values(store, waiting).items():
                if row["user_recent_events_1h"]:
                    latencies.append(time.time() - sent.pop(user))
        used = _cpu(process.pid) - before
        thread.join()
    p50, p99, worst = np.percentile(latencies, [50, 99, 100]) * 1000
    return (
        f"## Freshness at {rate} events/s, {seconds} s, {len(latencies)} probes\n\n"
        "| p50 | p99 | longest | CPU of the stream |\n|---|---|---|---|\n"
        f"| {p50:.0f} ms | {p99:.0f} ms | {worst:.0f} ms | {used / seconds:.2f} cores |\n"
    )


def cost(broker: KafkaBroker, store: FeatureStore, redis_address: str, backlog: int) -> str:
    """CPU of a member that reads a full topic."""
    produce(broker.address, events(backlog, users=USERS))
    with member(broker.address, store.path, "--clock", "event") as process:
        time.sleep(0.1)
        before = _cpu(process.pid)
        Progress(redis_address, PARTITIONS).wait(backlog, seconds=300)
        used = _cpu(process.pid) - before
    return (
        f"## Cost of a backlog of {backlog:,} events of {USERS:,} users\n\n"
        f"{backlog / used:,.0f} events per CPU-second of the stream, its start included ({used:.1f} s).\n"
    )


def kills(broker: KafkaBroker, store: FeatureStore, redis_address: str, number: int, folder: Path) -> str:
    """Values after kills against a replay and against the batch job."""
    rng = random.Random(5)
    rate, seconds = 300, 4 * number
    log = events(rate * seconds, users=500)
    process = member(broker.address, store.path, "--clock", "event")
    process.start()
    flow = threading.Thread(target=produce, args=(broker.address, log), kwargs={"per_second": rate})
    flow.start()
    moments = sorted(rng.uniform(0, seconds) for _ in range(number))
    started = time.monotonic()
    read_at_kill = []
    progress = Progress(redis_address, PARTITIONS)
    for moment in moments:
        time.sleep(max(started + moment - time.monotonic(), 0.2))
        process.kill()
        read_at_kill.append(sum(mark.offset for mark in progress.marks().values()))
        process.start()
    flow.join()
    marks = progress.wait(len(log), seconds=300)
    assert process.stop() == 0
    users = {user: p for p in marks for user in progress.users(p)}
    found = online_values(store, list(users))
    replayed = replay(broker, marks, folder)
    names = list(users)
    times = pa.array([from_micros(marks[users[user]].clock) for user in names], pa.timestamp("us", tz="UTC"))
    spine = pa.table({"user_id": names, "event_timestamp": times})
    tables = build_tables(log, folder / "batch")
    batch = dict(zip(names, asof_features(spine, table_source(tables, "user_recent")).to_pylist(), strict=True))
    differ = [sum(found[user] != other[user] for user in names) for other in (replayed, batch)]
    progressed = sum(later > earlier for earlier, later in zip([0, *read_at_kill], read_at_kill, strict=False))
    return (
        f"## {number} kills while {len(log):,} events came in ({rate} a second)\n\n"
        f"Between {progressed} of them the stream had saved new events. Users whose values differ, of {len(names)}: "
        f"{differ[0]} from the replay's, {differ[1]} from the batch job's.\n"
    )


def replay(broker: KafkaBroker, marks: dict[int, Mark], folder: Path) -> dict[str, Body]:
    """What a process that reads the topic once, a few messages at a time, comes to."""
    online: dict[str, Body] = {}

    def write(rows: list[Row]) -> None:
        online.update({user: features for user, _, features in rows})

    consumer = Consumer({"bootstrap.servers": broker.address, "group.id": "replay"})
    consumer.assign([TopicPartition(TOPIC, p, OFFSET_BEGINNING) for p in marks])
    processor = Processor(
        Records(MAPPING, folder),
        SqliteStateStore(folder / "replay.db", TOPIC),
        clock=event_clock,
        write=write,
        reject=lambda rejects: None,
    )
    processor.open(marks)
    left = sum(mark.offset for mark in marks.values())
    while left:
        messages = consumer.consume(100, 1.0)
        left -= len(messages)
        processor.process(
            [Message(m.partition(), m.offset(), m.key(), m.value(), m.timestamp()[1] * 1000) for m in messages]
        )
    consumer.close()
    return online


def _cpu(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


if __name__ == "__main__":
    main()
