"""Feast's Spark offline store on the very definitions that DuckDB reads.

Feast wants a `SparkSource` for Spark and a `FileSource` for DuckDB, and Spark takes relative paths from the working
directory. Here a `FileSource` of Parquet becomes a `SparkSource` with the repository's path when it is read, so that
feature_repo/ has one set of definitions, and its folder can be moved.

Needs the extra `spark`, and Java 17.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from feast.data_source import DataSource
from feast.feature_view import FeatureView
from feast.infra.offline_stores.contrib.spark_offline_store.spark import SparkOfflineStore, SparkOfflineStoreConfig
from feast.infra.offline_stores.contrib.spark_offline_store.spark_source import SparkSource
from feast.infra.offline_stores.file_source import FileSource
from feast.infra.offline_stores.offline_store import RetrievalJob
from feast.repo_config import RepoConfig


class ParquetSparkOfflineStoreConfig(SparkOfflineStoreConfig):  # type: ignore[misc]
    """Configuration in feature_store.yaml: the parent's, under this store's own name."""

    type: str = "evergreen.features.spark_offline_store.ParquetSparkOfflineStore"


class ParquetSparkOfflineStore(SparkOfflineStore):  # type: ignore[misc]
    """SparkOfflineStore that reads `FileSource`s; see `SparkOfflineStore` for what each method does."""

    @staticmethod
    def get_historical_features(
        config: RepoConfig, feature_views: list[FeatureView], *args: Any, **kwargs: Any
    ) -> RetrievalJob:
        """Features of every entity row as known at its time."""
        views = [copy.copy(view) for view in feature_views]
        for view in views:
            view.batch_source = _on_spark(view.batch_source, config)
        return SparkOfflineStore.get_historical_features(config, views, *args, **kwargs)

    @staticmethod
    def pull_latest_from_table_or_query(
        config: RepoConfig, data_source: DataSource, *args: Any, **kwargs: Any
    ) -> RetrievalJob:
        """Last row of each key in a time range."""
        source = _on_spark(data_source, config)
        return SparkOfflineStore.pull_latest_from_table_or_query(config, source, *args, **kwargs)

    @staticmethod
    def pull_all_from_table_or_query(
        config: RepoConfig, data_source: DataSource, *args: Any, **kwargs: Any
    ) -> RetrievalJob:
        """All rows of a time range."""
        return SparkOfflineStore.pull_all_from_table_or_query(config, _on_spark(data_source, config), *args, **kwargs)


def _on_spark(source: DataSource, config: RepoConfig) -> DataSource:
    """The same rows as Spark reads them; a source that is no file of Parquet stays as it is."""
    if not isinstance(source, FileSource):
        return source
    path = source.path
    return SparkSource(
        name=source.name,
        path=path if urlparse(path).scheme else str(Path(config.repo_path) / path),
        file_format="parquet",
        timestamp_field=source.timestamp_field,
        created_timestamp_column=source.created_timestamp_column,
        field_mapping=source.field_mapping,
    )
