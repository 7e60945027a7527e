"""Small logs of every kind, their real feature tables, and stand-ins for the two parts that take seconds to import."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evergreen.contracts.artifact import sha256_file
from evergreen.contracts.feature_tables import JOIN_KEYS, FeatureTables
from evergreen.contracts.mapping import LogKind, Mapping
from evergreen.contracts.snapshot import Snapshot, SnapshotFile, SnapshotManifest, event_schema
from evergreen.contracts.training_set import ColumnKind, Feature, Side
from evergreen.features.columns import feature_columns
from evergreen.features.online_user import OnlineUser
from evergreen.features.point_in_time import items_as_of
from evergreen.features.tables import build_feature_tables
from evergreen.models.split.halves import half_of
from evergreen.models.split.request import PairColumns
from evergreen.serving.answer import Answer
from evergreen.serving.recommender import Recommender
from tests.serving import ask

TYPES = {
    ColumnKind.CATEGORICAL: pa.string(),
    ColumnKind.NUMERIC: pa.float64(),
    ColumnKind.SEQUENCE: pa.list_(pa.string()),
    ColumnKind.MULTI: pa.list_(pa.string()),
}

START = datetime(2026, 3, 1, tzinfo=UTC)
AS_OF = START + timedelta(days=10)

MAPPINGS = {
    "impressions": """
        name = "shop"
        kind = "impressions"
        timestamp = {column = "t"}
        columns = {user_id = "user", item_id = "item", category = "section"}
        label = {column = "clicked"}
        user_features = {country = "categorical"}
        item_features = {price = "numeric", tags = "multi"}
        context_features = {device = "categorical", battery = "numeric", coupons = "multi"}
    """,
    "interactions": """
        name = "reads"
        kind = "interactions"
        timestamp = {column = "t"}
        columns = {user_id = "user", item_id = "item"}
    """,
    "ratings": """
        name = "films"
        kind = "ratings"
        timestamp = {column = "t"}
        columns = {user_id = "user", item_id = "item", category = "genre"}
        rating = {column = "stars"}
    """,
    "no_users": """
        name = "banners"
        kind = "impressions"
        timestamp = {column = "t"}
        columns = {item_id = "item"}
        label = {column = "clicked"}
        context_features = {device = "categorical"}
    """,
    "context_only": """
        name = "ads"
        kind = "impressions"
        timestamp = {column = "t"}
        label = {column = "clicked"}
        context_features = {i1 = "numeric", c1 = "categorical"}
    """,
}


@dataclass(frozen=True)
class StandInInfo:
    kind: LogKind
    features: tuple[Feature, ...]
    feature_service: str = "ranker_v1"


@dataclass(frozen=True)
class StandInPackage:
    """A linear model over whatever it is given; refuses a table that lacks a column, as the real one does."""

    info: StandInInfo
    path: Path = Path("stand-in")
    version: str = "standin-0123456789ab"
    tables: list[pa.Table] = field(default_factory=list)

    def prepare(self, items: pa.Table) -> StandInScorer:
        return StandInScorer(self, items)

    def predict(self, table: pa.Table) -> np.ndarray:
        self.tables.append(table)
        logit = np.zeros(table.num_rows)
        for feature in self.info.features:
            column = table[feature.name]
            if feature.kind is ColumnKind.NUMERIC:
                logit += np.tanh(column.cast(pa.float64()).fill_null(0).to_numpy()) / 7
            elif feature.name == "item_id" and self.info.kind is not LogKind.RATINGS:
                logit -= np.array([len(item or "") % 3 for item in column.to_pylist()])
        probability = 1 / (1 + np.exp(-logit))
        return 1 + 4 * probability if self.info.kind is LogKind.RATINGS else probability


@dataclass(frozen=True)
class StandInScorer:
    """Puts the halves together to the table that the package predicts from: what `SplitScorer` must be equal to."""

    package: StandInPackage
    items: pa.Table

    def features(self, side: Side) -> tuple[Feature, ...]:
        return tuple(f for f in self.package.info.features if half_of(f) is side)

    def score_many(self, requests: Sequence[Any]) -> list[np.ndarray]:
        return [self.score(*request) for request in requests]

    def score(self, user: dict[str, Any], pairs: Sequence[PairColumns], rows: np.ndarray) -> np.ndarray:
        items = self.items.take(pa.array(rows, mask=rows < 0))
        columns = {}
        for feature in self.package.info.features:
            side, name = half_of(feature), feature.name
            if side is Side.ITEM:
                columns[name] = items[name] if name in items.column_names else pa.nulls(len(rows), pa.string())
            elif side is Side.USER:
                columns[name] = pa.array([user[name]] * len(rows), TYPES[feature.kind])
            else:
                (part,) = (part for part in pairs if name in part.names)
                values = part.values[:, part.names.index(name)]
                if part.of is not None:
                    values = np.append(values, np.nan)[part.of]
                assert values.shape == rows.shape
                columns[name] = pa.array(values, from_pandas=True)
        return self.package.predict(pa.table(columns))

    def updated(self, rows: np.ndarray, items: pa.Table) -> StandInScorer:
        places = np.arange(self.items.num_rows)
        places[rows] = self.items.num_rows + np.arange(len(rows))
        both = pa.concat_tables([self.items, items.select(self.items.column_names)])
        return StandInScorer(self.package, both.take(pa.array(places)))


class StandInUsers:
    """Answers as serving.users.UserFeatures does, from a stand-in store; away while it is told to be."""

    def __init__(self, store: StandInStore) -> None:
        self.store = store
        self.away = False
        row = store.online("ranker_v1", pa.table({key: pa.nulls(1, pa.string()) for key in ("user_id", "category")}))
        names = [name for name in row.column_names if name not in ("user_id", "category")]
        self.pair_features = tuple(name for name in names if name.startswith("user_category_"))
        self.user_features = tuple(name for name in names if name not in self.pair_features)

    def nobody(self, num_categories: int) -> OnlineUser:
        return OnlineUser(
            dict.fromkeys(self.user_features), np.full((num_categories, len(self.pair_features)), np.nan), None
        )

    def one(self, user_id: str, categories: Sequence[str] = ()) -> OnlineUser:
        keys = {"user_id": [user_id] * (1 + len(categories)), "category": [None, *categories]}
        found = self.store.online("ranker_v1", pa.table({k: pa.array(v, pa.string()) for k, v in keys.items()}))
        row = found.slice(0, 1).to_pylist()[0]
        values = {name: row[name] for name in self.user_features}
        values = {k: int(v.timestamp() // 1) if isinstance(v, datetime) else v for k, v in values.items()}
        pairs = [found[name].slice(1).cast(pa.float64()).to_numpy() for name in self.pair_features]
        known = row["user_first_seen"]
        return OnlineUser(values, np.stack(pairs, axis=1), known and known.timestamp())

    async def get(self, asked: Sequence[tuple[str, Sequence[str]]]) -> tuple[list[OnlineUser], bool]:
        if self.away:
            return [self.nobody(len(categories)) for _, categories in asked], True
        return [self.one(user_id, categories) for user_id, categories in asked], False

    async def close(self) -> None:
        """Nothing to close: other recommenders go on with it."""


class StandInStore:
    """Answers as features.store.FeatureStore does: of every key the last row not after `as_of`."""

    def __init__(self, tables: FeatureTables, as_of: datetime = AS_OF) -> None:
        self.tables = tables
        self.as_of = as_of
        self._schemas = {name: pq.read_schema(tables.table(name)) for name in JOIN_KEYS}
        self._latest: dict[str, dict[tuple[str, ...], dict[str, object]]] = {name: {} for name in JOIN_KEYS}
        for name, keys in JOIN_KEYS.items():
            for row in pq.read_table(tables.table(name)).sort_by("event_timestamp").to_pylist():
                if row["event_timestamp"] <= as_of:
                    self._latest[name][tuple(row[key] for key in keys)] = row

    def items(self) -> pa.Table:
        return items_as_of(self.tables, self.as_of)

    def catalogue(self) -> pa.Table:
        return self.items().select(["item_id", "category"])

    def features(self, item_ids: Sequence[str]) -> pa.Table:
        return self.online("ranker_v1", pa.table({"item_id": pa.array(item_ids, pa.string())}))

    def online(self, service: str, entities: pa.Table) -> pa.Table:
        assert service == "ranker_v1"
        given = entities.column_names
        for name, keys in JOIN_KEYS.items():
            if set(keys) <= set(given):
                wanted = zip(*(entities[key].to_pylist() for key in keys), strict=True)
                rows = [self._latest[name].get(key, {}) for key in wanted]
                for field in self._schemas[name]:
                    if field.name not in (*keys, "event_timestamp"):
                        values = pa.array([row.get(field.name) for row in rows], field.type)
                        entities = entities.append_column(field.name, values)
        return entities


@dataclass(frozen=True)
class Parts:
    """Everything that serves one small log."""

    mapping: Mapping
    tables: FeatureTables
    store: StandInStore
    package: StandInPackage
    users: StandInUsers
    recommender: Recommender

    def other(self, **changes: Any) -> Recommender:
        """A recommender of the same parts, save for some."""
        parts = {"package": self.package, "mapping": self.mapping, "source": self.store, "users": self.users} | changes
        prepare = parts.pop("prepare", parts["package"].prepare)
        return Recommender(prepare=prepare, **({"clock": lambda: AS_OF} | parts))

    def ask(self, **fields: Any) -> Answer:
        return ask(self.recommender, **fields)


def write_snapshot(
    mapping: Mapping, path: Path, *, num_rows: int = 600, num_users: int = 12, num_items: int = 30
) -> Snapshot:
    """A log of random events, written as a snapshot."""
    rng = np.random.default_rng(7)
    seconds = np.sort(rng.integers(0, 10 * 86400 - 3600, num_rows))
    item = rng.integers(0, num_items, num_rows)
    user = rng.integers(0, num_users, num_rows)
    columns: dict[str, list[object]] = {
        "event_id": list(range(num_rows)),
        "event_timestamp": [START + timedelta(seconds=int(s), microseconds=321) for s in seconds],
        "user_id": [f"u{n}" for n in user] if mapping.columns.user_id else [None] * num_rows,
        "item_id": [f"item-{n}" for n in item] if mapping.columns.item_id else [None] * num_rows,
        "category": [f"c{n % 4}" if n % 7 else None for n in item] if mapping.columns.category else [None] * num_rows,
        "clicked": [bool(b) for b in rng.random(num_rows) < 0.3] if mapping.label else [None] * num_rows,
        "rating": [float(n) for n in rng.integers(1, 6, num_rows)] if mapping.rating else [None] * num_rows,
        "country": [["se", "no", None][n % 3] for n in user],
        "price": [float(n) if n % 5 else None for n in item],
        "tags": [[f"t{n % 3}", "all"] if n % 4 else None for n in item],
        "device": ["phone"] * num_rows,
        "battery": [0.5] * num_rows,
        "coupons": [["a"]] * num_rows,
        "i1": [1.0] * num_rows,
        "c1": ["x"] * num_rows,
    }
    schema = event_schema(mapping)
    table = pa.table({f.name: pa.array(columns.get(f.name, [None] * num_rows), f.type) for f in schema}, schema=schema)
    file = path / "events" / "part-00000.parquet"
    file.parent.mkdir(parents=True)
    pq.write_table(table, file)
    manifest = SnapshotManifest(
        mapping=mapping,
        as_of=AS_OF,
        rows=num_rows,
        num_users=num_users,
        num_items=num_items,
        num_positives=num_rows,
        first_event=table["event_timestamp"][0].as_py(),
        last_event=table["event_timestamp"][-1].as_py(),
        files=(SnapshotFile(path="events/part-00000.parquet", rows=num_rows, sha256=sha256_file(file)),),
        quarantined={},
    )
    manifest.write(path / Snapshot.MANIFEST)
    return Snapshot.load(path)


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Parts]:
    """Parts that serve the log of a kind; built once each."""
    built: dict[str, Parts] = {}

    def build(kind: str) -> Parts:
        if kind not in built:
            folder = tmp_path_factory.mktemp(kind)
            mapping = Mapping.load(MAPPINGS[kind] + "\n")
            tables = build_feature_tables(write_snapshot(mapping, folder / "snapshot"), folder / "tables")
            store = StandInStore(tables)
            used = {
                "user_id": mapping.columns.user_id,
                "item_id": mapping.columns.item_id,
                "user_category": mapping.columns.category,
            }
            features = tuple(
                f
                for f in feature_columns(mapping)
                if f.name != "coupons"  # a context feature that the model does not read
                and not any(
                    absent is None and f.name.startswith(prefix.removesuffix("_id")) for prefix, absent in used.items()
                )
            )
            package = StandInPackage(StandInInfo(mapping.kind, features))
            users = StandInUsers(store)
            recommender = Recommender(package, mapping, store, users, package.prepare, clock=lambda: AS_OF)
            built[kind] = Parts(mapping, tables, store, package, users, recommender)
        return built[kind]

    return build
