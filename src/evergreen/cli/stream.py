"""`evergreen stream`: what users did in the last minutes, from Kafka into the online store."""

from __future__ import annotations

import logging
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from evergreen.contracts.mapping import LogKind, Mapping, parse_duration

if TYPE_CHECKING:
    from evergreen.fraud.rules import Limits
    from evergreen.stream.state import Event


def _duration(ctx: click.Context, param: click.Parameter, value: str | None) -> timedelta | None:
    duration = parse_duration(value)
    if duration is not None and not isinstance(duration, timedelta):
        raise click.BadParameter(f"{value!r} is not a duration; write e.g. 90s, 15m, 1h or 7d", ctx, param)
    return duration


def _options(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    for value in values:
        if "=" not in value:
            raise click.BadParameter(f"{value!r} is not NAME=VALUE; write e.g. security.protocol=SSL", ctx, param)
    return dict(value.split("=", 1) for value in values)


@click.command()
@click.option("--brokers", required=True, help="Kafka's address, HOST:PORT[,HOST:PORT…].")
@click.option("--topic", required=True, help="Events: JSON objects in the columns of the log, keyed by the user's id.")
@click.option(
    "--group", default="evergreen", show_default=True, help="Consumer group; its members share the partitions."
)
@click.option(
    "--store",
    type=click.Path(path_type=Path, exists=True),
    required=True,
    help="Feature store (OUT/feature_store of a run), or the feature_store.yaml in it.",
)
@click.option("--mapping", default=None, help="How the objects' keys become the event schema.  [default: the store's]")
@click.option("--dead-letter-topic", default=None, help="Where bad messages go.  [default: TOPIC.dead-letter]")
@click.option(
    "--clock",
    type=click.Choice(["wall", "event"]),
    default="wall",
    show_default=True,
    help="event: time stands where the newest event is, to play back a log.",
)
@click.option(
    "--rewind",
    callback=_duration,
    default=None,
    help="How far back to begin when the state store is empty, e.g. 2h.  [default: all that the topic holds]",
)
@click.option(
    "--future-tolerance",
    callback=_duration,
    default="5m",
    show_default=True,
    help="How far an event may be ahead of Kafka's time of its message.",
)
@click.option(
    "--kafka-option", "options", callback=_options, multiple=True, help="librdkafka's NAME=VALUE. Repeatable."
)
@click.option(
    "--suspicious",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=None,
    help="Labels of `evergreen filter`: events that break its rules, by its limits, are counted.",
)
@click.option("--metrics-port", type=click.IntRange(1, 65535), default=None, help="Serve Prometheus metrics here.")
def stream(
    brokers: str,
    topic: str,
    group: str,
    store: Path,
    mapping: str | None,
    dead_letter_topic: str | None,
    clock: str,
    rewind: timedelta | None,
    future_tolerance: timedelta,
    options: dict[str, str],
    suspicious: Path | None,
    metrics_port: int | None,
) -> None:
    """Keep the features of the last minutes fresh from a Kafka topic, until interrupted."""
    from evergreen.contracts.feature_tables import FeatureTables
    from evergreen.contracts.instant import from_micros
    from evergreen.features.push import PushTarget
    from evergreen.fraud.labels import SuspiciousEvents
    from evergreen.stream.clock import CLOCKS, ClockKind
    from evergreen.stream.consumer import DeadLetters, StreamConsumer, StreamSettings
    from evergreen.stream.processor import Processor, Row
    from evergreen.stream.records import Records
    from evergreen.stream.store import RedisStateStore, SqliteStateStore, StateStore

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("evergreen").setLevel(logging.INFO)
    if metrics_port is not None:
        from prometheus_client import start_http_server

        start_http_server(metrics_port)
    target = PushTarget(store, "recent_clicks")
    log = Mapping.load(mapping) if mapping else FeatureTables.load(target.folder / "data").manifest.mapping
    redis = target.redis()
    state: StateStore = (
        SqliteStateStore(target.folder / "data" / "stream.db", topic)
        if redis is None
        else RedisStateStore(redis, target.project, topic)
    )
    settings = StreamSettings(brokers, topic, group, dead_letter_topic or f"{topic}.dead-letter", rewind, options)
    stop = threading.Event()

    def write(rows: Sequence[Row]) -> None:
        target.write([(user, from_micros(at), features) for user, at, features in rows])

    def interrupted(signum: int, frame: Any) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, interrupted)
    signal.signal(signal.SIGINT, interrupted)
    with tempfile.TemporaryDirectory(prefix="evergreen-stream-") as scratch:
        records = Records(log, Path(scratch), future_tolerance=future_tolerance)
        processor = Processor(
            records,
            state,
            clock=CLOCKS[ClockKind(clock)],
            write=write,
            reject=DeadLetters(settings).deliver,
            judge=fraud_rules(SuspiciousEvents.load(suspicious).manifest.limits, log.kind) if suspicious else None,
        )
        StreamConsumer(settings, processor, stop).run()


def fraud_rules(limits: Limits, kind: LogKind) -> Callable[[Event], Iterable[str]]:
    """The rules of `evergreen filter` over the stream's events.

    Args:
        limits: as `evergreen filter` calibrated them.
        kind: of the log.

    Returns:
        What an event breaks; events of a user must come in order.
    """
    from evergreen.fraud import streaming

    rules = streaming.EventRules(limits, kind)

    def judge(event: Event) -> Iterable[str]:
        clicked = event.known is not None
        return rules.update(
            streaming.Event(event.user_id, event.item_id, event.request_id, event.at, clicked, event.clicked_at)
        )

    return judge
