"""The Feast feature store of one log: a folder with definitions, tables, registry and online store.

    feature_store/
      feature_store.yaml, .feastignore, entities.py, sources.py, views.py, on_demand.py, services.py: from feature_repo/
      data/          the feature tables (manifest.json and Parquet), registry.db, online.db
      items.parquet  the catalogue as of the last materialization
      materialized/  what the online store holds: a digest for each key

All paths in it are relative: the folder can be moved or shipped. `feast -c <folder> apply` works in it too.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

import feast
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from feast.data_source import DataSource
from feast.errors import FeastObjectNotFoundException
from feast.repo_config import RepoConfig

from evergreen.contracts.artifact import atomic_directory
from evergreen.contracts.errors import ArtifactError, RequestError
from evergreen.contracts.feature_tables import JOIN_KEYS, FeatureTables
from evergreen.features.materialize import MaterializedView, materialize_view
from evergreen.features.online_store import GuardedOnlineStore
from evergreen.features.point_in_time import EVENT_TIMESTAMP, check_spine, items_as_of
from evergreen.features.request import REQUEST_SCHEMA, REQUEST_TIMESTAMP

CONFIG = "feature_store.yaml"
ITEMS = "items.parquet"
RECORDS = "materialized"

_DEFINITIONS = ("entities", "sources", "views", "on_demand", "services")
_FEAST_OBJECTS = (DataSource, feast.Entity, feast.FeatureView, feast.OnDemandFeatureView, feast.FeatureService)
_ONLINE_ROWS = 1000  # a SQLite statement binds one variable for each key
_ROW = "evergreen_row"
_NO_KEY = "\x00"  # stands for a null key in a look-up: no id of a log holds a zero byte

logger = logging.getLogger(__name__)


class FeatureStore:
    """One log's features: historical for training, online for serving."""

    def __init__(self, path: Path, tables: FeatureTables, store: feast.FeatureStore) -> None:
        self.path = path
        self.tables = tables
        self._store = store
        self._schemas = {name: tables.schema(name) for name in tables.manifest.rows}
        self._known_projections: dict[str, dict[str, list[str]]] = {}

    @classmethod
    def create(cls, path: Path, tables: FeatureTables, *, config: str = CONFIG) -> FeatureStore:
        """Lay out a Feast repository around a copy of the tables, and apply it.

        Args:
            path: the folder; whatever was there is replaced. Written whole or not at all.
            tables: the feature tables.
            config: which of the files in feature_repo/ becomes its feature_store.yaml.

        Raises:
            ArtifactError: no such config.
            OnlineStoreError: the online store is away.
        """
        path = Path(path).resolve()
        started = time.perf_counter()
        with atomic_directory(path) as scratch:
            for name, file in _definition_files(config).items():
                (scratch / name).write_bytes(file.read_bytes())
            shutil.copytree(tables.path, scratch / "data")
            with warnings.catch_warnings():
                # Feast warns that on-demand views are slow offline: it hands them every column. Our store does not.
                warnings.filterwarnings(
                    "ignore", message="On demand feature view is an experimental", category=RuntimeWarning
                )
                feast.FeatureStore(repo_path=str(scratch)).apply(_definitions(scratch))
        logger.info("feature store applied in %.1f s: %s", time.perf_counter() - started, path)
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> FeatureStore:
        """Open a feature store.

        Raises:
            ArtifactError: there is none in this folder, or its tables are not whole.
        """
        path = Path(path).resolve()
        if not (path / CONFIG).is_file():
            raise ArtifactError(f"{path}: no {CONFIG} in it, so it is no feature store: create it from feature tables")
        return cls(path, FeatureTables.load(path / "data"), feast.FeatureStore(repo_path=str(path)))

    @classmethod
    def bring_up_to_date(cls, path: Path, tables: FeatureTables, *, config: str = CONFIG) -> FeatureStore:
        """Put newer tables under the store in a folder, which is made if there is none: `create`, `replace_tables`."""
        if (Path(path) / CONFIG).is_file():
            return cls.open(path).replace_tables(tables)
        return cls.create(path, tables, config=config)

    @property
    def as_of(self) -> datetime | None:
        """Of what was known when it was materialized last; None: it never was."""
        ends = [view.most_recent_end_time for view in self._store.list_feature_views()]
        return max((end for end in ends if end), default=None)

    def replace_tables(self, tables: FeatureTables) -> FeatureStore:
        """Put newer tables of the same log under the definitions, in place.

        What is online stays, and whoever streams into it goes on; `materialize` then writes what changed. A run that
        breaks off leaves some tables old and some new: replace them again.

        Returns:
            This store, opened again.

        Raises:
            ArtifactError: a table has other columns: the definitions have to be applied anew.
        """
        for name, schema in self._schemas.items():
            if not tables.table(name).exists() or tables.schema(name) != schema:
                raise ArtifactError(
                    f"{tables.path}: {name} has not the columns of {self.tables.path}: create the feature store anew"
                )
        for name in [*(tables.table(name).name for name in self._schemas), FeatureTables.MANIFEST]:
            _replace(tables.path / name, self.tables.path / name)
        return FeatureStore.open(self.path)

    def export_for_serving(self, path: Path) -> None:
        """Write what a server needs of this store, and nothing of the past: a copy that stays small as the log grows.

        Definitions, registry, catalogue and an online store that is a file are as they are here; tables keep their
        columns and lose their rows. A server asks no offline store, so the one of a laptop stands for any: its image
        needs no Spark.

        Args:
            path: the folder; whatever was there is replaced. Written whole or not at all.
        """
        with atomic_directory(Path(path)) as scratch:
            for name in (".feastignore", ITEMS, *(f"{module}.py" for module in _DEFINITIONS)):
                if (self.path / name).exists():  # nothing was materialized yet: no items
                    shutil.copyfile(self.path / name, scratch / name)
            # As it is written there: a password is a variable of the environment, and stays one.
            config = yaml.safe_load((self.path / CONFIG).read_text())
            laptop = yaml.safe_load(_definition_files(CONFIG)[CONFIG].read_text())
            config["offline_store"] = laptop["offline_store"]
            config.pop("batch_engine", None)
            (scratch / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False))
            data = scratch / self.tables.path.name
            data.mkdir()
            for name, schema in self._schemas.items():
                pq.write_table(schema.empty_table(), data / self.tables.table(name).name)
            manifest = self.tables.manifest.model_copy(update={"partitions": None})
            manifest.write(data / FeatureTables.MANIFEST)
            for file in (config["registry"].get("path"), config["online_store"].get("path")):
                if file is not None and (self.path / file).is_file():
                    shutil.copyfile(self.path / file, scratch / file)

    def historical(self, spine: pa.Table, service: str = "ranker_v1", *, known_at: pa.Array | None = None) -> pa.Table:
        """Features as known at each row's time, by Feast's `get_historical_features`.

        Args:
            spine: rows with event_timestamp, user_id, item_id and category; keys may be null. Anything else is kept.
            service: name of a feature service.
            known_at: (num_rows) the moment that each row's features are of, where that is not its own; how long ago
                things are is still counted to the row.

        Returns:
            The spine's rows in the spine's order, with the service's columns appended in the service's order. Equal
            to `point_in_time.join_features` for `ranker_v1`.

        Raises:
            ArtifactError: no such service, or the spine lacks a key column or already has a column of the service.
        """
        projections = self._projections(service)
        schema = self._schema(projections)
        check_spine(spine, {key for view in projections for key in JOIN_KEYS.get(view, ())})
        if taken := [name for name in schema.names if name in spine.column_names]:
            raise ArtifactError(f"the spine already has {taken[0]!r}, a column of {service}: rename or drop it")
        started = time.perf_counter()
        keys = [name for name in ("user_id", "item_id", "category") if name in spine.column_names]
        entities = spine.select([EVENT_TIMESTAMP, *keys])
        entities = entities.append_column(REQUEST_TIMESTAMP, entities[EVENT_TIMESTAMP])
        if known_at is not None:
            entities = entities.set_column(0, EVENT_TIMESTAMP, known_at)
        entities = entities.append_column(_ROW, pa.array(np.arange(spine.num_rows)))
        job = self._store.get_historical_features(entities.to_pandas(), self._service(service))
        found = job.to_arrow()
        if not np.array_equal(found[_ROW], entities[_ROW]):  # Spark gives the rows in an order of its own
            found = found.sort_by(_ROW)
        features = found.select(schema.names).cast(schema)
        for name in features.column_names:
            spine = spine.append_column(name, features[name])
        logger.info("joined %s to %d rows in %.1f s", service, spine.num_rows, time.perf_counter() - started)
        return spine

    def materialize(self, as_of: datetime, *, full: bool = False) -> dict[str, MaterializedView]:
        """Bring the online store and items.parquet to what was known at `as_of` (rows up to and including it).

        Writes the keys whose row is not what was written last, from the first event on; see
        `evergreen.features.materialize`. A killed run does no harm: the next one comes to the same state.

        Args:
            as_of: the time.
            full: write every key. A store that restarted empty, or from an older copy, is noticed without it; one that
                lost some keys (Redis evicting under `maxmemory`) is not.

        Returns:
            What was done, by view.

        Raises:
            ArtifactError: the store is already ahead of `as_of`: it would keep rows from after it.
            OnlineStoreError: the online store is away or full.
        """
        views = self._store.list_feature_views()
        for view in views:
            if view.most_recent_end_time and view.most_recent_end_time > as_of:
                raise ArtifactError(
                    f"{self.path}: {view.name} is materialized as of {view.most_recent_end_time}, later than {as_of}: "
                    "create the store anew to go back"
                )
        started = time.perf_counter()
        # Profiles of the first event are stamped after it, so the first event bounds all rows from below.
        start = min(self.tables.manifest.first_event, as_of)
        online = self._store._get_provider().online_store
        done = {}
        for view in views:
            if isinstance(online, GuardedOnlineStore) and view.name in JOIN_KEYS:
                done[view.name] = materialize_view(
                    self.tables.table(view.name),
                    JOIN_KEYS[view.name],
                    [feature.name for feature in view.features],
                    as_of=as_of,
                    records=self.path / RECORDS,
                    writer=_ViewWriter(online, self._store.config, view),
                    full=full,
                )
                view_done = done[view.name]
                logger.info(
                    "%s: %d keys, %d written, %d refused as late, %d withdrawn",
                    view.name, view_done.rows, view_done.written, view_done.late, view_done.withdrawn,
                )  # fmt: skip
                self._store.registry.apply_materialization(view, self._store.project, start, as_of)
            else:
                self._materialize_by_feast(view.name, start, as_of)
        items = items_as_of(self.tables, as_of)
        partial = self.path / f".{ITEMS}.partial"
        pq.write_table(items, partial, compression="zstd")
        partial.replace(self.path / ITEMS)
        logger.info("materialized as of %s: %d items, %.1f s", as_of, items.num_rows, time.perf_counter() - started)
        return done

    def _materialize_by_feast(self, view: str, start: datetime, as_of: datetime) -> None:
        """A view or an online store of another's: every key, each time."""
        progress = io.StringIO()
        # Not materialize_incremental: it begins at the wall clock, and never sees rows that arrive late.
        with contextlib.redirect_stdout(progress):
            self._store.materialize(start, as_of, feature_views=[view])
        for line in progress.getvalue().splitlines():
            logger.debug("feast: %s", line)

    def items(self) -> pa.Table:
        """The catalogue as of the last materialization: (item_id, category, item_first_seen), sorted by item_id.

        Raises:
            ArtifactError: nothing was materialized yet.
        """
        if not (self.path / ITEMS).is_file():
            raise ArtifactError(f"{self.path}: no {ITEMS}: materialize the store first")
        return pq.read_table(self.path / ITEMS)

    def categories(self) -> list[str]:
        """Categories of the catalogue as of the last materialization, sorted.

        Raises:
            ArtifactError: nothing was materialized yet.
        """
        return sorted(self.items()["category"].drop_null().unique().to_pylist())

    def online(self, service: str, entities: pa.Table) -> pa.Table:
        """Features as last materialized, by Feast's `get_online_features`.

        Args:
            service: name of a feature service.
            entities: any of user_id, item_id, category, and request_timestamp. They decide what is looked up: a view
                is read when all its keys are here, and `request_context` is computed when its views and
                request_timestamp are.

        Returns:
            (num_rows) the entities' columns, then the features of those views in the service's order; null where a
            key is null or unknown.

        Raises:
            ArtifactError: no such service.
            RequestError: the entities have the keys of none of the service's views.
        """
        projections = {
            view: names for view, names in self._projections(service).items() if self._answerable(view, entities)
        }
        if not projections:
            raise RequestError(
                f"{service} has no feature for the keys {entities.column_names}: give user_id or item_id"
            )
        schema = self._schema(projections)
        references = [f"{view}:{name}" for view, names in projections.items() for name in names]
        needed = {key for view in projections for key in JOIN_KEYS.get(view, (REQUEST_TIMESTAMP,))}
        keys = entities.select([name for name in entities.column_names if name in needed])
        parts = [
            self._look_up(keys.slice(offset, _ONLINE_ROWS), references, schema)
            for offset in range(0, keys.num_rows, _ONLINE_ROWS)
        ]
        features = pa.concat_tables(parts) if parts else schema.empty_table()
        for name in features.column_names:
            entities = entities.append_column(name, features[name])
        return entities

    def _look_up(self, keys: pa.Table, references: list[str], schema: pa.Schema) -> pa.Table:
        rows = {
            name: keys[name].to_pylist()
            if pa.types.is_timestamp(keys[name].type)
            else keys[name].cast(pa.string()).fill_null(_NO_KEY).to_pylist()
            for name in keys.column_names
        }
        answer = self._store.get_online_features(references, rows).to_dict()
        return pa.table([pa.array(answer[field.name], field.type) for field in schema], schema=schema)

    def _service(self, name: str) -> feast.FeatureService:
        try:
            return self._store.get_feature_service(name, allow_cache=True)
        except FeastObjectNotFoundException as error:
            known = ", ".join(sorted(service.name for service in self._store.list_feature_services()))
            raise ArtifactError(f"{self.path}: no feature service {name!r}, only {known}") from error

    def _projections(self, service: str) -> dict[str, list[str]]:
        """Views of a service, and the features that it takes of each."""
        if service not in self._known_projections:  # Feast parses the service anew for every request
            views = self._service(service).feature_view_projections
            self._known_projections[service] = {view.name: [f.name for f in view.features] for view in views}
        return self._known_projections[service]

    def _answerable(self, view: str, entities: pa.Table) -> bool:
        keys = JOIN_KEYS.get(view, ("user_id", "item_id", REQUEST_TIMESTAMP))
        return all(key in entities.column_names for key in keys)

    def _schema(self, projections: dict[str, list[str]]) -> pa.Schema:
        """Arrow types of the features, as in their tables."""
        fields = []
        for view, names in projections.items():
            types = self._schemas.get(view, REQUEST_SCHEMA)
            fields += [types.field(name) for name in names]
        return pa.schema(fields)


