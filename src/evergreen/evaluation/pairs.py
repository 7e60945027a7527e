"""Queries and their candidates with features; what is alike for all candidates of a query is joined once a query.

A query has thousands of candidates, so joining each of them with every table costs more than all else in an evaluation.
Here the user's features are joined once a query, those of user and category once a query and category, and items are
looked up in timelines that are read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from evergreen.contracts.feature_tables import JOIN_KEYS, RANKER_TABLES, FeatureTables
from evergreen.contracts.mapping import Mapping as LogMapping
from evergreen.contracts.mapping import Role
from evergreen.contracts.snapshot import TIMESTAMP_TYPE, event_schema
from evergreen.evaluation.config import RowEncoder
from evergreen.evaluation.queries import Query
from evergreen.features.point_in_time import EVENT_TIMESTAMP, Timeline, asof_features, join_features, table_source
from evergreen.features.request import ELAPSED_FEATURES, request_features

_USER_TABLES = tuple(name for name in RANKER_TABLES if JOIN_KEYS[name] == ("user_id",))
_ITEM_TABLES = tuple(name for name in RANKER_TABLES if JOIN_KEYS[name] == ("item_id",))
_PAIR_TABLES = tuple(name for name in RANKER_TABLES if name not in (*_USER_TABLES, *_ITEM_TABLES))


@dataclass(frozen=True)
class Pairs:
    """Queries and their candidates, with features."""

    users: pa.Table
    """A row for each query, with the features of its user."""
    candidates: pa.Table
    """(num_rows,) with event_timestamp, user_id, item_id, category and the features of item and pair."""
    user_of: NDArray[np.int64]
    """(num_rows,) row of `users`."""

    def encode(self, encoder: RowEncoder) -> Any:
        """(num_rows,) a row for each candidate."""
        return encoder.transform_pairs(self.users, self.candidates, self.user_of)


class PairFeatures:
    """Joins features to queries and candidates, equal to `join_features` on a row for each candidate."""

    def __init__(self, queries: Sequence[Query], tables: FeatureTables, mapping: LogMapping) -> None:
        """Read what holds of items between the first of the queries, which are at least one, and the last."""
        times = [query.time for query in queries]
        self._tables = tables
        self._context = {name: event_schema(mapping).field(name).type for name in mapping.features(Role.CONTEXT)}
        self._items = [Timeline(tables, name, start=min(times), end=max(times)) for name in _ITEM_TABLES]

    def join(self, queries: Sequence[Query], candidates: Sequence[pa.Table]) -> Pairs:
        """Features as known at each query's time.

        Args:
            queries: within the times of those that this was made for.
            candidates: of each query, (item_id, category).
        """
        sizes = [table.num_rows for table in candidates]
        user_of: NDArray[np.int64] = np.repeat(np.arange(len(queries)), sizes)
        asked = self._asked(queries)
        nobody = pa.nulls(len(queries), pa.string())
        users = asked.append_column("item_id", nobody).append_column("category", nobody)
        users = join_features(users, self._tables, only=_USER_TABLES)
        rows = asked.take(pa.array(user_of))
        for name, column in zip(("item_id", "category"), pa.concat_tables(candidates).columns, strict=True):
            rows = rows.append_column(name, column)
        stored = self._of_pairs(asked, rows["category"], user_of)
        for timeline in self._items:
            at = [
                timeline.rows_at(query.time, table["item_id"]) for query, table in zip(queries, candidates, strict=True)
            ]
            of_items = timeline.features.take(pa.chunked_array(at, pa.int64()))
            stored |= dict(zip(of_items.column_names, of_items.columns, strict=True))
        unknown = pa.nulls(rows.num_rows, TIMESTAMP_TYPE)
        moments = pa.table({name: stored.get(name, unknown) for name in ELAPSED_FEATURES.values()})
        on_demand = request_features(rows[EVENT_TIMESTAMP], moments)
        for name, column in {**stored, **dict(zip(on_demand.column_names, on_demand.columns, strict=True))}.items():
            rows = rows.append_column(name, column)
        return Pairs(users, rows, user_of)

    def whole_rows(self, queries: Sequence[Query], candidates: Sequence[pa.Table], num_rows: int) -> pa.Table:
        """The first candidates with all their features in one table, as a request of a server has them."""
        user_of = np.repeat(np.arange(len(queries)), [table.num_rows for table in candidates])[:num_rows]
        items = pa.concat_tables(candidates).slice(0, num_rows)
        spine = self._asked(queries).take(pa.array(user_of))
        for name in ("item_id", "category"):
            spine = spine.append_column(name, items[name])
        return join_features(spine, self._tables)

    def _asked(self, queries: Sequence[Query]) -> pa.Table:
        """A row for each query: time, user and context."""
        columns = {
            EVENT_TIMESTAMP: pa.array([query.time for query in queries], TIMESTAMP_TYPE),
            "user_id": pa.array([query.user_id for query in queries], pa.string()),
        }
        for name, kind in self._context.items():
            columns[name] = pa.array([query.context[name] for query in queries], kind)
        return pa.table(columns)

    def _of_pairs(
        self, asked: pa.Table, category: pa.ChunkedArray, user_of: NDArray[np.int64]
    ) -> dict[str, pa.ChunkedArray]:
        """(num_rows,) columns of user and category, which a query's candidates of one category have in common."""
        categories = category.combine_chunks().dictionary_encode()
        code = pc.fill_null(categories.indices, -1).to_numpy(zero_copy_only=False).astype(np.int64) + 1
        width = len(categories.dictionary) + 1
        pairs, pair_of = np.unique(user_of * width + code, return_inverse=True)
        code_of_pair = pairs % width - 1
        names = categories.dictionary.take(pa.array(code_of_pair, mask=code_of_pair < 0))
        spine = asked.take(pa.array(pairs // width)).append_column("category", names)
        joined = [asof_features(spine, table_source(self._tables, name)) for name in _PAIR_TABLES]
        rows = pa.array(pair_of)
        return {name: table[name].take(rows) for table in joined for name in table.column_names}
