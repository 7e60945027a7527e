"""Packages of all models with random weights, and requests to them: nothing is trained."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import nn

from evergreen.contracts.mapping import LogKind
from evergreen.contracts.training_set import ColumnKind, Feature, FeatureOrigin, Side
from evergreen.models.calibration import PlattCalibration
from evergreen.models.encoding import Encoder, EncoderConfig
from evergreen.models.inputs import PAD
from evergreen.models.package import ModelInfo, ModelPackage
from evergreen.models.popularity import Popularity
from evergreen.models.registry import build_model, model_config
from evergreen.models.split.halves import half_of

NUM_ITEMS, NUM_PAIRS = 12, 30
CATEGORICAL, NUMERIC = ColumnKind.CATEGORICAL, ColumnKind.NUMERIC
FEATURES = tuple(
    Feature(name=name, kind=kind, origin=origin)
    for name, kind, origin in (
        ("item_id", CATEGORICAL, FeatureOrigin.ITEM),
        ("user_id", CATEGORICAL, FeatureOrigin.USER),
        ("item_positives_1d", NUMERIC, FeatureOrigin.ITEM),
        ("user_category_events_1d", NUMERIC, FeatureOrigin.USER_CATEGORY),
        ("user_events_1d", NUMERIC, FeatureOrigin.USER),
        ("user_history", ColumnKind.SEQUENCE, FeatureOrigin.USER),
        ("tags", ColumnKind.MULTI, FeatureOrigin.ITEM),
        ("item_category", CATEGORICAL, FeatureOrigin.ITEM),
        ("price", NUMERIC, FeatureOrigin.ITEM),
        ("hour", CATEGORICAL, FeatureOrigin.ON_DEMAND),
        ("user_age_seconds", NUMERIC, FeatureOrigin.ON_DEMAND),
        ("item_age_seconds", NUMERIC, FeatureOrigin.ON_DEMAND),
        ("user_category_rate_1d", NUMERIC, FeatureOrigin.USER_CATEGORY),
        ("device", CATEGORICAL, FeatureOrigin.CONTEXT),
        ("languages", ColumnKind.MULTI, FeatureOrigin.CONTEXT),
    )
)
ARROW = {CATEGORICAL: pa.string(), NUMERIC: pa.float64()}


def some_table(num_rows: int, *, seed: int = 0, features: tuple[Feature, ...] = FEATURES) -> pa.Table:
    """Rows with nulls everywhere, heavy tails, and ids of which some are rare."""
    rng = np.random.default_rng(seed)

    def ids(letter: str) -> list[str | None]:
        return [None if k == 0 else f"{letter}{k}" for k in np.minimum(rng.geometric(0.15, size=num_rows) - 1, 30)]

    def lists(letter: str) -> list[list[str | None] | None]:
        lengths = rng.integers(-1, 9, size=num_rows)
        return [
            None if n < 0 else [None if k > 28 else f"{letter}{k}" for k in rng.integers(30, size=n)] for n in lengths
        ]

    columns = {}
    for place, feature in enumerate(features):
        if feature.kind is NUMERIC:
            values = rng.lognormal(2, 1.5, num_rows) if place % 2 else rng.normal(3, 2, num_rows)
            columns[feature.name] = pa.array(np.where(rng.random(num_rows) < 0.2, np.nan, values), from_pandas=True)
        elif feature.kind is CATEGORICAL:
            columns[feature.name] = pa.array(ids(feature.name[0]), pa.string())
        else:
            letter = "i" if feature.kind is ColumnKind.SEQUENCE else feature.name[0]
            columns[feature.name] = pa.array(lists(letter), pa.list_(pa.string()))
    return pa.table(columns)


def drifted(table: pa.Table) -> pa.Table:
    """The rows with numbers a hundred times as large."""
    columns = {name: table[name] for name in table.column_names}
    return pa.table({n: pc.multiply(c, 100.0) if pa.types.is_floating(c.type) else c for n, c in columns.items()})


def random_weights(model: nn.Module) -> None:
    """Weights in which every part has a say: as after training."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        if isinstance(model, Popularity):
            model.weights.copy_(torch.randn(len(model.weights)))
        else:
            model.table.weight[PAD] = 0.0
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
        model.set_output(bias=-1.5, scale=0.7)


def make_package(
    name: str,
    *,
    kind: LogKind = LogKind.IMPRESSIONS,
    features: tuple[Feature, ...] = FEATURES,
    config: EncoderConfig | None = None,
    **settings: object,
) -> ModelPackage:
    torch.manual_seed(0)
    encoder = Encoder.fit(
        some_table(400, seed=9, features=features), features, config or EncoderConfig(history_length=6)
    )
    model = build_model(name, model_config(name, settings), encoder.spec)
    random_weights(model)
    info = ModelInfo(
        name=name,
        kind=kind,
        mapping_name="synthetic",
        snapshot_id="5" * 64,
        feature_service="ranker_v1",
        as_of=datetime(2025, 1, 1, tzinfo=UTC),
        features=features,
        hyperparameters={},
        training={},
        train_rows=400,
        label_mean=0.5,
        num_parameters=1,
        rating_minimum=-2.0,
        rating_maximum=-1.0,
    )
    calibration = None if kind is LogKind.RATINGS else PlattCalibration(slope=0.9, intercept=0.1)
    return ModelPackage(Path("package"), info, "0" * 64, encoder, model.eval(), calibration, None, None, {})


@dataclass(frozen=True)
class Request:
    user: pa.Table
    pairs: pa.Table
    rows: NDArray[np.int64]
    items: pa.Table
    whole: pa.Table
    """The same request as `ModelPackage.predict` reads it."""

    @classmethod
    def make(cls, seed: int, *, features: tuple[Feature, ...] = FEATURES, num_pairs: int = NUM_PAIRS) -> Request:
        items = some_table(NUM_ITEMS, seed=1, features=features)
        user, pairs = some_table(1, seed=seed, features=features), some_table(num_pairs, seed=seed, features=features)
        if seed % 2:  # features drift: models cut numbers that training never saw
            user, pairs = drifted(user), drifted(pairs)
        rows = np.random.default_rng(seed).integers(-1, NUM_ITEMS, size=num_pairs)
        of_item = items.take(pa.array(rows, mask=rows < 0))
        of_user = user.take(pa.array(np.zeros(num_pairs, np.int64)))
        sources = {Side.USER: of_user, Side.ITEM: of_item, Side.PAIR: pairs}
        whole = pa.table({f.name: sources[half_of(f)][f.name] for f in features})
        return cls(user, pairs, rows, items, whole)

    @property
    def arguments(self) -> tuple[pa.Table, pa.Table, NDArray[np.int64]]:
        """As `SplitScorer.score` reads it."""
        return self.user, self.pairs, self.rows
