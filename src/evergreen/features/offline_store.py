"""A Feast offline store on DuckDB whose point-in-time join is an ASOF JOIN.

Feast's own DuckDB store pairs every entity row with every earlier feature row of its key and then de-duplicates; with
hourly change points that is hundreds of rows for each. This one overrides `get_historical_features` and inherits the
rest. What the parent promises holds here too: entity rows keep their order and their duplicates, several entities a
view, renamed join keys and columns, ttl, and the row created last among equal timestamps.

Named by its dotted path in feature_store.yaml; Feast finds `AsofOfflineStoreConfig` beside it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import ibis
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from feast.data_format import ParquetFormat
from feast.data_source import DataSource
from feast.errors import FeastEntityDFMissingColumnsError
from feast.feature_view import DUMMY_ENTITY_ID, DUMMY_ENTITY_VAL, FeatureView
from feast.infra.offline_stores.duckdb import DuckDBOfflineStore, DuckDBOfflineStoreConfig, _write_data_source
from feast.infra.offline_stores.file_source import FileSource
from feast.infra.offline_stores.ibis import IbisRetrievalJob
from feast.infra.offline_stores.offline_store import RetrievalJob, RetrievalMetadata
from feast.infra.offline_stores.offline_utils import infer_event_timestamp_from_entity_df
from feast.infra.registry.base_registry import BaseRegistry
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.repo_config import RepoConfig

from evergreen.features.point_in_time import AsofSource, asof_features, connection, latest_rows


class AsofOfflineStoreConfig(DuckDBOfflineStoreConfig):  # type: ignore[misc]
    """Configuration in feature_store.yaml: the parent's, under this store's own name."""

    type: str = "evergreen.features.offline_store.AsofOfflineStore"


class AsofOfflineStore(DuckDBOfflineStore):  # type: ignore[misc]
    """DuckDBOfflineStore with an ASOF join, and with paths that are relative to the repository."""

    @staticmethod
    def get_historical_features(
        config: RepoConfig,
        feature_views: list[FeatureView],
        feature_refs: list[str],
        entity_df: pd.DataFrame | str,
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,
        filter_by_created_timestamp: bool = False,
        **dates: datetime | None,
    ) -> RetrievalJob:
        """Features of every entity row as known at its time; see `OfflineStore.get_historical_features`.

        Args:
            config: of the repository.
            feature_views: views to join, projections applied.
            feature_refs: "view:feature".
            entity_df: entity rows, as a data frame or a DuckDB query.
            registry: where the on-demand views are.
            project: of the registry.
            full_feature_names: prefix features with their view's name.
            filter_by_created_timestamp: also demand that a row was created by then. That is a second inequality,
                which no ASOF join takes; the parent's join does it.
            dates: start_date and end_date, which Feast gives when there are no entity rows.

        Raises:
            FeastEntityDFMissingColumnsError: the entity rows lack a key.
            ArtifactError: a file lacks a column, or has a key of another type.
            ValueError: no entity rows, or they have a column that is called as a feature.
        """
        if entity_df is None or dates:
            raise ValueError(f"{' and '.join(dates)}: this offline store joins entity rows: give entity_df instead")
        local = [_at_repository(view, config) for view in feature_views]
        on_demand = OnDemandFeatureView.get_requested_odfvs(feature_refs, project, registry)
        if (
            filter_by_created_timestamp
            or not all(_is_local_parquet(view.batch_source) for view in local)
            or any(view.mode == "substrait" for view in on_demand)
        ):
            return DuckDBOfflineStore.get_historical_features(
                config,
                local,
                feature_refs,
                entity_df,
                registry,
                project,
                full_feature_names,
                filter_by_created_timestamp,
            )
        spine = _entity_table(entity_df)
        timestamp = infer_event_timestamp_from_entity_df(
            {field.name: field.type.to_pandas_dtype() for field in spine.schema}
        )
        spine = spine.set_column(spine.schema.get_field_index(timestamp), timestamp, _as_utc(spine[timestamp]))
        sources = [_asof_source(view, feature_refs, full_feature_names) for view in local]
        _check_entity_rows(spine, sources, timestamp)
        bounds = pc.min_max(spine[timestamp])

        def joined() -> pa.Table:
            result = spine
            for source in sources:
                features = asof_features(spine, source, timestamp=timestamp)
                for name in features.column_names:
                    result = result.append_column(name, features[name])
            return result

        return AsofRetrievalJob(
            joined,
            config=config,
            on_demand_feature_views=on_demand,
            full_feature_names=full_feature_names,
            metadata=RetrievalMetadata(
                features=feature_refs,
                keys=[name for name in spine.column_names if name != timestamp],
                min_event_timestamp=bounds["min"].as_py(),
                max_event_timestamp=bounds["max"].as_py(),
            ),
        )

    @staticmethod
    def pull_latest_from_table_or_query(
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None,
        start_date: datetime,
        end_date: datetime,
    ) -> RetrievalJob:
        """Last row of each key in a time range: what materialization reads."""
        source = _absolute(data_source, config)
        columns = [*join_key_columns, *feature_name_columns, timestamp_field]
        if created_timestamp_column:
            columns.append(created_timestamp_column)
        if not _is_local_parquet(source):
            return DuckDBOfflineStore.pull_latest_from_table_or_query(
                config,
                source,
                join_key_columns,
                feature_name_columns,
                timestamp_field,
                created_timestamp_column,
                start_date,
                end_date,
            )

        def latest() -> pa.Table:
            rows = latest_rows(
                source.path,
                keys=join_key_columns,
                columns=columns,
                start=start_date.astimezone(UTC),
                end=end_date.astimezone(UTC),
                timestamp=timestamp_field,
                created=created_timestamp_column or None,
            )
            if not join_key_columns:  # a view without entities: Feast stores it under a key of its own
                rows = rows.append_column(DUMMY_ENTITY_ID, pa.array([DUMMY_ENTITY_VAL] * rows.num_rows, pa.string()))
            return rows

        return AsofRetrievalJob(latest, config=config)

    @staticmethod
    def pull_all_from_table_or_query(
        config: RepoConfig, data_source: DataSource, join_key_columns: list[str], *args: Any, **kwargs: Any
    ) -> RetrievalJob:
        """All rows of a time range."""
        source = _absolute(data_source, config)
        job = DuckDBOfflineStore.pull_all_from_table_or_query(config, source, join_key_columns, *args, **kwargs)
        if not join_key_columns:
            job.table = job.table.mutate(**{DUMMY_ENTITY_ID: ibis.literal(DUMMY_ENTITY_VAL)})
        return job

    @staticmethod
    def offline_write_batch(
        config: RepoConfig, feature_view: FeatureView, table: pa.Table, progress: Callable[[int], Any] | None
    ) -> None:
        """Append pushed rows to the view's file."""
        DuckDBOfflineStore.offline_write_batch(config, _at_repository(feature_view, config), table, progress)


