"""The Kafka side: a member of a consumer group that feeds the processor, and outlives brokers and stores that go away.

Where a partition goes on is what the state store says; the offsets committed to Kafka only tell others how far it is.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import redis
from confluent_kafka import (
    OFFSET_BEGINNING,
    TIMESTAMP_NOT_AVAILABLE,
    Consumer,
    KafkaError,
    KafkaException,
    Producer,
    TopicPartition,
)
from confluent_kafka import Message as KafkaMessage

from evergreen.contracts.errors import InputError
from evergreen.features.online_store import OnlineStoreError
from evergreen.stream import metrics
from evergreen.stream.processor import Processor
from evergreen.stream.records import Message, Reject
from evergreen.stream.store import PartitionMovedError

STORE_ERRORS = (redis.RedisError, sqlite3.OperationalError, OnlineStoreError, PartitionMovedError, OSError)
"""After these, work begins anew from what the state store holds."""

_BATCH_MESSAGES = 1000
_BATCH_SECONDS = 0.05
_TICK_SECONDS = 1.0
_RETRY_SECONDS = 1.0
_BROKER_SECONDS = 10.0
_MAX_LETTER_BYTES = 900_000  # a broker takes a megabyte by default, headers included

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StreamSettings:
    """Where the events come from."""

    brokers: str
    """Comma-separated host:port."""
    topic: str
    group: str
    dead_letter_topic: str
    rewind: timedelta | None = None
    """How far back to begin in a partition that the state store does not know; None: at its beginning."""
    options: Mapping[str, str] = field(default_factory=dict)
    """librdkafka's own, for example security.protocol."""

    @property
    def client(self) -> dict[str, Any]:
        """What producer and consumer share."""
        return {"bootstrap.servers": self.brokers, "error_cb": _say, **self.options}


class DeadLetters:
    """Delivers bad messages to a topic of their own: the original bytes, and headers that say whence and why.

    Of a message near Kafka's limit the first 900,000 bytes; the header `length` has the whole.
    """

    def __init__(self, settings: StreamSettings) -> None:
        self._settings = settings
        # No time-out: a message that cannot be delivered is tried again until it is, and nothing is saved before.
        self._producer = Producer({**settings.client, "enable.idempotence": True, "message.timeout.ms": 0})

    def deliver(self, rejects: Sequence[Reject]) -> None:
        """Returns when the broker has them all.

        Raises:
            InputError: the broker refuses them for good.
        """
        refused: list[KafkaError] = []

        def delivered(error: KafkaError | None, _: KafkaMessage) -> None:
            if error is not None:
                refused.append(error)

        for reject in rejects:
            message = reject.message
            headers = {
                "reason": reject.reason,
                "topic": self._settings.topic,
                "partition": str(message.partition),
                "offset": str(message.offset),
                "length": str(len(message.value or b"")),
            }
            self._producer.produce(
                self._settings.dead_letter_topic,
                value=message.value and message.value[:_MAX_LETTER_BYTES],
                key=message.key,
                headers={name: text.encode() for name, text in headers.items()},
                on_delivery=delivered,
            )
        while left := self._producer.flush(_BROKER_SECONDS):
            logger.warning("%d dead letters wait for %s", left, self._settings.brokers)
        if refused:
            raise InputError(
                f"dead-letter topic {self._settings.dead_letter_topic!r} on {self._settings.brokers}: "
                f"{refused[0].str()}: nothing is read on until it takes these {len(rejects)} bad messages"
            )
        first = rejects[0]
        logger.warning(
            "%d messages to %s; the first: %s (partition %d, offset %d)",
            len(rejects),
            self._settings.dead_letter_topic,
            first.reason,
            first.message.partition,
            first.message.offset,
        )


