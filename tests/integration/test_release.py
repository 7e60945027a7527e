"""A challenger on its way to users and back, with a real server: canary, promotion without a lost request, rollback."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from evergreen.cli.release import release
from evergreen.contracts.errors import EvergreenError
from evergreen.contracts.mapping import Mapping
from evergreen.features.store import FeatureStore
from evergreen.features.tables import build_feature_tables
from evergreen.ingest.log import ingest_log
from evergreen.models.package import ModelPackage
from evergreen.release.replay import logged_requests
from evergreen.release.store import ReleaseStore
from evergreen.serving.client import RecommenderClient
from evergreen.serving.process import served
from evergreen.simulator.log import SimulatorConfig, simulate_log
from evergreen.training.dataset import build_training_set
from evergreen.training.trainer import TrainingConfig, train_model

NUM_REQUESTS = 120


@dataclass(frozen=True)
class Shop:
    """A small world, two packages that were trained on it, and what the first of them was asked."""

    root: Path
    first: ModelPackage
    second: ModelPackage
    at: datetime

    @property
    def feature_store(self) -> Path:
        return self.root / "feature_store"

    @property
    def impressions(self) -> str:
        return str(self.root / "impressions")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    root = tmp_path_factory.mktemp("shop")
    simulate_log(SimulatorConfig(num_users=60, num_items=50, num_days=8, events_per_day=600, seed=3), root / "log")
    snapshot = ingest_log(Mapping.load("simulated"), str(root / "log"), root / "snapshot")
    tables = build_feature_tables(snapshot, root / "feature_tables")
    store = FeatureStore.create(root / "feature_store", tables)
    store.materialize(snapshot.as_of)
    rows = build_training_set(snapshot, tables, store, root / "training_set")
    configs = [
        TrainingConfig(model="logistic_regression", max_epochs=1, seed=seed, export_program=False) for seed in (0, 1)
    ]
    first, second = (train_model(rows, root / f"model-{config.seed}", config=config) for config in configs)
    shop = Shop(root, first, second, snapshot.as_of)
    users = pq.read_table(snapshot.files[-1], columns=["user_id"])["user_id"].unique().to_pylist()
    options = ["--feature-store", str(shop.feature_store), "--impressions", shop.impressions]
    with served(first.path, log=root / "serve.log", options=options) as url, RecommenderClient(url) as client:
        for number in range(NUM_REQUESTS):
            at = shop.at + timedelta(seconds=number)
            client.recommend(users[number % len(users)], k=5, event_timestamp=at, context={"device": "phone"})
    return shop


@pytest.fixture(scope="module")
def releases(shop: Shop) -> ReleaseStore:
    store = ReleaseStore(shop.root / "releases")
    store.release(shop.first.path, shop.first.version, as_of=shop.at, reason="the first")
    return store


@pytest.fixture(scope="module")
def url(shop: Shop, releases: ReleaseStore) -> Iterator[str]:
    options = ["--feature-store", str(shop.feature_store), "--allow-reload"]
    with served(releases.current, log=shop.root / "serve.log", options=options) as url:
        yield url


def version(url: str, shop: Shop) -> str:
    with RecommenderClient(url) as client:
        return client.recommend("u0001", k=1, event_timestamp=shop.at).model_version


def test_logged_requests_are_asked_as_they_were(shop: Shop) -> None:
    requests = logged_requests(shop.impressions, context=["device"], limit=50)
    assert len(requests) == 50
    assert all(len(r["candidates"]) == 5 and r["context"] == {"device": "phone"} for r in requests)
    assert requests[-1]["event_timestamp"] == (shop.at + timedelta(seconds=NUM_REQUESTS - 1)).isoformat()


def test_package_that_the_server_refuses_leaves_the_champion(shop: Shop, releases: ReleaseStore, url: str) -> None:
    broken = ReleaseStore(releases.path).package(shop.second.version)
    shutil.copytree(shop.second.path, broken)  # as a copy that was damaged on its way
    weights = broken / ModelPackage.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00\x00")
    arguments = ["--releases", str(releases.path), "--url", url, "--reason", "better"]
    refused = CliRunner().invoke(release, ["promote", str(shop.second.path), *arguments])
    assert isinstance(refused.exception, EvergreenError) and "HTTP 422" in str(refused.exception)
    assert version(url, shop) == shop.first.version
    assert releases.current.resolve().name == shop.first.version
    assert [one.version for one in releases.history()] == [shop.first.version, shop.second.version, shop.first.version]
    shutil.rmtree(broken)


def test_challenger_is_promoted_after_its_canary_and_taken_back(shop: Shop, releases: ReleaseStore, url: str) -> None:
    arguments = ["--releases", str(releases.path), "--url", url]
    failures, stop = [], threading.Event()

    def hammer() -> None:
        with RecommenderClient(url) as client:
            while not stop.is_set():
                try:
                    client.recommend("u0001", k=3, event_timestamp=shop.at)
                except EvergreenError as error:
                    failures.append(error)

    thread = threading.Thread(target=hammer)
    thread.start()
    try:
        canary = ["--impressions", shop.impressions, "--feature-store", str(shop.feature_store)]
        canary += ["--latency-budget-ms", "5000"]  # other tests run beside
        promoted = CliRunner().invoke(
            release, ["promote", str(shop.second.path), *arguments, *canary, "--reason", "better"]
        )
        assert promoted.exit_code == 0, promoted.output
        assert f"canary: {NUM_REQUESTS} requests, {shop.second.version} beside {shop.first.version}" in promoted.output
        assert "FAILED" not in promoted.output
        assert version(url, shop) == shop.second.version
        back = CliRunner().invoke(release, ["rollback", *arguments, "--reason", "fewer clicks"])
        assert back.exit_code == 0, back.output
        assert version(url, shop) == shop.first.version
    finally:
        stop.set()
        thread.join()
    assert not failures
    told = CliRunner().invoke(release, ["history", "--releases", str(releases.path)]).output.splitlines()
    assert [line.split("  ", 2)[1] for line in told[-3:]] == [
        shop.first.version,
        shop.second.version,
        shop.first.version,
    ]
    assert told[-1].endswith(f"again, after {shop.second.version}: fewer clicks")