class AsofRetrievalJob(IbisRetrievalJob):  # type: ignore[misc]
    """A query that runs when its result is asked for, and only once."""

    def __init__(
        self,
        query: Callable[[], pa.Table],
        *,
        config: RepoConfig,
        on_demand_feature_views: Sequence[OnDemandFeatureView] = (),
        full_feature_names: bool = False,
        metadata: RetrievalMetadata | None = None,
    ) -> None:
        self._query = query
        self._result: pa.Table | None = None
        super().__init__(
            table=None,
            on_demand_feature_views=on_demand_feature_views,
            full_feature_names=full_feature_names,
            metadata=metadata,
            data_source_writer=_write_data_source,
            staging_location=config.offline_store.staging_location,
            staging_location_endpoint_override=config.offline_store.staging_location_endpoint_override,
            repo_path=str(config.repo_path),
        )

    @property
    def table(self) -> ibis.Table:
        """The result as an Ibis table, on-demand features included, for what the parent does with one: save it."""
        return ibis.memtable(self.to_arrow())

    @table.setter
    def table(self, value: None) -> None:
        """The parent assigns a table; this job makes its own."""

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:
        if self._result is None:
            self._result = self._query()
        return self._result

    def _to_df_internal(self, timeout: int | None = None) -> pd.DataFrame:
        frame: pd.DataFrame = self._to_arrow_internal(timeout).to_pandas()
        return frame

    @property
    def on_demand_feature_views(self) -> list[Any]:
        """On-demand views that see their own inputs alone."""
        return [_NarrowOnDemandView(view) for view in self._on_demand_feature_views]


