"""Which column popularity chooses."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from evergreen.contracts.mapping import LogKind
from evergreen.contracts.training_set import ColumnKind, Feature, FeatureOrigin
from evergreen.models.encoding import Encoder
from evergreen.models.popularity import Popularity, PopularityConfig


def fit(columns: dict[str, object], label: np.ndarray, kind: LogKind) -> tuple[Popularity, dict[str, float]]:
    table = pa.table(columns)
    features = [
        Feature(
            name=name,
            kind=ColumnKind.CATEGORICAL if name == "item_id" else ColumnKind.NUMERIC,
            origin=FeatureOrigin.ITEM,
        )
        for name in columns
    ]
    encoder = Encoder.fit(table, features)
    model = Popularity(PopularityConfig(), encoder.spec)
    rows = encoder.transform(table)
    return model, model.fit(rows, label, rows, label, kind=kind)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(LogKind.INTERACTIONS, "item_positives_1d"), (LogKind.IMPRESSIONS, "item_positives_30d")],
)
def test_for_interactions_the_top_of_the_list_decides_and_for_clicks_all_of_it(kind: LogKind, expected: str) -> None:
    rng = np.random.default_rng(0)
    num_rows = 20_000
    label = (rng.random(num_rows) < 0.2).astype(np.float32)
    trending = (label == 1) & (rng.random(num_rows) < 0.5)  # finds half of the chosen items, without a false alarm
    columns = {
        "item_id": [f"i{i}" for i in rng.integers(3000, size=num_rows)],
        "item_positives_1d": np.where(trending, 100.0, rng.integers(3, size=num_rows)),
        "item_positives_30d": label * 3 + rng.normal(10, 1, num_rows),  # separates well, but not at the top
    }
    model, tried = fit(columns, label, kind)
    assert set(tried) == {"item_positives_1d", "item_positives_30d"}
    assert model.column == min(tried, key=tried.__getitem__) == expected


def test_column_that_speaks_against_popular_items_is_no_candidate() -> None:
    label = (np.arange(1000) % 4 == 0).astype(np.float32)
    model, tried = fit({"item_positives_1h": 1 - label, "price": label}, label, LogKind.IMPRESSIONS)
    assert (model.column, tried) == (None, {})


def test_rating_is_a_line_through_the_items_mean() -> None:
    rate = np.random.default_rng(0).uniform(1, 5, 1000)
    model, tried = fit({"item_rate_7d": rate}, (2 * rate - 1).astype(np.float32), LogKind.RATINGS)
    assert model.column == "item_rate_7d"
    assert tried["item_rate_7d"] == pytest.approx(0, abs=1e-8)