class StreamConsumer:
    """One member of the group. Start as many as the topic has partitions; each partition is read by one of them."""

    def __init__(self, settings: StreamSettings, processor: Processor, stop: threading.Event) -> None:
        """Connect.

        Args:
            settings: where the events come from.
            processor: what is done with them.
            stop: set it, and `run` returns after the batch at hand.

        Raises:
            InputError: the broker cannot be reached, or lacks one of the topics.
        """
        self._settings = settings
        self._processor = processor
        self._stop = stop
        self._assigned: list[int] = []
        self._committed: dict[int, int] = {}
        self._next_tick = 0.0
        self._consumer = Consumer(
            {
                "group.id": settings.group,
                "enable.auto.commit": False,
                "auto.offset.reset": "earliest",
                "fetch.wait.max.ms": 100,
                **settings.client,
            }
        )
        self._check_topics()

    def run(self) -> None:
        """Read until stopped."""
        # Eager rebalances: all partitions are taken back and dealt out anew, so that `open` sees the whole assignment.
        self._consumer.subscribe([self._settings.topic], on_assign=self._on_assign, on_revoke=self._on_revoke)
        try:
            while not self._stop.is_set():
                try:
                    self._step()
                except STORE_ERRORS as error:
                    self._begin_anew(error)
            self._commit()
        finally:
            self._consumer.close()

    def _step(self) -> None:
        received = self._consumer.consume(_BATCH_MESSAGES, _BATCH_SECONDS)
        self._processor.process([_message(m) for m in received if not _is_notice(m)])
        if time.monotonic() >= self._next_tick:
            self._next_tick = time.monotonic() + _TICK_SECONDS
            self._processor.check_marks()
            self._commit()
            self._measure_lag()

    def _check_topics(self) -> None:
        for topic in (self._settings.topic, self._settings.dead_letter_topic):
            try:
                found = self._consumer.list_topics(topic, timeout=_BROKER_SECONDS).topics[topic]
            except KafkaException as error:
                raise InputError(
                    f"--brokers {self._settings.brokers}: no answer within {_BROKER_SECONDS:.0f} s: "
                    f"{error.args[0].str()}; is the address right, and does a broker listen there?"
                ) from error
            if found.error is not None:
                raise InputError(
                    f"topic {topic!r} on {self._settings.brokers}: {found.error.str()}: create it "
                    f"(kafka-topics.sh --create --topic {topic}), or name another"
                )

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        metrics.REBALANCES.inc()
        self._assigned = sorted(p.partition for p in partitions)
        logger.info("assigned partitions %s of %s", self._assigned, self._settings.topic)
        self._assign()

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        # Every batch was saved before this could be called; there is nothing to finish.
        for partition in self._assigned:
            metrics.LAG.labels(str(partition)).set(0)  # the next owner's to report
        self._assigned = []
        self._processor.open([])

    def _begin_anew(self, error: BaseException) -> None:
        """Forget what is in memory, and go on from what the state store holds."""
        metrics.RESTARTS.labels(type(error).__name__).inc()
        logger.warning("beginning anew from the state store: %s", error)
        if not isinstance(error, PartitionMovedError):  # a store that is away or full will be so again at once
            self._stop.wait(_RETRY_SECONDS)
        self._assign()

    def _assign(self) -> None:
        """Place every assigned partition where the state store says, as soon as the store can be asked."""
        while not self._stop.is_set():
            try:
                marks = self._processor.open(self._assigned)
                break
            except STORE_ERRORS as error:
                logger.warning("the state store is away, trying again in %.0f s: %s", _RETRY_SECONDS, error)
                self._stop.wait(_RETRY_SECONDS)
        else:
            return
        starts = [
            self._start(partition, None if mark is None else mark.offset) for partition, mark in sorted(marks.items())
        ]
        if starts:
            self._consumer.assign(starts)

    def _start(self, partition: int, offset: int | None) -> TopicPartition:
        """Where to begin in a partition."""
        place = TopicPartition(self._settings.topic, partition)
        low, high = self._ask(lambda: self._consumer.get_watermark_offsets(place, timeout=_BROKER_SECONDS))
        if offset is None:
            place.offset = OFFSET_BEGINNING
            if self._settings.rewind is not None:
                since = time.time_ns() // 1_000_000 - self._settings.rewind // timedelta(milliseconds=1)
                wanted = TopicPartition(self._settings.topic, partition, since)
                (place,) = self._ask(lambda: self._consumer.offsets_for_times([wanted], timeout=_BROKER_SECONDS))
            logger.info("partition %d is new to the state store: reading offsets %d to %d", partition, low, high)
            return place
        if offset > high:
            raise InputError(
                f"topic {self._settings.topic!r}, partition {partition}: the state store has read up to offset "
                f"{offset}, but the partition ends at {high}: was the topic created anew? Then delete its state "
                "(the keys evergreen:PROJECT:TOPIC:* in Redis, or data/stream.db), and it is read from its beginning"
            )
        if offset < low:
            metrics.MISSED.inc(low - offset)
            logger.error(
                "partition %d: Kafka deleted %d messages (offsets %d to %d) before they were read: raise the topic's "
                "retention.ms above the longest outage",
                partition,
                low - offset,
                offset,
                low - 1,
            )
        place.offset = max(offset, low)
        return place

    def _ask(self, question: Callable[[], Any]) -> Any:
        """The broker's answer, however long that takes."""
        while True:
            try:
                return question()
            except KafkaException as error:
                if self._stop.is_set():
                    raise
                logger.warning("%s does not answer, trying again: %s", self._settings.brokers, error.args[0].str())

    def _commit(self) -> None:
        offsets = {p: mark.offset for p, mark in self._processor.marks.items() if mark is not None}
        ahead = [
            TopicPartition(self._settings.topic, p, o) for p, o in offsets.items() if self._committed.get(p, -1) < o
        ]
        if ahead:
            self._consumer.commit(offsets=ahead, asynchronous=True)
            self._committed |= offsets

    def _measure_lag(self) -> None:
        for partition, mark in self._processor.marks.items():
            low, high = self._consumer.get_watermark_offsets(
                TopicPartition(self._settings.topic, partition), cached=True
            )
            if high >= 0:
                metrics.LAG.labels(str(partition)).set(max(high - (low if mark is None else mark.offset), 0))


def _message(message: KafkaMessage) -> Message:
    partition, offset = message.partition(), message.offset()
    assert partition is not None and offset is not None  # they are None in a notice alone
    kind, millis = message.timestamp()
    timestamp_us = None if kind == TIMESTAMP_NOT_AVAILABLE else millis * 1000
    return Message(partition, offset, message.key(), message.value(), timestamp_us)


def _is_notice(message: KafkaMessage) -> bool:
    """Whether this is not a message but Kafka's word that something is wrong, which it goes on to mend itself."""
    error = message.error()
    if error is None:
        return False
    _say(error)
    if error.fatal():
        raise InputError(f"Kafka gives up: {error.str()}")
    return True


def _say(error: KafkaError) -> None:
    logger.warning("Kafka: %s", error.str())
