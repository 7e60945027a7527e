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
from evergreen.models.package import ModelPackage
from evergreen.release.replay import logged_requests
from evergreen.release.store import ReleaseStore
from evergreen.serving.client import RecommenderClient
from evergreen.serving.process import served
from tests.small_world import SmallWorld

NUM_REQUESTS = 120


@dataclass(frozen=True)
class Shop:
    """A small world, two packages that were trained on it, and what the first of them was asked."""

    root: Path
    feature_store: Path
    first: ModelPackage
    second: ModelPackage
    at: datetime

    @property
    def impressions(self) -> str:
        return str(self.root / "impressions")


@pytest.fixture(scope="module")
def shop(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    root = tmp_path_factory.mktemp("shop")
    first, second = (small_world.package("logistic_regression", seed=seed) for seed in (0, 1))
    shop = Shop(root, small_world.feature_store, first, second, small_world.snapshot.as_of)
    users = pq.read_table(small_world.snapshot.files[-1], columns=["user_id"])["user_id"].unique().to_pylist()
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


def test_repeated_run_asks_nothing_that_came_after_its_moment(shop: Shop) -> None:
    moment = shop.at + timedelta(seconds=30)
    requests = logged_requests(shop.impressions, context=["device"], limit=50, before=moment)
    assert len(requests) == 30
    assert requests[-1]["event_timestamp"] == (shop.at + timedelta(seconds=29)).isoformat()


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
