"""Small worlds with a known truth: a training set of clicks or ratings written by hand, and a log of interactions that
goes through the real ingest, feature tables and training set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evergreen.contracts.feature_tables import FeatureTables, FeatureTablesManifest
from evergreen.contracts.mapping import LogKind, Mapping
from evergreen.contracts.snapshot import Snapshot, SnapshotManifest
from evergreen.contracts.training_set import (
    ROW_FIELDS,
    SPLITS,
    ColumnKind,
    Feature,
    FeatureOrigin,
    SplitInfo,
    TrainingSet,
    TrainingSetManifest,
)
from evergreen.features.tables import build_feature_tables
from evergreen.ingest.log import ingest_log
from evergreen.training.dataset import build_training_set
from tests.joined import Joined

START = datetime(2024, 3, 4, tzinfo=UTC)  # a Monday


def whole_rows(users: pa.Table, candidates: pa.Table, user_of: np.ndarray) -> pa.Table:
    """A row for each candidate; columns that candidates do not fill are the user's."""
    of_users = users.take(pa.array(user_of))
    filled = [name for name in candidates.column_names if candidates[name].null_count < candidates.num_rows]
    return pa.table({name: of_users[name] for name in users.column_names} | {name: candidates[name] for name in filled})


@dataclass
class FormulaScorer:
    """A model that is a formula of the rows: everything that an evaluation needs of a model package."""

    name: str
    formula: Callable[[pa.Table], np.ndarray]
    snapshot_id: str
    kind: LogKind
    as_of: datetime
    probability: Callable[[np.ndarray], np.ndarray] = field(default=lambda scores: scores)

    @property
    def info(self) -> Any:
        return SimpleNamespace(name=self.name, kind=self.kind, snapshot_id=self.snapshot_id, as_of=self.as_of)

    @property
    def version(self) -> str:
        return f"{self.name}-0123456789ab"

    @property
    def encoder(self) -> Any:
        return SimpleNamespace(digest="none", transform=lambda table: table, transform_pairs=whole_rows)

    def scores_of_encoded(self, rows: pa.Table) -> np.ndarray:
        return self.formula(rows)

    def predict_encoded(self, rows: pa.Table, positions: np.ndarray | None = None) -> np.ndarray:
        return self.predict(rows)

    def predict(self, table: pa.Table) -> np.ndarray:
        return self.probability(self.formula(table))


@dataclass
class World:
    """Artifacts of one snapshot."""

    snapshot: Snapshot
    tables: FeatureTables
    training_set: TrainingSet

    def scorer(self, name: str, formula: Callable[[pa.Table], np.ndarray], **options: Any) -> FormulaScorer:
        manifest = self.training_set.manifest
        return FormulaScorer(name, formula, self.snapshot.id, self.training_set.kind, manifest.as_of, **options)


def column(table: pa.Table, name: str) -> np.ndarray:
    return table[name].cast(pa.float64()).fill_null(0).to_numpy()


_LABELS = {
    "impressions": '[label]\ncolumn = "click"',
    "ratings": '[rating]\ncolumn = "rating"',
}


def written_world(path: Path, kind: str, rows: dict[str, pa.Table]) -> World:
    """A training set with these rows by split: ROW_FIELDS that are absent become null; `x` is the only feature."""
    mapping = Mapping.load(
        f'name = "by_hand"\nkind = "{kind}"\n[timestamp]\ncolumn = "time"\n'
        f'[columns]\nuser_id = "user"\nitem_id = "item"\n{_LABELS[kind]}'
    )
    path.mkdir(parents=True, exist_ok=True)
    end = START + timedelta(days=30)
    snapshot = Snapshot(
        path / "snapshot",
        SnapshotManifest(
            mapping=mapping,
            as_of=end,
            rows=sum(table.num_rows for table in rows.values()),
            num_users=1,
            num_items=1,
            num_positives=1,
            first_event=START,
            last_event=end,
            files=(),
            quarantined={"rating <script>alert(1)</script> is no number": 3},
        ),
    )
    splits, bounds = {}, {"train": (0, 20), "validation": (20, 23), "test": (23, 30)}
    for split in SPLITS:
        table = rows[split]
        for f in ROW_FIELDS:
            if f.name not in table.column_names:
                values = pa.array(np.arange(table.num_rows)) if f.name == "row_id" else pa.nulls(table.num_rows, f.type)
                table = table.append_column(f, values)
        pq.write_table(table, path / f"{split}.parquet")
        labels = column(table, "label")
        splits[split] = SplitInfo(
            start=START + timedelta(days=bounds[split][0]),
            end=START + timedelta(days=bounds[split][1]),
            rows=len(labels),
            positives=int((labels == 1).sum()) if kind == "impressions" else len(labels),
            label_mean=float(labels.mean()) if len(labels) else 0.0,
        )
    manifest = TrainingSetManifest(
        snapshot_id=snapshot.id,
        mapping=mapping,
        as_of=end,
        feature_service="ranker_v1",
        embargo_seconds=0,
        splits=splits,
        features=(Feature(name="x", kind=ColumnKind.NUMERIC, origin=FeatureOrigin.CONTEXT),),
        dropped_features={"user_rate_1h": "constant"},
        left_out={},
    )
    manifest.write(path / TrainingSet.MANIFEST)
    tables = FeatureTables(
        path / "tables",
        FeatureTablesManifest(snapshot_id=snapshot.id, mapping=mapping, as_of=end, first_event=START, rows={}),
    )
    return World(snapshot, tables, TrainingSet.load(path))


