"""What the servers are measured on: a simulated log's feature tables, models of it, and requests.

A world is built once in a folder and found there by later runs: a minute of simulating, ingesting and training.
"""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from evergreen.contracts.artifact import atomic_directory
from evergreen.contracts.feature_tables import FeatureTables
from evergreen.contracts.mapping import Mapping
from evergreen.contracts.training_set import TrainingSet
from evergreen.features.point_in_time import items_as_of, latest_rows
from evergreen.features.store import CONFIG, FeatureStore
from evergreen.features.tables import build_feature_tables
from evergreen.ingest.log import ingest_log
from evergreen.simulator.config import SimulatorConfig
from evergreen.simulator.log import simulate_log
from evergreen.training.config import TrainingConfig
from evergreen.training.dataset import build_training_set
from evergreen.training.trainer import train_model

WORLD = SimulatorConfig(num_items=1_000, num_days=12, events_per_day=20_000, new_item_fraction=0)
"""Items enough to give 500 candidates, and few enough that a server ranks the whole catalogue."""


@dataclass(frozen=True)
class World:
    """Feature tables, and model packages by name beside them."""

    tables: FeatureTables
    packages: Path

    @property
    def as_of(self) -> datetime:
        """The moment that the features are of; requests are asked a little later."""
        return self.tables.manifest.as_of

    def items(self) -> list[str]:
        """Ids of the catalogue."""
        ids: list[str] = items_as_of(self.tables, self.as_of)["item_id"].to_pylist()
        return ids

    def users(self, count: int) -> list[str]:
        """Some users, chosen at random, always the same."""
        path = str(self.tables.table("user_profile"))
        users = latest_rows(path, keys=["user_id"], columns=["user_id"], end=self.as_of)["user_id"].to_pylist()
        return sorted(random.Random(0).sample(users, min(count, len(users))))


def build_world(folder: Path, models: tuple[str, ...], *, config: SimulatorConfig = WORLD) -> World:
    """Simulate, ingest, build feature tables, train each model for an epoch; what is there already stays."""
    log, training_set = folder / "log", folder / "training_set"
    if not (folder / "tables").exists():
        simulate_log(config, log)
        snapshot = ingest_log(Mapping.load("simulated"), str(log), folder / "snapshot")
        tables = build_feature_tables(snapshot, folder / "built")
        store = FeatureStore.create(folder / "store", tables)
        build_training_set(snapshot, tables, store, training_set)
        (folder / "built").rename(folder / "tables")
        shutil.rmtree(folder / "store")
    world = World(FeatureTables.load(folder / "tables"), folder / "packages")
    for name in models:
        if not (world.packages / name).exists():
            one_epoch = TrainingConfig(model=name, max_epochs=1, export_program=False)
            train_model(TrainingSet.load(training_set), world.packages / name, config=one_epoch)
    return world


def enlarge(tables: FeatureTables, num_items: int, path: Path) -> FeatureTables:
    """Feature tables with a larger catalogue: the last row of each item again and again, under other ids.

    Copies differ from what they are copied from by their id and price alone, so a model spreads its scores over them as
    it does over the originals. Everything of the users stays.
    """
    with atomic_directory(path) as scratch:
        shutil.copytree(tables.path, scratch, dirs_exist_ok=True)
        rows = dict(tables.manifest.rows)
        for name in ("item_activity", "item_profile"):
            schema = tables.schema(name)
            last = latest_rows(
                str(tables.table(name)), keys=["item_id"], columns=schema.names, end=tables.manifest.as_of
            ).select(schema.names)
            copies = -(-num_items // last.num_rows)
            parts = [_copy(last, number) for number in range(copies)]
            table = pa.concat_tables(parts).slice(0, num_items).cast(schema).sort_by("item_id")
            pq.write_table(table, scratch / f"{name}.parquet")
            rows[name] = table.num_rows
        tables.manifest.model_copy(update={"rows": rows}).write(scratch / FeatureTables.MANIFEST)
    return FeatureTables.load(path)


def _copy(items: pa.Table, number: int) -> pa.Table:
    if number == 0:
        return items
    ids = [f"{item}_{number:03d}" for item in items["item_id"].to_pylist()]
    items = items.set_column(items.column_names.index("item_id"), "item_id", pa.array(ids, pa.string()))
    if "price" not in items.column_names:
        return items
    factor = np.random.default_rng(number).uniform(0.5, 2.0, items.num_rows)
    price = items["price"].to_numpy() * factor
    return items.set_column(items.column_names.index("price"), "price", pa.array(price))


def create_store(tables: FeatureTables, path: Path, redis_address: str) -> FeatureStore:
    """A materialized feature store whose online side is a Redis."""
    FeatureStore.create(path, tables)
    _set_online_store(
        path,
        type="evergreen.features.redis_online_store.GuardedRedisOnlineStore",
        connection_string=f"{redis_address},socket_timeout=5,socket_connect_timeout=5",
        retry_seconds=5,
    )
    store = FeatureStore.open(path)
    store.materialize(tables.manifest.as_of)
    return FeatureStore.open(path)


def with_feasts_own_redis(store: FeatureStore, path: Path, redis_address: str) -> Path:
    """The same Feast repository on the same rows, read by the online store that Feast itself ships."""
    shutil.copytree(store.path, path, dirs_exist_ok=True)
    _set_online_store(path, type="redis", connection_string=redis_address)
    return path


def _set_online_store(path: Path, **settings: Any) -> None:
    config = yaml.safe_load((path / CONFIG).read_text())
    config["online_store"] = settings
    (path / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False))
