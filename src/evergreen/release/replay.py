"""Requests as they were, from the impression log: what a canary is asked."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from evergreen.contracts.impressions import feature_table, first_rows, read_impressions
from evergreen.contracts.training_set import Feature, FeatureOrigin


def context_of(features: Sequence[Feature]) -> list[str]:
    """Names of those features of a model that a request brings."""
    return [feature.name for feature in features if feature.origin is FeatureOrigin.CONTEXT]


def logged_requests(
    impressions: str,
    *,
    context: Collection[str],
    limit: int,
    start: datetime | None = None,
    before: datetime | None = None,
) -> list[dict[str, Any]]:
    """The newest requests of an impression log, as V1 instances that rank the items which were shown then.

    Args:
        impressions: the log: a folder or an fsspec URL of one.
        context: names of the context features of the model's log, see `context_of`.
        limit: how many, at most.
        start: those served before it are left out.
        before: those of that moment or later, by event_timestamp, are left out: a run that is repeated asks the same.

    Returns:
        Oldest first: user_id, candidates, context and event_timestamp, without the request's id: it is not asked again
        by a user, and must not count as shown.

    Raises:
        ArtifactError: there is no such log, or it cannot be read.
    """
    newest: deque[dict[str, Any]] = deque(maxlen=limit)
    for table in read_impressions(impressions, start=start):
        if before is not None:
            table = table.filter(pc.field("event_timestamp") < before)
        if not table.num_rows:
            continue
        newest.extend(_instances(table, context))
    return list(newest)


def _instances(table: pa.Table, context: Collection[str]) -> list[dict[str, Any]]:
    starts = first_rows(table).tolist()
    features = feature_table(table)
    known = [name for name in features.column_names if name in context]
    of_first = features.select(known).take(pa.array(starts)).to_pylist() if known else [{}] * len(starts)
    users = table["user_id"].take(pa.array(starts)).to_pylist()
    times = table["event_timestamp"].take(pa.array(starts)).to_pylist()
    items = table["item_id"].to_pylist()
    instances = []
    for number, (start, end) in enumerate(zip(starts, [*starts[1:], table.num_rows], strict=True)):
        instance: dict[str, Any] = {"event_timestamp": times[number].isoformat()}
        if users[number] is not None:
            instance["user_id"] = users[number]
        if items[start] is not None:
            instance["candidates"] = items[start:end]
        if values := {name: value for name, value in of_first[number].items() if value is not None}:
            instance["context"] = values
        instances.append(instance)
    return instances