def rows_of_split(split: str, labels: np.ndarray, x: np.ndarray, *, num_users: int = 200, seed: int = 0) -> pa.Table:
    """Rows spread evenly over the split's days; users u0 … of train, of which test sees half, and half new ones."""
    first, last = {"train": (0, 20), "validation": (20, 23), "test": (23, 30)}[split]
    n = len(labels)
    seconds = np.linspace(0, (last - first) * 86_400 - 1, n)
    users = np.random.default_rng(seed).integers(0, num_users, n) + (num_users // 2 if split == "test" else 0)
    return pa.table(
        {
            "event_timestamp": pa.array(
                [START + timedelta(days=first, seconds=float(s)) for s in seconds], pa.timestamp("us", tz="UTC")
            ),
            "user_id": pa.array([f"u{u}" for u in users]),
            "item_id": pa.array([f"i{i % 40}" for i in range(n)]),
            "label": pa.array(labels, pa.float32()),
            "x": pa.array(x, pa.float64()),
        }
    )


@pytest.fixture(scope="session")
def clicks(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Clicks of probability x, 12 % on average."""
    rng = np.random.default_rng(5)
    rows = {}
    for split, n in {"train": 800, "validation": 200, "test": 4_000}.items():
        x = rng.beta(1.2, 9, n)
        rows[split] = rows_of_split(split, rng.random(n) < x, x)
    return written_world(tmp_path_factory.mktemp("clicks"), "impressions", rows)


@pytest.fixture(scope="session")
def ratings(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Ratings of mean x."""
    rng = np.random.default_rng(6)
    rows = {}
    for split, n in {"train": 400, "validation": 200, "test": 1_000}.items():
        x = rng.uniform(2, 4.5, n)
        rows[split] = rows_of_split(split, np.clip(x + rng.normal(0, 0.7, n), 1, 5), x)
    return written_world(tmp_path_factory.mktemp("ratings"), "ratings", rows)


INTERACTIONS = """
name = "reads"
kind = "interactions"
[timestamp]
column = "time"
[columns]
user_id = "user"
item_id = "item"
[context_features]
device = "categorical"
"""


def ingested(path: Path, mapping: str, lines: list[str]) -> tuple[Snapshot, FeatureTables]:
    """A CSV of `time,user,item,device` as a snapshot and its feature tables."""
    path.mkdir(parents=True, exist_ok=True)
    csv = path / "log.csv"
    csv.write_text("\n".join(["time,user,item,device", *lines]) + "\n")
    snapshot = ingest_log(Mapping.load(mapping), str(csv), path / "snapshot")
    return snapshot, build_feature_tables(snapshot, path / "tables")


@pytest.fixture(scope="session")
def reads(tmp_path_factory: pytest.TempPathFactory) -> World:
    """40 users read items of their own kind (number mod 4) four times of five; 80 items appear over 40 days."""
    rng = np.random.default_rng(4)
    events = []
    for _ in range(3_000):
        day = rng.uniform(0, 40)
        user, listed = int(rng.integers(0, 40)), int(8 + 72 * day / 40)
        item = int(rng.integers(0, listed))
        if rng.random() < 0.8:
            item = min(item - item % 4 + user % 4, listed - 1)
        events.append((START + timedelta(days=day), user, item))
    lines = [f"{t.isoformat()},u{u},i{i},{'phone' if u % 2 else 'desk'}" for t, u, i in sorted(events)]
    path = tmp_path_factory.mktemp("reads")
    snapshot, tables = ingested(path, INTERACTIONS, lines)
    training_set = build_training_set(snapshot, tables, Joined(tables), path / "training_set")
    return World(snapshot, tables, training_set)


@pytest.fixture(scope="session")
def ingested_log() -> Callable[[Path, str, list[str]], tuple[Snapshot, FeatureTables]]:
    return ingested


@pytest.fixture(scope="session")
def write_world() -> Callable[[Path, str, dict[str, pa.Table]], World]:
    return written_world


@pytest.fixture(scope="session")
def split_rows() -> Callable[..., pa.Table]:
    return rows_of_split
