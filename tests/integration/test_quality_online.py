"""What is measured offline holds in front of people, whose true preferences the simulator knows."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import spearmanr

from evergreen.metrics.binary import normalized_entropy
from evergreen.models.package import ModelPackage
from evergreen.serving.recommender import Recommender
from evergreen.serving.schema import RankingRequest
from evergreen.simulator.asking import Ask, Served
from evergreen.simulator.config import SimulatorConfig
from evergreen.simulator.days import live_day
from evergreen.simulator.visits import VisitPlan, Visits
from tests.small_world import SmallWorld

CONFIG = SimulatorConfig(num_users=150, num_items=100, num_days=10, events_per_day=2_000, seed=3, click_rate=0.1)
MODELS = ("popularity", "logistic_regression", "factorization_machine", "dlrm")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    return SmallWorld.make(tmp_path_factory.mktemp("world"), CONFIG)


def clicks_expected_online(world: SmallWorld, package: ModelPackage) -> float:
    """Expected clicks a page on the day after the log, where every page shows what the model ranks first."""
    recommender = Recommender.load(package.path, world.feature_store, deadline_seconds=20)
    plan = VisitPlan(log=CONFIG, requests_per_day=400, k=6, explore=0.0)
    with asyncio.Runner() as runner:

        def recommend(asks: Sequence[Ask], /) -> list[Served]:
            answers = runner.run(recommender.answer([RankingRequest.model_validate(ask.instance()) for ask in asks]))
            return [Served(a.request_id, tuple(a.item_ids or ()), a.model_version, a.degraded) for a in answers]

        day = live_day(Visits(plan, num_days=1), 0, recommend)
        runner.run(recommender.close())
    return float(np.nanmean(day.outcomes.expected_clicks))


def test_better_offline_is_more_clicks_online(world: SmallWorld) -> None:
    rows = world.training_set.read("test")
    packages = [world.package(model) for model in MODELS]
    offline = [normalized_entropy(rows["label"], package.predict(rows)) for package in packages]
    online = [clicks_expected_online(world, package) for package in packages]
    assert spearmanr(offline, online).statistic <= -0.8, "in the same order, but for a pair of neighbours"
    assert online[int(np.argmin(offline))] > 1.1 * online[int(np.argmax(offline))]


def pairs(table: pa.Table) -> list[tuple[str, str]]:
    return list(zip(table["request_id"].to_pylist(), table["item_id"].to_pylist(), strict=True))


@pytest.mark.parametrize("group", ["user_country", "user_segment"])
def test_every_group_of_people_gains_from_the_model(world: SmallWorld, group: str) -> None:
    """Against the true click probabilities, or the luck of fifty clicks would decide."""
    rows = world.training_set.read("test")
    truth = pa.concat_tables(pq.read_table(file, partitioning=None) for file in (world.log / "truth").iterdir())
    known = dict(zip(pairs(truth), truth["click_probability"].to_pylist(), strict=True))
    true = np.array([known[pair] for pair in pairs(rows)])
    package = world.package("factorization_machine")
    positions = rows["position"].to_numpy().astype(np.int32)
    predicted = package.predict_encoded(package.encoder.transform(rows), positions)
    base = np.full(len(true), world.training_set.manifest.splits["train"].label_mean)

    def loss(p: np.ndarray) -> np.ndarray:
        return -(true * np.log(p) + (1 - true) * np.log1p(-p))

    of = np.array([str(value) for value in rows[group].to_pylist()])
    groups = [of == name for name in np.unique(of)]
    assert len(groups) > 5
    for mine in groups:
        assert loss(predicted)[mine].mean() < loss(base)[mine].mean(), of[mine][0]
