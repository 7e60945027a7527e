"""Releases by KServe where no cluster is at hand: the ways of a canary, refusals, and what is left behind."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client

from evergreen.contracts.errors import ArtifactError, EvergreenError
from evergreen.release import inference_service
from evergreen.release.bundle import BundleManifest, ModelStore
from evergreen.release.canary import CanaryConfig
from evergreen.release.cluster import Cluster
from evergreen.release.deploy import promote, roll_back
from evergreen.release.inference_service import VERSION_LABEL, InferenceServer, ServiceConfig
from evergreen.release.store import ReleaseStore
from tests.kube_api import KubeApi, kube_api

AT, DAY = datetime(2026, 3, 9, tzinfo=UTC), timedelta(days=1)
REQUESTS = [{"user_id": f"u{n}", "candidates": ["a", "b"]} for n in range(100)]
PATIENT = CanaryConfig(latency_budget_ms=5_000.0, max_latency_ratio=50.0)


@pytest.fixture
def api() -> Iterator[KubeApi]:
    with kube_api() as server:
        yield server


@pytest.fixture
def models(tmp_path: Path) -> ModelStore:
    """Bundles that are whole by their manifest."""
    for version in ("m-1", "m-2", "m-3"):
        (tmp_path / "models" / version).mkdir(parents=True)
        BundleManifest(version=version, files={}).write(tmp_path / "models" / version / BundleManifest.FILE)
    return ModelStore("pvc://claim/models", tmp_path / "models")


@pytest.fixture
def server(api: KubeApi, models: ModelStore, monkeypatch: pytest.MonkeyPatch) -> InferenceServer:
    monkeypatch.setattr(inference_service, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(inference_service, "_ROUTE_SECONDS", 0.2)
    settings = client.Configuration(host=api.url)
    return InferenceServer(Cluster("evergreen", client.ApiClient(settings)), models, ServiceConfig(ready_seconds=5.0))


def users_model(api: KubeApi) -> dict[str, Any]:
    model: dict[str, Any] = api.services["evergreen"]["spec"]["predictor"]["model"]
    return model


def test_inference_service_that_is_missing_is_created_and_else_patched(api: KubeApi, server: InferenceServer) -> None:
    server.serve("m-1")
    assert api.changes == ["POST evergreen"]
    assert users_model(api) == {
        "modelFormat": {"name": "evergreen", "version": "1"},
        "runtime": "evergreen",
        "storageUri": "pvc://claim/models/m-1",
    }
    assert api.services["evergreen"]["spec"]["predictor"]["serviceAccountName"] == "evergreen-server"
    users_model(api)["resources"] = {"limits": {"cpu": "1"}}  # as the manifests have it
    server.serve("m-2")
    assert users_model(api)["storageUri"].endswith("/m-2") and users_model(api)["resources"]
    assert server.serving == api.services["evergreen"]["metadata"]["labels"][VERSION_LABEL] == "m-2"


def test_version_that_serves_is_told_again_without_a_change(api: KubeApi, server: InferenceServer) -> None:
    server.serve("m-1")
    before = api.services["evergreen"]["metadata"]["generation"]
    server.serve("m-1")
    assert api.services["evergreen"]["metadata"]["generation"] == before


@pytest.mark.parametrize(
    ("cluster", "reason"),
    [
        ({"has_canary_field": False}, "this KServe has no spec.canary"),
        ({}, "enableGatewayApi is not true"),
        ({"forbidden": {"/inferenceservice-config"}}, "cannot be read (HTTP 403"),
        ({"has_gateway": True, "forbidden": {"/gateway.networking.k8s.io/v1"}}, "there are no HTTPRoutes"),
        ({"has_gateway": True, "makes_weights": False}, "makes no weighted HTTPRoute"),
        ({"has_gateway": True, "forbidden": {"/httproutes"}}, "makes no weighted HTTPRoute"),
    ],
)
def test_cluster_that_cannot_split_gets_a_second_service_and_says_why(
    api: KubeApi, server: InferenceServer, cluster: dict[str, Any], reason: str
) -> None:
    server.serve("m-1")
    users = api.services["evergreen"]
    users["spec"]["predictor"] |= {"maxReplicas": 5, "storageContainerName": "evergreen"}
    users["metadata"]["labels"]["app.kubernetes.io/instance"] = "evergreen"
    api.__dict__.update(cluster)
    made: list[dict[str, Any]] = []
    reconcile = api.reconcile
    api.reconcile = lambda service: made.append(service) or reconcile(service)  # type: ignore[func-returns-value,method-assign]
    seen = server.try_out("m-2", REQUESTS, config=PATIENT)
    assert seen.passed and (seen.challenger, seen.champion, seen.num_requests) == ("m-2", "m-1", 100)
    assert seen.way is not None and seen.way.startswith("a second InferenceService") and reason in seen.way
    second = next(one for one in made if one["metadata"]["name"] == "evergreen-canary")
    predictor = second["spec"]["predictor"]
    assert "maxReplicas" not in predictor and predictor["minReplicas"] == 1
    assert predictor["storageContainerName"] == "evergreen" and predictor["model"]["storageUri"].endswith("/m-2")
    assert second["metadata"]["labels"] == {
        "app.kubernetes.io/part-of": "evergreen",
        "app.kubernetes.io/instance": "evergreen",
        VERSION_LABEL: "m-2",
    }
    assert second["metadata"]["annotations"] == {"serving.kserve.io/autoscalerClass": "none"}
    assert list(api.services) == ["evergreen"] and "canary" not in api.services["evergreen"]["spec"]
    assert users_model(api)["storageUri"].endswith("/m-1")


def test_cluster_that_can_split_sends_a_share_and_takes_it_back(api: KubeApi, server: InferenceServer) -> None:
    server.serve("m-1")
    api.has_gateway = True
    seen = server.try_out("m-2", REQUESTS, config=PATIENT)
    assert seen.passed and seen.challenger == "m-2"
    assert seen.way == "10 % of the users' requests by HTTPRoute, and the logged ones"
    assert api.changes == ["POST evergreen", "PATCH evergreen", "PATCH evergreen"]
    assert "canary" not in api.services["evergreen"]["spec"]


def test_nothing_that_a_canary_is_asked_is_logged_as_shown(api: KubeApi, server: InferenceServer) -> None:
    server.serve("m-1")
    server.try_out("m-2", REQUESTS, config=PATIENT)
    assert {host for host, _ in api.asked} == {"127.0.0.1", "127.0.0.2"}
    assert all(instance["shown"] is False for _, instance in api.asked)


def test_challenger_that_does_not_start_is_told_with_its_log_and_removed(api: KubeApi, server: InferenceServer) -> None:
    server.serve("m-1")
    api.never_ready = {"pvc://claim/models/m-2"}
    seen = server.try_out("m-2", REQUESTS)
    assert not seen.passed and seen.champion == "m-1"
    assert seen.error is not None
    assert "CrashLoopBackOff" in seen.error and "the weights are damaged" in seen.error
    assert "condition Ready is False: MinimumReplicasUnavailable" in seen.error
    assert list(api.services) == ["evergreen"]


def test_second_service_that_a_killed_run_left_is_replaced_and_never_outlives_a_release(
    api: KubeApi, server: InferenceServer
) -> None:
    server.serve("m-1")
    left = api.services["evergreen"] | {"metadata": {"name": "evergreen-canary"}}
    api.services["evergreen-canary"] = left
    assert server.try_out("m-2", REQUESTS, config=PATIENT).challenger == "m-2"
    api.services["evergreen-canary"] = left
    server.serve("m-2")
    assert list(api.services) == ["evergreen"]


def test_release_that_does_not_come_up_goes_back_in_the_cluster_and_in_the_history(
    api: KubeApi, server: InferenceServer, tmp_path: Path
) -> None:
    releases, package = ReleaseStore(tmp_path / "releases"), tmp_path / "package"
    package.mkdir()
    promote(releases, package, "m-1", as_of=AT, reason="the first", server=server)
    api.never_ready = {"pvc://claim/models/m-2"}
    with pytest.raises(EvergreenError, match="CrashLoopBackOff"):
        promote(releases, package, "m-2", as_of=AT + DAY, reason="better", server=server)
    assert server.serving == "m-1" and users_model(api)["storageUri"].endswith("/m-1")
    assert [one.version for one in releases.history()] == ["m-1", "m-2", "m-1"]


def test_way_back_is_a_release_of_the_bundle_before(api: KubeApi, server: InferenceServer, tmp_path: Path) -> None:
    releases, package = ReleaseStore(tmp_path / "releases"), tmp_path / "package"
    package.mkdir()
    for number, version in enumerate(("m-1", "m-2")):
        promote(releases, package, version, as_of=AT + number * DAY, reason="because", server=server)
    for _ in range(2):
        assert roll_back(releases, as_of=AT + 2 * DAY, reason="worse", server=server).version == "m-1"
    assert server.serving == "m-1" and len(releases.history()) == 3


def test_version_without_a_whole_bundle_is_refused_before_anything_changes(
    api: KubeApi, server: InferenceServer
) -> None:
    with pytest.raises(ArtifactError, match="pvc://claim/models/m-9: no whole bundle there"):
        server.serve("m-9")
    assert not api.changes


def test_what_a_role_does_not_allow_is_told_with_the_way_out(api: KubeApi, server: InferenceServer) -> None:
    api.forbidden = {"/inferenceservices/evergreen"}
    with pytest.raises(EvergreenError, match="evergreen: cannot read InferenceService evergreen: HTTP 403"):
        server.serve("m-1")


def test_server_is_asked_with_the_token_of_a_file_if_there_is_one(
    api: KubeApi, models: ModelStore, tmp_path: Path
) -> None:
    cluster = Cluster("evergreen", client.ApiClient(client.Configuration(host=api.url)))
    (tmp_path / "tokens").write_text("secret of today\n")
    asked = {
        name: InferenceServer(cluster, models, token_file=str(tmp_path / name))._client("http://m").headers
        for name in ("tokens", "none")
    }
    assert asked["tokens"]["Authorization"] == "Bearer secret" and "Authorization" not in asked["none"]
