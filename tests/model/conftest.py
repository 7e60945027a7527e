"""Small training sets whose truth is known."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evergreen.contracts.mapping import Columns, Label, LogKind, Mapping, Rating, Timestamp
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

START = datetime(2025, 1, 1, tzinfo=UTC)
SHARES = {"train": 0.7, "validation": 0.15, "test": 0.15}

Columns_ = dict[str, "np.ndarray | list[object]"]
MakeTrainingSet = Callable[..., TrainingSet]


def arrow(values: object, kind: ColumnKind) -> pa.Array:
    if kind is ColumnKind.NUMERIC:
        return pa.array(values, pa.float64(), from_pandas=True)
    return pa.array(values, pa.string() if kind is ColumnKind.CATEGORICAL else pa.list_(pa.string()))


def write_training_set(
    path: Path,
    kinds: dict[str, ColumnKind],
    columns: Columns_,
    label: np.ndarray,
    kind: LogKind,
    fields: Columns_ | None = None,
) -> TrainingSet:
    """Rows one second apart, cut in order. `fields` are those of ROW_FIELDS that are no features (position, …)."""
    num_rows = len(label)
    mapping = Mapping(
        name="synthetic",
        kind=kind,
        timestamp=Timestamp(column="time"),
        columns=Columns(user_id="user", item_id="item"),
        label=Label(column="clicked") if kind is LogKind.IMPRESSIONS else None,
        rating=Rating(column="rating", minimum=1, maximum=5) if kind is LogKind.RATINGS else None,
    )
    micros = int(START.timestamp() * 1e6) + np.arange(num_rows) * 1_000_000
    table = pa.table(
        {
            "row_id": np.arange(num_rows),
            "event_timestamp": pa.array(micros).cast(pa.timestamp("us", tz="UTC")),
            "label": pa.array(label, pa.float32()),
            **{name: arrow(values, kinds[name]) for name, values in columns.items()},
            **(fields or {}),
        }
    )
    for field in ROW_FIELDS:
        if field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(num_rows, field.type))
        elif field.name not in columns:
            place = table.column_names.index(field.name)
            table = table.set_column(place, field, table[field.name].cast(field.type))
    path.mkdir(parents=True)
    splits, first = {}, 0
    for split in SPLITS:
        rows = table.slice(first, round(num_rows * SHARES[split]))
        pq.write_table(rows, path / f"{split}.parquet")
        end = first + rows.num_rows
        splits[split] = SplitInfo(
            start=START + timedelta(seconds=first),
            end=START + timedelta(seconds=end),
            rows=rows.num_rows,
            positives=int(label[first:end].sum()),
            label_mean=float(label[first:end].mean()) if end > first else 0.0,
        )
        first = end
    TrainingSetManifest(
        snapshot_id="5" * 64,
        mapping=mapping,
        as_of=START + timedelta(seconds=num_rows),
        feature_service="ranker_v1",
        embargo_seconds=0,
        splits=splits,
        features=tuple(Feature(name=n, kind=k, origin=_origin(n)) for n, k in kinds.items()),
        dropped_features={"useless": "constant in the training rows: 'a'"},
        left_out={},
    ).write(path / TrainingSet.MANIFEST)
    return TrainingSet.load(path)


def _origin(name: str) -> FeatureOrigin:
    by_prefix = {"user": FeatureOrigin.USER, "item": FeatureOrigin.ITEM}
    return by_prefix.get(name.split("_")[0], FeatureOrigin.CONTEXT)


def _clicks(logit: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return (rng.random(len(logit)) < 1 / (1 + np.exp(-logit))).astype(np.float32)


@pytest.fixture(scope="session")
def interaction_set(tmp_path_factory: pytest.TempPathFactory) -> TrainingSet:
    """Clicks that depend on user x item alone: neither says anything by itself."""
    rng = np.random.default_rng(0)
    num_rows, num_users, num_items = 24_000, 60, 40
    user, item = rng.integers(num_users, size=num_rows), rng.integers(num_items, size=num_rows)
    taste, style = np.resize([-1.0, 1.0], num_users), np.resize([-1.0, 1.0], num_items)  # balanced: no side effects
    label = _clicks(-2.0 + 2.0 * taste[user] * style[item], rng)
    kinds = {"user_id": ColumnKind.CATEGORICAL, "item_id": ColumnKind.CATEGORICAL, "noise": ColumnKind.NUMERIC}
    columns = {
        "user_id": [f"u{i}" for i in user],
        "item_id": [f"i{i}" for i in item],
        "noise": rng.normal(size=num_rows),
    }
    path = tmp_path_factory.mktemp("interaction") / "training_set"
    return write_training_set(path, kinds, columns, label, LogKind.IMPRESSIONS)


@pytest.fixture(scope="session")
def linear_set(tmp_path_factory: pytest.TempPathFactory) -> TrainingSet:
    """Rare clicks that are linear in two numbers and a category, with nulls, a history, tags and item popularity."""
    rng = np.random.default_rng(1)
    num_rows = 16_000
    item, device = rng.integers(50, size=num_rows), rng.integers(4, size=num_rows)
    price, age = rng.normal(size=num_rows), rng.lognormal(3, 1.5, num_rows)
    label = _clicks(-3.2 + 0.9 * price + np.array([-1.0, 0.0, 0.5, 1.0])[device] + 0.2 * np.log1p(age), rng)
    popular = np.where(rng.random(num_rows) < 0.1, np.nan, label * 2 + rng.poisson(3, num_rows))
    columns = {
        "item_id": [f"i{i}" for i in item],
        "device": [None if i == 0 else f"d{i}" for i in device],
        "price": price,
        "age": np.where(rng.random(num_rows) < 0.1, np.nan, age),
        "user_history": [[f"i{i}" for i in range(k % 7)] for k in item],
        "tags": [None if k % 5 == 0 else [f"t{k % 3}", f"t{k % 4}"] for k in item],
        "item_positives_1d": rng.poisson(3, num_rows).astype(float),
        "item_positives_7d": popular,
    }
    kinds = {
        "item_id": ColumnKind.CATEGORICAL,
        "device": ColumnKind.CATEGORICAL,
        "price": ColumnKind.NUMERIC,
        "age": ColumnKind.NUMERIC,
        "user_history": ColumnKind.SEQUENCE,
        "tags": ColumnKind.MULTI,
        "item_positives_1d": ColumnKind.NUMERIC,
        "item_positives_7d": ColumnKind.NUMERIC,
    }
    path = tmp_path_factory.mktemp("linear") / "training_set"
    return write_training_set(path, kinds, columns, label, LogKind.IMPRESSIONS)


@pytest.fixture(scope="session")
def rating_set(tmp_path_factory: pytest.TempPathFactory) -> TrainingSet:
    """Ratings from 1 to 5: an item's quality, a user's kindness, and noise."""
    rng = np.random.default_rng(2)
    num_rows = 12_000
    user, item = rng.integers(80, size=num_rows), rng.integers(60, size=num_rows)
    quality, kindness = rng.normal(scale=0.7, size=60), rng.normal(scale=0.4, size=80)
    label = np.clip(3.4 + quality[item] + kindness[user] + rng.normal(scale=0.5, size=num_rows), 1, 5)
    columns = {
        "user_id": [f"u{i}" for i in user],
        "item_id": [f"i{i}" for i in item],
        "item_rate_30d": 3.4 + quality[item] + rng.normal(scale=0.1, size=num_rows),
    }
    kinds = {
        "user_id": ColumnKind.CATEGORICAL,
        "item_id": ColumnKind.CATEGORICAL,
        "item_rate_30d": ColumnKind.NUMERIC,
    }
    path = tmp_path_factory.mktemp("rating") / "training_set"
    return write_training_set(path, kinds, columns, label.astype(np.float32), LogKind.RATINGS)


@pytest.fixture
def make_training_set(tmp_path: Path) -> MakeTrainingSet:
    """A training set from columns and labels."""

    def make(
        columns: Columns_,
        label: np.ndarray,
        kinds: dict[str, ColumnKind],
        kind: LogKind = LogKind.IMPRESSIONS,
        *,
        name: str = "training_set",
        fields: Columns_ | None = None,
    ) -> TrainingSet:
        return write_training_set(tmp_path / name, kinds, columns, label, kind, fields)

    return make
