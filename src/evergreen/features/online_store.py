"""What Evergreen's online stores have in common, whatever they keep their rows in.

Feast's stores lack four things. Writing goes through a protobuf object a value, so materialization is slow; here a
table is encoded by column (`value_encoding`). A late row overwrites a newer one (SQLite), or may do so when two write
at once (Redis); here the store itself compares event times as it writes. ttl is not looked at when reading; here a row
older than its view's ttl reads as null, with the status OUTSIDE_MAX_AGE. And nobody can tell whether a store still
holds what was written; here each view has a marker that vanishes with its rows.

Rows lie as Feast's own client lays them, so that it reads what is written here, and `feast materialize` and
`FeatureStore.push` go through the same guard.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
from feast.feature_view import FeatureView
from feast.infra.key_encoding_utils import serialize_entity_key
from feast.infra.online_stores.helpers import extract_text_and_num
from feast.infra.online_stores.online_store import OnlineStore
from feast.protos.feast.serving.ServingService_pb2 import FieldStatus
from feast.repo_config import RepoConfig
from numpy.typing import NDArray

from evergreen.contracts.errors import EvergreenError
from evergreen.contracts.instant import to_micros
from evergreen.features.value_encoding import as_list, encode_entity_keys, encode_values, instants, value_texts

_DEFAULT_BATCH_ROWS = 5000

logger = logging.getLogger(__name__)


class OnlineStoreError(EvergreenError):
    """The online store cannot be reached, or does not take what it is given."""


@dataclass(frozen=True)
class OnlineRows:
    """Rows of one view, encoded.

    Attributes:
        keys: (num_rows) serialized entity keys.
        micros: (num_rows) event times in microseconds since 1970.
        values: by feature, (num_rows) serialized Feast `Value`s.
        texts: by feature, (num_rows) what Feast's SQLite store keeps beside the value; None where not asked for.
        created: (num_rows) when each row was created, None where unknown.
    """

    keys: list[bytes]
    micros: NDArray[np.int64]
    values: dict[str, list[bytes]]
    texts: dict[str, list[str | None]] | None
    created: list[datetime | None]

    @classmethod
    def from_arrow(cls, rows: pa.RecordBatch, view: FeatureView, *, with_texts: bool) -> OnlineRows:
        """Encode rows that have the view's join keys, its features and `event_timestamp`."""
        names = [feature.name for feature in view.features]
        columns = {name: rows.column(name) for name in names}
        return cls(
            keys=as_list(encode_entity_keys(rows, view.join_keys)),
            micros=instants(rows.column(view.batch_source.timestamp_field)),
            values={name: as_list(encode_values(column, name)) for name, column in columns.items()},
            texts={name: value_texts(column) for name, column in columns.items()} if with_texts else None,
            created=[None] * rows.num_rows,
        )

    @classmethod
    def from_feast(cls, data: Sequence[tuple[Any, ...]], version: int, *, with_texts: bool) -> Iterator[OnlineRows]:
        """Encode rows as Feast passes them: entity key, values by feature, event time (UTC if naive), created time.

        Yields:
            Runs of rows with the same features.
        """
        for names, run in itertools.groupby(data, key=lambda row: tuple(row[1])):
            rows = list(run)
            protos = {name: [row[1][name] for row in rows] for name in names}
            yield cls(
                keys=[serialize_entity_key(row[0], entity_key_serialization_version=version) for row in rows],
                micros=np.array([to_micros(_aware(row[2])) for row in rows], dtype=np.int64),
                values={name: [proto.SerializeToString() for proto in column] for name, column in protos.items()},
                texts={
                    name: [extract_text_and_num(proto, False)[0] for proto in column] for name, column in protos.items()
                }
                if with_texts
                else None,
                created=[row[3] for row in rows],
            )


