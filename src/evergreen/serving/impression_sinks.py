"""Where impressions go: Parquet files on any fsspec file system, or a Kafka topic."""

from __future__ import annotations

import io
import logging
from collections import deque
from collections.abc import Mapping
from datetime import UTC
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from evergreen.contracts.errors import InputError
from evergreen.contracts.impressions import first_rows, to_messages

_DELIVERY_SECONDS = 1.0

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Where the rows go."""

    def write(self, name: str, rows: pa.Table) -> int:
        """Return when the rows are safe; how many requests were refused for good.

        Raises:
            pyarrow.ArrowException: these rows cannot be written, now or later.
            Exception: not now. The call is repeated with the same name and rows, and must not write anything twice.
        """

    def close(self) -> None:
        """Let go of what is held."""


def open_sink(target: str, options: Mapping[str, str] | None = None) -> Sink:
    """The sink that a command line names.

    Args:
        target: a folder or fsspec URL for Parquet, or kafka://host:port[,host:port]/topic.
        options: librdkafka's own, for Kafka.

    Raises:
        InputError: the target cannot be one.
    """
    if not target.startswith("kafka://"):
        if options:
            raise InputError(f"{target}: Kafka's options {sorted(options)} are given, but the log is not kafka://…")
        return ParquetSink(target)
    brokers, _, topic = target.removeprefix("kafka://").partition("/")
    if not brokers or not topic:
        raise InputError(f"{target}: write kafka://host:port/topic")
    return KafkaSink(brokers, topic, options)


class ParquetSink:
    """A file for each batch, in a folder for each date; see `contracts.impressions`."""

    def __init__(self, path: str) -> None:
        """Choose where to write.

        Args:
            path: folder or fsspec URL; made when the first file is written.

        Raises:
            InputError: no such file system.
        """
        try:
            self._fs, self._root = url_to_fs(path)
        except (ValueError, ImportError) as error:
            raise InputError(f"{path}: cannot hold impressions: {error}") from error

    def write(self, name: str, rows: pa.Table) -> int:
        """Write one file: under a name that readers pass over, then under its own."""
        date = rows["served_at"][0].as_py().astimezone(UTC).date()
        folder = f"{self._root}/date={date.isoformat()}"
        buffer = io.BytesIO()
        pq.write_table(rows, buffer, compression="zstd")
        self._fs.makedirs(folder, exist_ok=True)
        partial = f"{folder}/.{name}.partial"
        self._fs.pipe_file(partial, buffer.getvalue())
        self._fs.mv(partial, f"{folder}/{name}.parquet")
        return 0

    def close(self) -> None:
        """Nothing is held."""


class KafkaSink:
    """A message for each request. Delivered at least once: a broker that answers too late may have it twice."""

    def __init__(self, brokers: str, topic: str, options: Mapping[str, str] | None = None) -> None:
        """Connect lazily.

        Args:
            brokers: comma-separated host:port.
            topic: must exist.
            options: librdkafka's own, for example security.protocol.

        Raises:
            InputError: librdkafka does not know an option.
        """
        from confluent_kafka import KafkaException, Producer

        self._topic = topic
        self._brokers = brokers
        self._name: str | None = None
        self._waiting: deque[tuple[bytes, bytes]] = deque()
        self._refused: list[str] = []
        settings: dict[str, Any] = {
            "bootstrap.servers": brokers,
            "enable.idempotence": True,
            "compression.type": "zstd",
            "message.timeout.ms": 0,  # librdkafka goes on trying; the log's own capacity bounds what waits
            "logger": logging.getLogger(f"{__name__}.kafka"),
            **(options or {}),
        }
        try:
            self._producer = Producer(settings)
        except (KafkaException, ValueError, TypeError) as error:
            raise InputError(f"Kafka at {brokers}: {error}: correct its options") from error

    def write(self, name: str, rows: pa.Table) -> int:
        """Hand the messages over and wait until they are delivered; a repeated call waits on."""
        from confluent_kafka import KafkaException

        if name != self._name:
            self._name, self._waiting, self._refused = name, deque(to_messages(rows)), []
        while self._waiting:
            key, value = self._waiting[0]
            try:
                self._producer.produce(self._topic, value, key, on_delivery=self._delivered)
            except BufferError:
                if self._producer.flush(_DELIVERY_SECONDS):
                    raise self._away() from None
                continue
            except KafkaException as error:
                self._refused.append(error.args[0].str())
            self._waiting.popleft()
        if self._producer.flush(_DELIVERY_SECONDS):
            raise self._away()
        if self._refused:
            logger.warning(
                "Kafka at %s refuses %d of %d messages for topic %r; the first: %s",
                self._brokers,
                len(self._refused),
                len(first_rows(rows)),
                self._topic,
                self._refused[0],
            )
        return len(self._refused)

    def close(self) -> None:
        """Forget what is not delivered: it was counted as lost."""
        self._producer.purge()
        self._producer.flush(0)

    def _delivered(self, error: Any, _: Any) -> None:
        if error is not None:
            self._refused.append(error.str())

    def _away(self) -> ConnectionError:
        return ConnectionError(f"Kafka at {self._brokers} has not confirmed {len(self._producer)} messages")
