"""What the stream says of itself, for Prometheus."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

EVENTS = Counter("evergreen_stream_events", "Events taken into the features.")
LATE_EVENTS = Counter("evergreen_stream_late_events", "Of these, events too old for any window.")
LEFT_OUT = Counter("evergreen_stream_left_out", "Good messages that the mapping leaves out.", ["reason"])
SUSPICIOUS = Counter("evergreen_stream_suspicious", "Events that break a rule of fraud.", ["reason"])
DEAD_LETTERS = Counter("evergreen_stream_dead_letters", "Messages that break the schema.", ["reason"])
REPLAYED = Counter("evergreen_stream_replayed", "Messages that were read again and skipped.")
MISSED = Counter("evergreen_stream_missed", "Messages that Kafka deleted before they were read.")
ROWS = Counter("evergreen_stream_rows_written", "Rows written to the online store.")
REBALANCES = Counter("evergreen_stream_rebalances", "Times that the group shared out its partitions.")
RESTARTS = Counter("evergreen_stream_restarts", "Times that work began anew from the state store.", ["reason"])
LAG = Gauge("evergreen_stream_lag_messages", "Messages not yet read.", ["partition"])
FRESHNESS = Histogram(
    "evergreen_stream_freshness_seconds",
    "From an event to its row in the online store; on the machine's clock alone.",
    buckets=(0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5, 10, 30, 60, 300, 3600),
)