class GuardedOnlineStore(OnlineStore):  # type: ignore[misc]
    """An online store with bulk writes, a guard against late rows, ttl on reading, and markers.

    Of two rows of a key the one with the later event time stays, whichever is written last and by whom; of two with
    the same event time the one that is written last, because a table that is built again may correct a row.
    """

    writes_texts = False
    """Whether `_write` needs `OnlineRows.texts`."""

    def write_table(self, config: RepoConfig, view: FeatureView, rows: pa.Table) -> int:
        """Write rows of a view.

        Args:
            config: of the repository.
            view: whose rows these are.
            rows: (num_rows) with the view's join keys (strings), features and event_timestamp.

        Returns:
            How many rows were late: the store holds newer ones of the same keys, and keeps them.

        Raises:
            OnlineStoreError: the store is away or full. What was written until then stays; writing again is safe.
        """
        late = 0
        for batch in _batches(config, rows):
            late += self._write(config, view, OnlineRows.from_arrow(batch, view, with_texts=self.writes_texts))
        return late

    def withdraw(self, config: RepoConfig, view: FeatureView, rows: pa.Table) -> int:
        """Remove rows that the tables no longer have.

        Args:
            config: of the repository.
            view: whose rows these are.
            rows: join keys and event_timestamp of rows that were written. A key that holds a row of another time by
                now keeps it.

        Returns:
            How many keys were removed.

        Raises:
            OnlineStoreError: the store is away or full.
        """
        return sum(
            self._withdraw(
                config,
                view,
                as_list(encode_entity_keys(batch, view.join_keys)),
                instants(batch.column(view.batch_source.timestamp_field)),
            )
            for batch in _batches(config, rows)
        )

    def online_write_batch(
        self,
        config: RepoConfig,
        table: FeatureView,
        data: list[tuple[Any, ...]],
        progress: Callable[[int], Any] | None,
    ) -> None:
        """Write rows as Feast passes them; see `OnlineStore.online_write_batch`."""
        version = config.entity_key_serialization_version
        runs = OnlineRows.from_feast(data, version, with_texts=self.writes_texts)
        late = sum(self._write(config, table, rows) for rows in runs)
        if late:
            logger.info("%s: %d of %d rows were late, newer ones stay", table.name, late, len(data))
        if progress:
            progress(len(data))

    async def online_write_batch_async(
        self,
        config: RepoConfig,
        table: FeatureView,
        data: list[tuple[Any, ...]],
        progress: Callable[[int], Any] | None,
    ) -> None:
        """`online_write_batch` in a thread: there is one guard, not two."""
        await asyncio.to_thread(self.online_write_batch, config, table, data, progress)

    @abstractmethod
    def marker(self, config: RepoConfig, view: FeatureView) -> str | None:
        """What `set_marker` left, or None when the view's rows are gone (a store that restarted empty)."""

    @abstractmethod
    def set_marker(self, config: RepoConfig, view: FeatureView, marker: str) -> None:
        """Leave a marker beside a view's rows."""

    @abstractmethod
    def _write(self, config: RepoConfig, view: FeatureView, rows: OnlineRows) -> int:
        """Write rows unless the store holds newer ones; returns how many were late."""

    @abstractmethod
    def _withdraw(self, config: RepoConfig, view: FeatureView, keys: list[bytes], micros: NDArray[np.int64]) -> int:
        """Remove the rows of these keys that have just these times; returns how many were removed."""

    def online_read(self, config: RepoConfig, table: FeatureView, *args: Any, **kwargs: Any) -> list[tuple[Any, Any]]:
        """Rows by key; (event time, None) for one older than the view's ttl."""
        return _without_expired(super().online_read(config, table, *args, **kwargs), table)

    async def online_read_async(
        self, config: RepoConfig, table: FeatureView, *args: Any, **kwargs: Any
    ) -> list[tuple[Any, Any]]:
        """`online_read`, asynchronously."""
        return _without_expired(await super().online_read_async(config, table, *args, **kwargs), table)

    def _read_features_per_fv(self, config: RepoConfig, grouped_refs: Any, *args: Any, **kwargs: Any) -> None:
        response = _response(args, kwargs)
        first = len(response.results)
        super()._read_features_per_fv(config, grouped_refs, *args, **kwargs)
        _hide_expired(response, first, grouped_refs)

    async def _read_features_per_fv_async(
        self, config: RepoConfig, grouped_refs: Any, *args: Any, **kwargs: Any
    ) -> None:
        response = _response(args, kwargs)
        first = len(response.results)
        await super()._read_features_per_fv_async(config, grouped_refs, *args, **kwargs)
        _hide_expired(response, first, grouped_refs)


def _batches(config: RepoConfig, rows: pa.Table) -> list[pa.RecordBatch]:
    """Rows in the parts that a store takes at once."""
    size = config.materialization_config.online_write_batch_size or _DEFAULT_BATCH_ROWS
    batches: list[pa.RecordBatch] = rows.combine_chunks().to_batches(max_chunksize=size)
    return batches


def _response(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`online_features_response` among the arguments of Feast's `_read_features_per_fv`."""
    return kwargs["online_features_response"] if "online_features_response" in kwargs else args[2]


def _without_expired(rows: list[tuple[Any, Any]], view: FeatureView) -> list[tuple[Any, Any]]:
    if not view.ttl:
        return rows
    oldest = time.time() - view.ttl.total_seconds()
    return [(at, None) if at is not None and at.timestamp() < oldest else (at, values) for at, values in rows]


def _hide_expired(response: Any, first: int, grouped_refs: Sequence[tuple[FeatureView, Sequence[str]]]) -> None:
    """Make values older than their view's ttl null, with the status OUTSIDE_MAX_AGE.

    Args:
        response: Feast's response, a result for each feature, in the order of `grouped_refs` from `first` on.
        first: where the features begin.
        grouped_refs: views and the features asked of each.
    """
    place, now = first, time.time()
    for view, features in grouped_refs:
        results = response.results[place : place + len(features)]
        place += len(features)
        if not view.ttl:
            continue
        oldest = now - view.ttl.total_seconds()
        for result in results:
            for row, at in enumerate(result.event_timestamps):
                if (at.seconds or at.nanos) and at.seconds + at.nanos / 1e9 < oldest:
                    result.values[row].Clear()
                    result.statuses[row] = FieldStatus.OUTSIDE_MAX_AGE
    if place != len(response.results):
        raise RuntimeError(
            f"Feast answered with {len(response.results) - first} features where {place - first} were asked for: "
            "this version of Feast is not the one that evergreen.features.online_store was written for"
        )


def _aware(moment: datetime) -> datetime:
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
