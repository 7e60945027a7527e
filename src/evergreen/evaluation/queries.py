"""Queries of a whole-catalogue ranking: who asked when, what they turned out to want, and what could be shown.

A query is a request of the log, or, when it has none, a user's day. Its time is that of its first event. Relevant are
the items that the user takes up in it for the first time ever. Candidates are the items that are in the catalogue at
that time less those that the user knows already; so a model is asked what the recommender would be asked.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import datetime

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from evergreen.contracts.evaluation import RankingQueries
from evergreen.contracts.feature_tables import FeatureTables
from evergreen.contracts.mapping import Role
from evergreen.contracts.snapshot import TIMESTAMP_TYPE, Snapshot
from evergreen.metrics.statistic import IntArray

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Query:
    """One request for recommendations, answered by what happened then."""

    time: datetime
    user_id: str
    relevant: frozenset[str]
    seen: frozenset[str]
    """Items that are not to be shown: the user had them before."""
    context: dict[str, object]
    """The context features of its first event."""


@dataclass(frozen=True)
class Queries:
    """The queries to rank, in time order, and what became of the others."""

    queries: tuple[Query, ...]
    unit: str
    found: int
    without_new_items: int
    unreachable: int
    sampled_out: int
    unreachable_items: int

    def summary(self, num_candidates: IntArray) -> RankingQueries:
        """The counts for metrics.json.

        Args:
            num_candidates: (num_queries,) how many items each was ranked over.
        """
        return RankingQueries(
            unit=self.unit,
            found=self.found,
            without_new_items=self.without_new_items,
            unreachable=self.unreachable,
            sampled_out=self.sampled_out,
            evaluated=len(self.queries),
            relevant_items=sum(len(query.relevant) for query in self.queries),
            unreachable_items=self.unreachable_items,
            mean_candidates=float(num_candidates.mean()) if len(num_candidates) else 0.0,
            max_candidates=int(num_candidates.max()) if len(num_candidates) else 0,
        )


_QUERIES = """
    WITH events AS (
        SELECT event_id, event_timestamp, user_id, item_id,
            coalesce('request ' || request_id, strftime(event_timestamp, '%Y-%m-%d')) AS part
        FROM read_parquet($files, hive_partitioning = false)
        WHERE user_id IS NOT NULL AND item_id IS NOT NULL AND event_timestamp < $end
    ), test AS (
        SELECT *, min(event_timestamp) OVER query AS asked_at, min(event_id) OVER query AS first_event
        FROM events WHERE event_timestamp >= $start
        WINDOW query AS (PARTITION BY user_id, part)
    ), first_time AS (
        SELECT user_id, item_id, min(event_timestamp) AS first_at FROM events
        WHERE user_id IN (SELECT user_id FROM test) GROUP BY ALL
    ), catalogue AS (
        SELECT item_id, min(event_timestamp) AS listed_at FROM read_parquet($items) GROUP BY item_id
    ), pairs AS (
        SELECT DISTINCT t.user_id, t.part, t.asked_at, t.first_event, t.item_id,
            $recommend_seen OR f.first_at >= t.asked_at AS is_new,
            is_new AND coalesce(c.listed_at <= t.asked_at, false) AS is_reachable
        FROM test t JOIN first_time f USING (user_id, item_id) LEFT JOIN catalogue c USING (item_id)
    )
    SELECT first_event, user_id, asked_at, starts_with(part, 'request ') AS is_request,
        count(*) FILTER (is_new) AS num_new,
        count(*) FILTER (is_reachable) AS num_reachable,
        list(item_id ORDER BY item_id) FILTER (is_reachable) AS relevant
    FROM pairs GROUP BY ALL ORDER BY asked_at, first_event
"""

_SEEN = """
    SELECT q.first_event, list(DISTINCT e.item_id ORDER BY e.item_id) AS items
    FROM queries q JOIN read_parquet($files, hive_partitioning = false) e
        ON e.user_id = q.user_id AND e.event_timestamp < q.asked_at
    WHERE e.item_id IS NOT NULL
    GROUP BY q.first_event
