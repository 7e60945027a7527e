"""The step that brings a champion to the users, with a stand-in for the cluster; tests/cluster has a real one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl

from components.deploy_model import deploy_model
from evergreen.contracts.loop_state import LoopState, put
from evergreen.contracts.release import CanaryReport
from evergreen.evaluation.gate import GateConfig, gate_challenger
from evergreen.features.store import FeatureStore
from evergreen.models.package import ModelPackage
from evergreen.release import inference_service
from evergreen.release.bundle import ModelStore
from tests.kube_api import KubeApi, kube_api
from tests.small_world import SmallWorld

HOUR = timedelta(hours=1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    return SmallWorld.make(tmp_path_factory.mktemp("world"))


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubeApi]:
    with kube_api() as server:
        names = {"cluster": "c", "user": "u"}
        config = {
            "clusters": [{"name": "c", "cluster": {"server": server.url}}],
            "users": [{"name": "u", "user": {"token": "t"}}],
            "contexts": [{"name": "x", "context": names}],
            "current-context": "x",
        }
        (tmp_path / "kubeconfig").write_text(json.dumps(config))
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        monkeypatch.setattr(inference_service, "_POLL_SECONDS", 0.01)
        yield server


@pytest.fixture
def state(world: SmallWorld, tmp_path: Path) -> LoopState:
    state = LoopState(tmp_path / "state")
    FeatureStore.create(state.feature_store, world.tables).materialize(world.snapshot.as_of)
    return state


@pytest.fixture
def deploy(
    world: SmallWorld, state: LoopState, api: KubeApi, tmp_path: Path
) -> Callable[[ModelPackage, datetime], str]:
    """The step as the pipeline calls it; no requests are logged yet."""
    (tmp_path / "impressions").mkdir()

    def run(package: ModelPackage, as_of: datetime) -> str:
        outcome: str = deploy_model.python_func(
            training_set=_artifact(dsl.Dataset, world.training_set.path),
            champion=_artifact(dsl.Model, package.path),
            retriever=_artifact(dsl.Model, tmp_path / "no_retriever"),
            impressions=str(tmp_path / "impressions"),
            state=str(state.path),
            as_of=as_of.isoformat(),
            canary_requests=500,
            latency_budget_ms=5_000.0,
            seed=0,
            server_token_file="/etc/evergreen/tokens/tokens",
            inference_service="evergreen",
            namespace="evergreen",
            model_store="pvc://claim/models",
            model_store_path=str(tmp_path / "models"),
        )
        return outcome

    return run


def _artifact(kind: type[dsl.Artifact], path: Path) -> Any:
    return kind(path.name, uri=str(path))


def _judge(world: SmallWorld, state: LoopState, at: datetime, challenger: ModelPackage, *, passed: bool) -> None:
    """What the gate has said of a challenger, as an earlier try of the step put it down."""
    incumbent = ModelPackage.load(state.package(state.released()[-1].version))
    config = GateConfig(latency_budget_ms=5_000.0, seed=0)
    judged = gate_challenger(world.training_set, challenger, incumbent, config=config)
    put(state.gate(at), judged.model_copy(update={"passed": passed, "reason": "as the test has it"}))


def test_first_champion_begins_the_loop_and_a_second_try_changes_nothing(
    world: SmallWorld, state: LoopState, api: KubeApi, deploy: Callable[..., str], tmp_path: Path
) -> None:
    first, as_of = world.package("logistic_regression"), world.snapshot.as_of + timedelta(microseconds=1)
    for _ in range(2):
        assert deploy(first, as_of) == f"{first.version} serves: the first model of the loop"
    [release] = state.released()
    assert release.released_at.microsecond == 0 and timedelta() < release.released_at - as_of < timedelta(seconds=1)
    assert state.reference(first.version).is_file()
    models = ModelStore("pvc://claim/models", tmp_path / "models")
    assert models.has(first.version) and Path(models.items_url).is_file()
    assert api.services["evergreen"]["spec"]["predictor"]["model"]["storageUri"] == models.storage_uri(first.version)
    assert api.services["evergreen"]["metadata"]["generation"] == 1


def test_champion_that_serves_is_not_released_again(
    world: SmallWorld, state: LoopState, deploy: Callable[..., str]
) -> None:
    first, as_of = world.package("logistic_regression"), world.snapshot.as_of
    deploy(first, as_of)
    assert deploy(first, as_of + HOUR) == f"{first.version} serves already"
    assert len(state.released()) == 1


def test_challenger_that_the_gate_refuses_reaches_nobody(
    world: SmallWorld, state: LoopState, api: KubeApi, deploy: Callable[..., str]
) -> None:
    (first, second), as_of = (world.package("logistic_regression", seed=seed) for seed in (0, 1)), world.snapshot.as_of
    deploy(first, as_of)
    _judge(world, state, as_of + HOUR, second, passed=False)
    changes = list(api.changes)
    assert deploy(second, as_of + HOUR) == f"{second.version} is refused by the gate: as the test has it"
    assert api.changes == changes and len(state.released()) == 1


def test_challenger_without_a_request_to_be_tried_with_is_taken_back(
    world: SmallWorld, state: LoopState, api: KubeApi, deploy: Callable[..., str]
) -> None:
    (first, second), as_of = (world.package("logistic_regression", seed=seed) for seed in (0, 1)), world.snapshot.as_of
    deploy(first, as_of)
    _judge(world, state, as_of + HOUR, second, passed=True)
    told = deploy(second, as_of + HOUR)
    assert told.startswith(f"{second.version} is taken back by the canary: requests is 0, at least 100 allowed")
    assert not CanaryReport.read(state.canary(as_of + HOUR)).passed
    assert list(api.services) == ["evergreen"] and len(state.released()) == 1


def test_champion_of_an_old_log_does_not_take_the_place_of_a_newer_release(
    world: SmallWorld, state: LoopState, deploy: Callable[..., str]
) -> None:
    (first, second), as_of = (world.package("logistic_regression", seed=seed) for seed in (0, 1)), world.snapshot.as_of
    deploy(first, as_of)
    assert deploy(second, as_of - HOUR).startswith(f"{second.version} is left aside: {first.version} was released at")
    assert len(state.released()) == 1