def _replace(source: Path, target: Path) -> None:
    """Copy a file or a folder over another."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if source.is_dir():
        shutil.copytree(source, partial)
    else:
        shutil.copyfile(source, partial)
    if target.is_dir():
        shutil.rmtree(target)
    elif partial.is_dir():
        target.unlink(missing_ok=True)
    partial.replace(target)


@dataclass(frozen=True)
class _ViewWriter:
    """One view of an online store; see `materialize.ViewWriter`."""

    online: GuardedOnlineStore
    config: RepoConfig
    view: feast.FeatureView

    def marker(self) -> str | None:
        return self.online.marker(self.config, self.view)

    def set_marker(self, marker: str) -> None:
        self.online.set_marker(self.config, self.view, marker)

    def write(self, rows: pa.Table) -> int:
        return self.online.write_table(self.config, self.view, rows)

    def withdraw(self, rows: pa.Table) -> int:
        return self.online.withdraw(self.config, self.view, rows)


def _definition_files(config: str) -> dict[str, Traversable]:
    """The files of the package `feature_repo` by the name that they get; `config` becomes feature_store.yaml."""
    try:
        package: Traversable = resources.files("feature_repo")
    except ModuleNotFoundError:
        # An editable install may expose src/ alone; then the definitions are beside it.
        package = Path(__file__).parents[3] / "feature_repo"
    files = {name: package / name for name in (".feastignore", *(f"{name}.py" for name in _DEFINITIONS))}
    files[CONFIG] = package / config
    if missing := [file.name for file in files.values() if not file.is_file()]:
        raise ArtifactError(f"{package}: there is no {missing[0]} in the feature repository")
    return files


def _definitions(path: Path) -> list[object]:
    """Every Feast object that the definition files of a laid out repository declare.

    Feast's own loader changes the working directory and leaves modules called `views` and `sources` behind; two
    repositories in one process would then share them. Here the modules are fresh each time and forgotten after.
    """
    with _importing_from(path):
        modules = [importlib.import_module(name) for name in _DEFINITIONS]
    found = {
        id(value): value for module in modules for value in vars(module).values() if isinstance(value, _FEAST_OBJECTS)
    }
    return list(found.values())


@contextlib.contextmanager
def _importing_from(path: Path) -> Iterator[None]:
    hidden = {name: sys.modules.pop(name) for name in _DEFINITIONS if name in sys.modules}
    write_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.path.insert(0, str(path))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(path))
        sys.dont_write_bytecode = write_bytecode
        for name in _DEFINITIONS:
            sys.modules.pop(name, None)
        sys.modules.update(hidden)