"""


def find_queries(
    snapshot: Snapshot, tables: FeatureTables, *, start: datetime, end: datetime, max_queries: int, seed: int
) -> Queries:
    """Queries of the half-open time range [start, end), drawn by seed when there are more than `max_queries`.

    Args:
        snapshot: the log; also says what a user saw before.
        tables: its item profiles say from when on an item is in the catalogue.
        start: of the test split.
        end: of the test split.
        max_queries: how many to keep.
        seed: of the draw; drawn from the queries that can be evaluated, in a fixed order.
    """
    recommend_seen = snapshot.mapping.recommend_seen_items
    with duckdb.connect() as db:
        db.execute("SET TimeZone = 'UTC'")
        parameters = {
            "files": snapshot.files,
            "items": str(tables.table("item_profile")),
            "start": start,
            "end": end,
            "recommend_seen": recommend_seen,
        }
        table = db.sql(_QUERIES, params=parameters).to_arrow_table()
        num_new, num_reachable = table["num_new"].to_numpy(), table["num_reachable"].to_numpy()
        eligible = np.flatnonzero(num_reachable > 0)
        kept = eligible
        if len(eligible) > max_queries:
            drawn = np.random.default_rng(seed).choice(len(eligible), size=max_queries, replace=False)
            kept = eligible[np.sort(drawn)]
        chosen = table.take(pa.array(kept))
        seen = {} if recommend_seen else _items_seen(db, snapshot, chosen)
        context = _context(db, snapshot, chosen)
    queries = tuple(
        Query(
            time=row["asked_at"],
            user_id=row["user_id"],
            relevant=frozenset(row["relevant"]),
            seen=frozenset(seen.get(row["first_event"], ())),
            context=context[row["first_event"]],
        )
        for row in chosen.to_pylist()
    )
    found = Queries(
        queries=queries,
        unit="request" if pc.any(table["is_request"]).as_py() else "user and day",
        found=table.num_rows,
        without_new_items=int((num_new == 0).sum()),
        unreachable=int(((num_new > 0) & (num_reachable == 0)).sum()),
        sampled_out=len(eligible) - len(kept),
        unreachable_items=int((num_new - num_reachable)[kept].sum()),
    )
    logger.info("%d of %d queries to rank", len(queries), found.found)
    return found


def _items_seen(db: duckdb.DuckDBPyConnection, snapshot: Snapshot, queries: pa.Table) -> dict[int, list[str]]:
    """By first event of a query, the items that its user had events with strictly before its time."""
    db.register("queries", queries.select(["first_event", "user_id", "asked_at"]))
    rows = db.sql(_SEEN, params={"files": snapshot.files}).to_arrow_table()
    return dict(zip(rows["first_event"].to_pylist(), rows["items"].to_pylist(), strict=True))


def _context(db: duckdb.DuckDBPyConnection, snapshot: Snapshot, queries: pa.Table) -> dict[int, dict[str, object]]:
    """By first event of a query, the context features of that event."""
    names = list(snapshot.mapping.features(Role.CONTEXT))
    if not names:
        return {event: {} for event in queries["first_event"].to_pylist()}
    db.register("first_events", queries.select(["first_event"]))
    columns = ", ".join(f'e."{name}"' for name in names)
    rows = db.sql(
        f"SELECT e.event_id, {columns} FROM read_parquet($files, hive_partitioning = false) e "
        "JOIN first_events f ON e.event_id = f.first_event",
        params={"files": snapshot.files},
    ).to_arrow_table()
    return {row.pop("event_id"): row for row in rows.to_pylist()}


class Catalogue:
    """Which items exist when, and in what category; `items_as_of` for hundreds of moments without a query each."""

    def __init__(self, tables: FeatureTables) -> None:
        profile = pq.read_table(tables.table("item_profile"), columns=["item_id", "event_timestamp", "item_category"])
        profile = profile.sort_by([("item_id", "ascending"), ("event_timestamp", "ascending")])
        item_ids = profile["item_id"].combine_chunks().dictionary_encode()
        codes = item_ids.indices.to_numpy(zero_copy_only=False)
        self._item_ids = item_ids.dictionary
        self._category = profile["item_category"].combine_chunks()
        self._times = profile["event_timestamp"].cast(pa.int64()).to_numpy()
        self._starts = np.searchsorted(codes, np.arange(len(item_ids.dictionary)))  # codes rise: sorted by item
        self._row = np.arange(len(codes))

    def as_of(self, moment: datetime) -> pa.Table:
        """The catalogue at a moment: (item_id, category), sorted by item_id."""
        if len(self._starts) == 0:
            return pa.table({"item_id": pa.array([], pa.string()), "category": pa.array([], pa.string())})
        at = pa.scalar(moment, TIMESTAMP_TYPE).value
        known = np.where(self._times <= at, self._row, -1)
        latest = np.maximum.reduceat(known, self._starts)
        listed = np.flatnonzero(latest >= 0)
        category = self._category.take(pa.array(latest[listed]))
        return pa.table({"item_id": self._item_ids.take(pa.array(listed)), "category": category})
