"""Write rows of a push source's view to Feast's online store, with little around it: a stream does so all the time."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import feast
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.type_map import python_values_to_proto_values

from evergreen.contracts.errors import ArtifactError

Row = tuple[str, datetime, dict[str, Any]]
"""The key, the row's event_timestamp (with a zone), and the features by name."""


class PushTarget:
    """The online side of one push source whose view has one string key."""

    def __init__(self, path: Path, push_source: str) -> None:
        """Open a store.

        Args:
            path: a Feast repository that was applied, or the feature_store.yaml in it that is meant.
            push_source: its name.

        Raises:
            ArtifactError: no such store or push source.
        """
        path = Path(path).resolve()
        file = path / "feature_store.yaml" if path.is_dir() else path
        if not file.is_file():
            raise ArtifactError(f"{file}: no such file: create the feature store first, or name its feature_store.yaml")
        self.folder = file.parent
        self._store = feast.FeatureStore(repo_path=str(self.folder), fs_yaml_file=file)
        views = [v for v in self._store.list_feature_views() if v.stream_source and v.stream_source.name == push_source]
        if len(views) != 1:
            known = sorted(v.stream_source.name for v in self._store.list_feature_views() if v.stream_source)
            raise ArtifactError(
                f"{file}: no push source {push_source!r} of one view, only {known}: apply the store anew"
            )
        self._view = views[0]
        (self._key,) = self._view.join_keys
        self._types = {f.name: f.dtype.to_value_type() for f in self._view.features}

    @property
    def project(self) -> str:
        """Feast's name of the project."""
        return str(self._store.project)

    def redis(self) -> Any | None:
        """A client of the Redis that the rows go to; None when it is another store."""
        from feast.infra.online_stores.redis import RedisOnlineStore

        online = self._store._get_provider().online_store
        return online._get_client(self._store.config.online_store) if isinstance(online, RedisOnlineStore) else None

    def write(self, rows: Sequence[Row]) -> None:
        """Write rows; the store keeps the newest of a key."""
        columns = {
            name: python_values_to_proto_values([features[name] for *_, features in rows], dtype)
            for name, dtype in self._types.items()
        }
        data = [
            (
                EntityKey(join_keys=[self._key], entity_values=[Value(string_val=key)]),
                {name: values[i] for name, values in columns.items()},
                at,
                None,
            )
            for i, (key, at, _) in enumerate(rows)
        ]
        self._store._get_provider().online_write_batch(self._store.config, self._view, data, None)
