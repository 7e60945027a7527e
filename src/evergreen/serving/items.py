"""The features of all items, held in memory with their half of the model computed, and kept fresh in the background.

A table is never changed: a refresh makes another one, and putting it in the place of the old is one assignment. A
request takes the table once and sees nothing of a refresh in between.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from evergreen.contracts.training_set import Feature, Side
from evergreen.features.request import ITEM_ELAPSED_FEATURES, elapsed_seconds, whole_seconds
from evergreen.models.split.request import PairColumns

_MOST_UPDATED = 0.3  # of all items: with more, computing all anew is as quick and leaves nothing behind
_OLDEST_INDEX_SECONDS = 3600.0  # the index knows how old items were when it was built

logger = logging.getLogger(__name__)


class ItemSource(Protocol):
    """Where items come from."""

    def catalogue(self) -> pa.Table:
        """The items that exist: (item_id, category), sorted by item_id."""

    def features(self, item_ids: Sequence[str]) -> pa.Table:
        """(num_ids) item_id and the features of the item views, null where unknown."""


class Scorer(Protocol):
    """What serving needs of `models.split.scorer.SplitScorer`; see there."""

    def features(self, side: Side) -> tuple[Feature, ...]:
        """The features of one half."""

    def score(
        self, user: Mapping[str, Any], pairs: Sequence[PairColumns], rows: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """(m,) probability or rating of each candidate."""

    def score_many(
        self, requests: Sequence[tuple[Mapping[str, Any], Sequence[PairColumns], NDArray[np.int64]]]
    ) -> list[NDArray[np.float64]]:
        """The same of several requests, computed together."""

    def updated(self, rows: NDArray[np.int64], items: pa.Table) -> Self:
        """A scorer in which some items have newer features."""


class Index(Protocol):
    """What serving needs of `serving.retriever.RetrievalIndex`; see there."""

    def search(self, user: Mapping[str, Any], k: int, exclude: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of the items that are most likely chosen, best first."""

    def updated(self, rows: NDArray[np.int64], items: pa.Table) -> Self:
        """An index in which some items have newer features."""


PrepareScorer: TypeAlias = Callable[[pa.Table], Scorer]
BuildIndex: TypeAlias = Callable[[pa.Table], Index]


