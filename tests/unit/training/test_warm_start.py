"""Which weights a warm start takes, and from whom."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from evergreen.contracts.errors import TrainingError
from evergreen.contracts.mapping import LogKind
from evergreen.contracts.training_set import ColumnKind, Feature, FeatureOrigin
from evergreen.models.base import RankingModel, score_rows
from evergreen.models.encoding import Encoder, EncoderConfig
from evergreen.models.package import ModelInfo, ModelPackage
from evergreen.models.registry import build_model, model_config
from evergreen.training.warm_start import check_warm_start, take_weights

FEATURES = (
    Feature(name="user_id", kind=ColumnKind.CATEGORICAL, origin=FeatureOrigin.USER),
    Feature(name="item_id", kind=ColumnKind.CATEGORICAL, origin=FeatureOrigin.ITEM),
    Feature(name="price", kind=ColumnKind.NUMERIC, origin=FeatureOrigin.ITEM),
)
SETTINGS = {"embedding_dim": 3, "hidden": [4], "dropout": 0.0}


def table(items: list[str]) -> pa.Table:
    """Each item in as many rows as it has users."""
    count = len(items)
    return pa.table(
        {"user_id": [f"u{i % 3}" for i in range(count)], "item_id": items, "price": np.linspace(0.0, 1.0, count)}
    )


OLD = table([f"i{i}" for i in range(6) for _ in range(4)])
NEW = table([f"i{i}" for i in range(3, 9) for _ in range(4)])


def package_of(model: RankingModel, encoder: Encoder, name: str = "deepfm") -> ModelPackage:
    info = ModelInfo(
        name=name,
        kind=LogKind.IMPRESSIONS,
        mapping_name="synthetic",
        snapshot_id="5" * 64,
        feature_service="ranker_v1",
        as_of=datetime(2025, 1, 1, tzinfo=UTC),
        features=FEATURES,
        hyperparameters=model_config(name, SETTINGS).model_dump(mode="json"),
        training={},
        train_rows=24,
        label_mean=0.5,
        num_parameters=0,
    )
    return ModelPackage(
        path=Path("champion"), info=info, digest="d", encoder=encoder, model=model,
        calibration=None, position=None, outcome=None, metrics={},
    )  # fmt: skip


def champion_of(config: EncoderConfig) -> ModelPackage:
    """A model all of whose weights mean something."""
    encoder = Encoder.fit(OLD, FEATURES, config)
    torch.manual_seed(0)
    model = build_model("deepfm", model_config("deepfm", SETTINGS), encoder.spec)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
        model.table.weight[0] = 0.0  # padding
    model.set_output(bias=-1.5, scale=1.0)
    return package_of(model.eval(), encoder)


@pytest.mark.parametrize(
    "config",
    [
        EncoderConfig(),
        EncoderConfig(oov_buckets=5, num_hashes=2),
        EncoderConfig(max_categories=0, oov_buckets=16, num_hashes=2),
    ],
    ids=["own rows", "own and hashed rows", "hashed rows"],
)
def test_model_scores_new_rows_as_the_champion_does(config: EncoderConfig) -> None:
    champion = champion_of(config)
    encoder = champion.encoder.extended(NEW.column, features=FEATURES)
    torch.manual_seed(1)
    model = build_model("deepfm", model_config("deepfm", SETTINGS), encoder.spec)
    take_weights(model, encoder, champion)
    for rows in (OLD, NEW, table(["never seen", "i1", "i8"])):
        expected = score_rows(champion.model, champion.encoder.transform(rows))
        np.testing.assert_allclose(score_rows(model, encoder.transform(rows)), expected, atol=1e-5)
    assert model.bias.item() == -1.5


def test_champion_keeps_its_weights_when_the_new_model_learns() -> None:
    champion = champion_of(EncoderConfig())
    before = {name: value.clone() for name, value in champion.model.state_dict().items()}
    encoder = champion.encoder.extended(OLD.column, features=FEATURES)
    model = build_model("deepfm", model_config("deepfm", SETTINGS), encoder.spec)
    take_weights(model, encoder, champion)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    assert all(torch.equal(champion.model.state_dict()[name], value) for name, value in before.items())


def test_same_model_with_the_same_hyperparameters_is_let_pass() -> None:
    check_warm_start(champion_of(EncoderConfig()), "deepfm", model_config("deepfm", SETTINGS))


def test_other_encoding_is_refused_rather_than_passed_over() -> None:
    champion, settings = champion_of(EncoderConfig()), model_config("deepfm", SETTINGS)
    with pytest.raises(TrainingError, match=r"encodes its features otherwise .* leave `encoder` out"):
        check_warm_start(champion, "deepfm", settings, EncoderConfig(oov_buckets=5))
    check_warm_start(champion_of(EncoderConfig(oov_buckets=5)), "deepfm", settings, EncoderConfig(oov_buckets=5))


def test_another_model_is_refused_with_the_way_out() -> None:
    with pytest.raises(TrainingError, match=r"champion is a deepfm, not a dlrm: train a deepfm, or start afresh"):
        check_warm_start(champion_of(EncoderConfig()), "dlrm", model_config("dlrm", {}))


def test_other_hyperparameters_are_all_named_with_both_values() -> None:
    asked = model_config("deepfm", SETTINGS | {"embedding_dim": 8, "hidden": [4, 4]})
    with pytest.raises(TrainingError, match=r"embedding_dim=3 \(asked: 8\), hidden=\[4\] \(asked: \[4, 4\]\)"):
        check_warm_start(champion_of(EncoderConfig()), "deepfm", asked)
