"""Made impressions of a model, and what it was accepted on."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from evergreen.contracts.impressions import impression_schema, impression_table
from evergreen.contracts.mapping import LogKind
from evergreen.contracts.training_set import ColumnKind, Feature, FeatureOrigin
from evergreen.monitoring.profile import Cells, IdCells, fit_cells, make_profile
from evergreen.monitoring.reference import LABEL, PREDICTION, MonitoringReference, ReferenceRows

MODEL = "deepfm-0123456789ab"
MONDAY = datetime(2025, 3, 3, tzinfo=UTC)
DAY = timedelta(days=1)
SLATE = 4
SATURDAY = 0.5
"""Standard deviations that prices are higher on Saturdays: too little to be seen in the mean of a week."""
FEATURES = tuple(
    Feature(name=name, kind=kind, origin=origin)
    for name, kind, origin in (
        ("user_id", ColumnKind.CATEGORICAL, FeatureOrigin.USER),
        ("item_id", ColumnKind.CATEGORICAL, FeatureOrigin.ITEM),
        ("price", ColumnKind.NUMERIC, FeatureOrigin.ITEM),
        ("user_rate_1d", ColumnKind.NUMERIC, FeatureOrigin.USER),
        ("user_recency_seconds", ColumnKind.NUMERIC, FeatureOrigin.ON_DEMAND),
        ("device", ColumnKind.CATEGORICAL, FeatureOrigin.CONTEXT),
        ("user_history", ColumnKind.SEQUENCE, FeatureOrigin.USER),
    )
)


def impressions(
    start: datetime = MONDAY,
    *,
    seed: int = 0,
    requests: int = 900,
    shift: float = 0.0,
    model: str = MODEL,
    features: Sequence[Feature] = FEATURES,
    hours: Sequence[int] = range(24),
    sampling_rate: float = 1.0,
) -> pa.Table:
    """A day of 300 users, four items a request, in the order of time."""
    rng = np.random.default_rng(seed)
    number = np.repeat(np.arange(requests), SLATE)
    user = rng.integers(0, 300, requests)
    at = np.sort(rng.choice(np.array(hours), requests) * 3600 + rng.integers(0, 3600, requests))
    num_rows = len(number)
    moments = pa.array([start + timedelta(seconds=int(s)) for s in at], pa.timestamp("us", tz="UTC")).take(number)
    taste = rng.normal(size=300)
    columns = {
        "request_id": pa.array([f"{start:%d}-{seed}-{n}" for n in number]),
        "event_timestamp": moments,
        "served_at": moments,
        "user_id": pa.array([f"u{u}" for u in user[number]]),
        "known_user": pa.array([True] * num_rows),
        "model_version": pa.array([model] * num_rows),
        "degraded": pa.array([False] * num_rows),
        "sampling_rate": pa.array([sampling_rate] * num_rows),
        "item_id": pa.array([f"i{i}" for i in rng.integers(0, 40, num_rows)]),
        "category": pa.array(["news"] * num_rows),
        "position": pa.array(np.tile(np.arange(1, SLATE + 1), requests).astype(np.int32)),
        "score": pa.array(1 / (1 + np.exp(3 - 0.5 * taste[user[number]] - shift))),
    }
    values = {
        "price": pa.array(rng.normal(size=num_rows) + shift),
        "user_rate_1d": pa.array(np.where(rng.random(num_rows) < 0.3, 0.0, 0.1 + 0.05 * taste[user[number]])),
        "user_recency_seconds": pa.array(rng.exponential(3_600, requests)[number], mask=(user % 7 == 0)[number]),
        "device": pa.array(np.where(user[number] % 3 == 0, "desk", "phone")),
        "user_history": pa.array([["i1"] * (k % 5) for k in user[number]], pa.list_(pa.string())),
        "stock": pa.array(rng.normal(size=num_rows)),
    }
    named = {f.name: values[f.name] for f in features if f.name in values}
    return impression_table(columns, named, impression_schema(features))


def outcomes(table: pa.Table, rate: float, seed: int = 0) -> pa.Table:
    clicked = np.random.default_rng(seed).random(table.num_rows) < rate
    return table.select(["request_id", "event_timestamp", "user_id", "sampling_rate"]).append_column(
        "clicked", pa.array(clicked)
    )


@cache
def reference(kind: LogKind = LogKind.IMPRESSIONS) -> MonitoringReference:
    """Of a week in which Saturdays are dearer; the model learned from the first forty items."""
    week = [impressions(MONDAY + k * DAY, seed=100 + k, shift=SATURDAY if k == 5 else 0.0) for k in range(7)]
    ids = (
        IdCells.from_values(pa.array([f"i{k}" for k in range(40)])),
        IdCells.from_values(pa.array([f"u{k}" for k in range(270)])),
    )

    def columns(table: pa.Table) -> pa.Table:
        flat = pa.table({name: pc.struct_field(table["features"], name) for name in compared})
        return flat.append_column("item_id", table["item_id"]).append_column("user_id", table["user_id"])

    compared = [f.name for f in FEATURES if f.name not in ("user_id", "item_id")]
    whole = pa.concat_tables(week)
    features: dict[str, Cells] = {
        **fit_cells(columns(whole).select(compared)),
        "item_id": ids[0],
        "user_id": ids[1],
    }
    predictions = fit_cells(pa.table({PREDICTION: whole["score"]}), probabilities=[PREDICTION])
    labels = fit_cells(
        pa.table({LABEL: np.arange(1_000) < 100}).cast(pa.schema([(LABEL, pa.float64())])), probabilities=[LABEL]
    )

    def rows(table: pa.Table) -> ReferenceRows:
        scored = table.select(["user_id"]).append_column(PREDICTION, table["score"])
        clicked = outcomes(table, 0.1, seed=9)
        labelled = table.select(["user_id"]).append_column(LABEL, clicked["clicked"].cast(pa.float64()))
        return ReferenceRows(
            features=make_profile([columns(table)], features),
            predictions=make_profile([scored], predictions),
            labels=make_profile([labelled], labels) if kind is LogKind.IMPRESSIONS else None,
        )

    return MonitoringReference(
        model_version=MODEL,
        kind=kind,
        trained_as_of=MONDAY + 7 * DAY,
        features=FEATURES,
        weights={f.name: 1.0 for f in FEATURES},
        training=rows(whole),
        weekdays={k: rows(table) for k, table in enumerate(week)},
        median_ages={"user_recency_seconds": 2_500.0},
        left_out={"hour": "read off the clock: it differs with the window"},
    )