@dataclass(frozen=True)
class ItemTable:
    """All items of the catalogue. Rows are counted from 0; row -1 is an item of which nothing is known.

    Attributes:
        table: (num_items) item_id, category and the features of the item views; sorted by item_id.
        ids: (num_items) item ids.
        rows: row of each item id.
        categories: of the catalogue, sorted.
        category_of: (num_items + 1,) place in `categories`, -1 for none; the last is row -1.
        seconds: (num_items + 1, num_ages) for each of `ages`: the timestamp it counts from, whole Unix seconds, nan
            where unknown.
        ages: features of `ITEM_ELAPSED_FEATURES` that the items can have.
        scorer: the model with the items' half.
        index: finds candidates; None: every item is one.
        read_at: Unix seconds, when the features were read.
        indexed_at: Unix seconds, when all of the index was built.
    """

    table: pa.Table
    ids: list[str]
    rows: dict[str, int]
    categories: list[str]
    category_of: NDArray[np.int64]
    seconds: NDArray[np.float64]
    ages: tuple[str, ...]
    scorer: Scorer
    index: Index | None
    read_at: float
    indexed_at: float

    @classmethod
    def read(cls, source: ItemSource, prepare: PrepareScorer, build_index: BuildIndex | None) -> Self:
        """Read every item and compute its half.

        Raises:
            OnlineStoreError: the online store is away.
            ArtifactError: the model reads features that the items do not have.
        """
        started = time.perf_counter()
        read_at = time.time()
        table = _read(source)
        scorer = prepare(table)
        index = build_index(with_ages(table, read_at)) if build_index else None
        logger.info("read %d items in %.1f s", table.num_rows, time.perf_counter() - started)
        return cls._of(table, scorer, index, read_at, indexed_at=read_at)

    def refreshed(self, source: ItemSource, prepare: PrepareScorer, build_index: BuildIndex | None) -> Self:
        """Read every item again, and compute anew the halves of those that are not as they were.

        Raises:
            OnlineStoreError: the online store is away.
        """
        read_at = time.time()
        table = _read(source)
        stale_index = build_index is not None and read_at - self.indexed_at > _OLDEST_INDEX_SECONDS
        if table.schema == self.table.schema and table["item_id"].equals(self.table["item_id"]):
            changed = changed_rows(self.table, table)
            if len(changed) <= _MOST_UPDATED * table.num_rows:
                newer = table.take(pa.array(changed))
                scorer = self.scorer.updated(changed, newer) if len(changed) else self.scorer
                index, indexed_at = self.index, self.indexed_at
                if stale_index and build_index:
                    index, indexed_at = build_index(with_ages(table, read_at)), read_at
                elif index is not None and len(changed):
                    index = index.updated(changed, with_ages(newer, read_at))
                logger.debug("%d of %d items have changed", len(changed), table.num_rows)
                return self._of(table, scorer, index, read_at, indexed_at=indexed_at)
        index = build_index(with_ages(table, read_at)) if build_index else None
        return self._of(table, prepare(table), index, read_at, indexed_at=read_at)

    @classmethod
    def _of(cls, table: pa.Table, scorer: Scorer, index: Index | None, read_at: float, *, indexed_at: float) -> Self:
        ids = table["item_id"].to_pylist()
        categories = sorted(table["category"].drop_null().unique().to_pylist())
        places = {category: place for place, category in enumerate(categories)}
        category_of = [places.get(category, -1) for category in table["category"].to_pylist()]
        ages = {name: then for name, then in ITEM_ELAPSED_FEATURES.items() if then in table.column_names}
        seconds = np.full((table.num_rows + 1, len(ages)), np.nan)
        for place, then in enumerate(ages.values()):
            seconds[:-1, place] = whole_seconds(table[then])
        return cls(
            table=table,
            ids=ids,
            rows={item: row for row, item in enumerate(ids)},
            categories=categories,
            category_of=np.array([*category_of, -1], np.int64),
            seconds=seconds,
            ages=tuple(ages),
            scorer=scorer,
            index=index,
            read_at=read_at,
            indexed_at=indexed_at,
        )

    @property
    def num_items(self) -> int:
        """Items of the catalogue."""
        return len(self.ids)

    def find(self, item_ids: Sequence[str]) -> NDArray[np.int64]:
        """(at most num_ids,) rows of the items that are in the catalogue, ascending."""
        try:
            rows = np.fromiter(map(self.rows.__getitem__, item_ids), np.int64, len(item_ids))
        except KeyError:
            rows = np.array([self.rows[item] for item in item_ids if item in self.rows], np.int64)
        rows.sort()
        return rows

    def categories_of(self, rows: NDArray[np.int64]) -> tuple[list[int], NDArray[np.int64]]:
        """The categories of some items.

        Returns:
            Places in `categories` of those that occur, ascending; and (num_rows,) place in that list of each item's
            category, -1 for none.
        """
        codes = self.category_of[rows]
        occurs = np.zeros(len(self.categories) + 1, np.bool_)
        occurs[codes] = True  # the last stands for none
        occurs[-1] = False
        asked = occurs.nonzero()[0]
        place = np.full(len(occurs), -1)
        place[asked] = np.arange(len(asked))
        return asked.tolist(), place[codes]


def changed_rows(before: pa.Table, after: pa.Table) -> NDArray[np.int64]:
    """Rows in which two tables of equal schema and length differ, ascending."""
    changed = np.zeros(after.num_rows, np.bool_)
    for name in after.column_names:
        old, new = (_comparable(table[name].combine_chunks()) for table in (before, after))
        different = pc.not_equal(old, new).fill_null(False)
        appeared = pc.not_equal(old.is_null(), new.is_null())
        changed |= pc.or_(different, appeared).to_numpy(zero_copy_only=False)
    return np.flatnonzero(changed)


def with_ages(table: pa.Table, now: float) -> pa.Table:
    """Items with the features that depend on the moment, as of `now`, Unix seconds."""
    for name, then in ITEM_ELAPSED_FEATURES.items():
        if then in table.column_names and name not in table.column_names:
            ages = elapsed_seconds(int(now), whole_seconds(table[then]))
            table = table.append_column(name, pa.array(ages, from_pandas=True))
    return table


def _read(source: ItemSource) -> pa.Table:
    catalogue = source.catalogue()
    features = source.features(catalogue["item_id"].to_pylist())
    if "category" in features.column_names:
        features = features.drop_columns("category")
    return features.append_column("category", catalogue["category"]).combine_chunks()


def _comparable(column: pa.Array) -> pa.Array:
    """A column that Arrow can compare: lists of strings as one string."""
    return pc.binary_join(column, "\x00") if pa.types.is_list(column.type) else column