class _NarrowOnDemandView:
    """An on-demand view that is given the columns it reads, not the whole result.

    Feast turns the whole table into pandas for every on-demand view; lists of item ids make that many times slower
    than the join itself.
    """

    def __init__(self, view: OnDemandFeatureView) -> None:
        self._view = view
        self.name = view.name
        self.projection = view.projection

    def transform_arrow(self, table: pa.Table, full_feature_names: bool = False) -> pa.Table:
        names = set(self._view.get_request_data_schema())
        for projection in self._view.source_feature_view_projections.values():
            for feature in projection.features:
                names |= {feature.name, f"{projection.name_to_use()}__{feature.name}"}
        inputs = table.select([name for name in table.column_names if name in names])
        return self._view.transform_arrow(inputs, full_feature_names)


def _asof_source(view: FeatureView, feature_refs: list[str], full_feature_names: bool) -> AsofSource:
    """How a view's file meets the entity rows: names of the file on one side, of the result on the other."""
    source = view.batch_source
    in_file = {new: old for old, new in source.field_mapping.items()}
    prefix = f"{view.projection.name_to_use()}:"
    features = [ref.removeprefix(prefix) for ref in feature_refs if ref.startswith(prefix)]
    base_name = view.projection.name_alias or view.name
    alias = view.projection.join_key_map  # of some keys or all
    join_keys = {column.name: alias.get(column.name, column.name) for column in view.entity_columns}
    return AsofSource(
        path=source.path,
        keys={in_file.get(key, key): spine_key for key, spine_key in join_keys.items()},
        features={
            (f"{base_name}__{feature}" if full_feature_names else feature): in_file.get(feature, feature)
            for feature in features
        },
        timestamp=in_file.get(source.timestamp_field, source.timestamp_field),
        created=in_file.get(source.created_timestamp_column, source.created_timestamp_column) or None,
        **({"ttl": view.ttl} if view.ttl else {}),
    )


def _check_entity_rows(spine: pa.Table, sources: list[AsofSource], timestamp: str) -> None:
    """Raise unless the entity rows have every key, and no column that a feature will be called."""
    keys = {key for source in sources for key in source.keys.values()}
    if missing := keys - set(spine.column_names):
        raise FeastEntityDFMissingColumnsError({*keys, timestamp}, missing)
    if taken := [name for source in sources for name in source.features if name in spine.column_names]:
        raise ValueError(
            f"the entity rows already have a column {taken[0]!r}, the name of a feature: rename it, or ask for "
            "full_feature_names"
        )


def _entity_table(entity_df: pd.DataFrame | str) -> pa.Table:
    if isinstance(entity_df, str):
        with connection() as db:
            db.execute("SET preserve_insertion_order = true")
            return db.sql(entity_df).to_arrow_table()
    return pa.Table.from_pandas(entity_df, preserve_index=False)


def _as_utc(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """ISO 8601 text, or times with or without a zone, as UTC; without one they are UTC already."""
    if not pa.types.is_timestamp(column.type):
        times = pd.to_datetime(column.to_pandas(), utc=True, format="ISO8601")
        column = pa.chunked_array([pa.Array.from_pandas(times)])
    return column.cast(pa.timestamp("us", tz="UTC"), safe=False)


def _is_local_parquet(source: DataSource) -> bool:
    return (
        isinstance(source, FileSource)
        and (source.file_format is None or isinstance(source.file_format, ParquetFormat))
        and not urlparse(source.path).scheme
    )


def _absolute(source: DataSource, config: RepoConfig) -> DataSource:
    """The source with its path taken from the repository: Feast's DuckDB reader takes it from the working directory."""
    if not _is_local_parquet(source) or Path(source.path).is_absolute():
        return source
    source = copy.copy(source)
    source.file_options = copy.copy(source.file_options)
    source.file_options.uri = FileSource.get_uri_for_file_path(config.repo_path, source.file_options.uri)
    return source


def _at_repository(view: FeatureView, config: RepoConfig) -> FeatureView:
    """The view with an absolute path."""
    if view.batch_source is None:
        return view
    view = copy.copy(view)
    view.batch_source = _absolute(view.batch_source, config)
    return view
