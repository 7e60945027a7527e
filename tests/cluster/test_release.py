"""Releases on a real cluster with KServe: first one, canary, promotion, a challenger that fails, and the way back."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from kfp import dsl

from components.deploy_model import deploy_model
from components.roll_back_model import roll_back_model
from evergreen.contracts.errors import EvergreenError
from evergreen.contracts.loop_state import LoopState, put
from evergreen.contracts.release import CanaryReport
from evergreen.evaluation.gate import GateConfig, gate_challenger
from evergreen.features.store import FeatureStore
from evergreen.models.package import ModelPackage
from evergreen.release.bundle import ModelStore
from evergreen.release.canary import CanaryConfig
from evergreen.release.cluster import Cluster
from evergreen.release.deploy import promote, roll_back
from evergreen.release.inference_service import InferenceServer, ServiceConfig
from evergreen.release.store import ReleaseStore
from evergreen.serving.client import RecommenderClient
from evergreen.serving.process import served
from pipelines.kubernetes import compile_for_cluster, image_name
from pipelines.training import training_pipeline
from tests.e2e.cluster import ClusterError, explain_namespace, get, kubectl, wait_until, why_not_here
from tests.small_world import SmallWorld

NAMESPACE = "evergreen-release-test"
MODELS = "pvc://models/bundles"
NUM_REQUESTS = 120
PATIENT = CanaryConfig(latency_budget_ms=5_000.0, max_latency_ratio=50.0)  # others use the machine, too

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(why_not_here()), reason=why_not_here() or ""),
]


@dataclass(frozen=True)
class Shop:
    """A namespace that serves, two packages of a small world, and what users asked."""

    root: Path
    world: SmallWorld
    first: ModelPackage
    second: ModelPackage
    models: ModelStore
    server: InferenceServer
    releases: ReleaseStore
    requests: list[dict[str, Any]] = field(default_factory=list)

    @property
    def url(self) -> str:
        url = Cluster.connect(NAMESPACE).address("evergreen-predictor")
        assert url is not None
        return url

    def version(self) -> str:
        with RecommenderClient(self.url) as client:
            return client.recommend("u0001", k=1).model_version

    @contextmanager
    def no_lost_request(self) -> Iterator[None]:
        """Users ask without a pause; not one of them may go without an answer."""
        failures, stop, url = [], threading.Event(), self.url

        def ask() -> None:
            while not stop.is_set():
                with RecommenderClient(url) as client:  # over a connection of its own, as behind a load balancer
                    try:
                        client.recommend("u0001", k=3)
                    except EvergreenError as error:
                        failures.append(str(error))
                stop.wait(0.05)

        thread = threading.Thread(target=ask)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
        assert not failures, failures[:3]


def _claim_folder() -> Path:
    """Where the claim's volume lies on this machine."""
    claim = wait_until(
        "a volume for the claim `models`",
        lambda: (found := get("pvc", "models", NAMESPACE)) and found["spec"].get("volumeName"),
        limit=60,
        explain=lambda: explain_namespace(NAMESPACE),
    )
    volume = json.loads(kubectl("get", "pv", claim, "-o", "json"))
    path = Path(volume["spec"].get("hostPath", {}).get("path", "/nowhere"))
    if not path.is_dir():
        pytest.skip(f"the volume {claim} cannot be written from here: no hostPath on this machine")
    return path


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """The namespace, with what serves in it and no model yet; the folder of its claim."""
    kubectl(
        "apply",
        "-f",
        "-",
        stdin=kubectl("kustomize", str(Path(__file__).parent / "release")).replace(
            "evergreen-server:0.1.0", "evergreen-server:try"
        ),
    )
    secret = ("create", "secret", "generic", "evergreen-redis", "--from-literal=password=unused")
    kubectl("-n", NAMESPACE, "apply", "-f", "-", stdin=kubectl("-n", NAMESPACE, *secret, "--dry-run=client", "-oyaml"))
    volume = ""
    try:
        path = _claim_folder()
        volume = get("pvc", "models", NAMESPACE)["spec"]["volumeName"]  # type: ignore[index]
        shutil.rmtree(path / "bundles", ignore_errors=True)
        yield path / "bundles"
        shutil.rmtree(path / "bundles", ignore_errors=True)
    finally:
        kubectl("delete", "namespace", NAMESPACE, "--wait=true", limit=300)
        if volume:  # it is kept by its policy, and free only for the claim that is gone
            kubectl("patch", "pv", volume, "--type=json", '-p=[{"op": "remove", "path": "/spec/claimRef"}]')


@pytest.fixture(scope="module", autouse=True)
def steps_account(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the steps' account may do is enough: whatever connects to the cluster from here does so as that account."""
    config = json.loads(kubectl("config", "view", "--raw", "--minify", "--flatten", "-o", "json"))
    [user] = config["users"]
    user["user"] = {"token": kubectl("-n", NAMESPACE, "create", "token", "steps", "--duration=2h").strip()}
    file = tmp_path_factory.mktemp("steps") / "kubeconfig"
    file.write_text(json.dumps(config))
    with pytest.MonkeyPatch.context() as patch:
        connect = Cluster.connect.__func__  # type: ignore[attr-defined]

        def as_steps(cls: type[Cluster], namespace: str) -> Cluster:
            with pytest.MonkeyPatch.context() as environment:
                environment.setenv("KUBECONFIG", str(file))
                cluster: Cluster = connect(cls, namespace)
            return cluster

        patch.setattr(Cluster, "connect", classmethod(as_steps))
        yield


@pytest.fixture(scope="module")
def shop(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    root = tmp_path_factory.mktemp("shop")
    world = SmallWorld.make(root / "world")
    first, second = (world.package("logistic_regression", seed=seed) for seed in (0, 1))
    models = ModelStore(MODELS, folder)
    for package in (first, second):
        models.write(package.version, package=package.path, feature_store=world.feature_store)
    config = ServiceConfig(ready_seconds=240.0)
    server = InferenceServer(Cluster.connect(NAMESPACE), models, config)
    rows = pq.read_table(world.snapshot.files[-1], columns=["user_id", "item_id"]).slice(0, NUM_REQUESTS).to_pylist()
    requests = [{"user_id": row["user_id"], "candidates": [row["item_id"]]} for row in rows]
    return Shop(root, world, first, second, models, server, ReleaseStore(root / "releases"), requests)


def generation() -> tuple[int, list[str]]:
    """What changes when anything is changed: of the InferenceService, and its pods."""
    service = get("inferenceservice", "evergreen", NAMESPACE)
    assert service is not None
    pods = kubectl("-n", NAMESPACE, "get", "pods", "-o", "name").split()
    return service["metadata"]["generation"], sorted(pods)


def only_service() -> bool:
    return kubectl("-n", NAMESPACE, "get", "inferenceservices", "-o", "name").split() == [
        "inferenceservice.serving.kserve.io/evergreen"
    ]


def test_first_release_serves_and_its_repetition_changes_nothing(shop: Shop) -> None:
    at = shop.world.snapshot.as_of
    release = {"as_of": at, "reason": "the first", "server": shop.server}
    promote(shop.releases, shop.first.path, shop.first.version, **release)
    assert shop.version() == shop.server.serving == shop.first.version
    before = generation()
    promote(shop.releases, shop.first.path, shop.first.version, **release)
    assert generation() == before
    assert [one.version for one in shop.releases.history()] == [shop.first.version]


def test_canary_answers_beside_the_champion_and_is_gone_after(shop: Shop) -> None:
    with shop.no_lost_request():
        seen = shop.server.try_out(shop.second.version, shop.requests, config=PATIENT)
    assert seen.passed, seen.failures
    assert (seen.challenger, seen.champion, seen.num_requests) == (
        shop.second.version,
        shop.first.version,
        NUM_REQUESTS,
    )
    assert seen.way is not None and seen.way.startswith("a second InferenceService")
    assert only_service()
    assert shop.version() == shop.first.version


def test_challenger_that_does_not_start_is_taken_back_while_the_champion_answers(shop: Shop, folder: Path) -> None:
    broken = _broken(shop, folder, "broken-0123456789ab")
    with shop.no_lost_request():
        seen = shop.server.try_out(broken, shop.requests, config=PATIENT)
    assert not seen.passed
    assert seen.error is not None and "CrashLoopBackOff" in seen.error and "log of evergreen-canary" in seen.error
    assert only_service()
    assert shop.version() == shop.first.version


def test_promotion_loses_no_request_and_the_way_back_does_not_either(shop: Shop) -> None:
    at = shop.world.snapshot.as_of + timedelta(hours=1)
    with shop.no_lost_request():
        promote(shop.releases, shop.second.path, shop.second.version, as_of=at, reason="better", server=shop.server)
        assert shop.version() == shop.second.version
        back = {"as_of": at + timedelta(hours=1), "reason": "fewer clicks", "server": shop.server}
        assert roll_back(shop.releases, **back).version == shop.first.version
        assert shop.version() == shop.server.serving == shop.first.version
    before = generation()
    roll_back(shop.releases, **back)
    assert generation() == before


def test_release_that_does_not_come_up_leaves_the_champion(shop: Shop, folder: Path) -> None:
    broken = _broken(shop, folder, "broken-ba9876543210")
    at = shop.world.snapshot.as_of + timedelta(hours=3)
    with shop.no_lost_request(), pytest.raises(EvergreenError, match="CrashLoopBackOff"):
        promote(shop.releases, shop.second.path, broken, as_of=at, reason="in a hurry", server=shop.server)
    assert shop.version() == shop.server.serving == shop.first.version
    assert shop.releases.history()[-1].version == shop.first.version


def test_account_of_the_steps_may_do_nothing_else(shop: Shop) -> None:
    account = f"--as=system:serviceaccount:{NAMESPACE}:steps"
    for question in (
        ("get", "secrets"),
        ("create", "pods"),
        ("patch", "deployments.apps"),
        ("create", "pods", "--subresource=exec"),
        ("patch", "servingruntimes.serving.kserve.io"),
    ):
        with pytest.raises(ClusterError):  # kubectl says no by its exit status
            kubectl("-n", NAMESPACE, "auth", "can-i", *question, account)


def test_steps_deploy_release_and_go_back(shop: Shop, folder: Path, tmp_path: Path) -> None:
    state = LoopState(tmp_path / "state")
    FeatureStore.create(state.feature_store, shop.world.tables).materialize(shop.world.snapshot.as_of)
    at = shop.world.snapshot.as_of
    cluster = {
        "inference_service": "evergreen",
        "namespace": NAMESPACE,
        "model_store": MODELS,
        "model_store_path": str(folder),
        "server_token_file": "",
        "state": str(state.path),
    }
    rows = _artifact(dsl.Dataset, shop.world.training_set.path)
    nothing = _artifact(dsl.Model, tmp_path / "no_retriever")
    ask = {"impressions": str(tmp_path / "impressions"), "canary_requests": NUM_REQUESTS, "latency_budget_ms": 5_000.0}
    deploy = {"training_set": rows, "retriever": nothing, "as_of": at.isoformat(), "seed": 0, **ask, **cluster}
    deploy["champion"] = _artifact(dsl.Model, shop.first.path)
    for _ in range(2):  # as when it is tried again
        told = deploy_model.python_func(**deploy)
        assert told == f"{shop.first.version} serves: the first model of the loop"
    assert (folder / "items.parquet").is_file() and (folder / "feature_store" / "feature_store.yaml").is_file()
    assert len(state.released()) == 1
    assert shop.version() == shop.first.version

    evening = at + timedelta(hours=4)
    _ask_and_log(shop, evening, ask["impressions"], tmp_path / "serve.log")
    judged = gate_challenger(
        shop.world.training_set, shop.second, shop.first, config=GateConfig(latency_budget_ms=5_000.0, seed=0)
    )
    # Of two seeds none is better by more than chance; that the gate has passed one is what this is about.
    put(state.gate(evening), judged.model_copy(update={"passed": True}))
    deploy |= {"champion": _artifact(dsl.Model, shop.second.path), "as_of": evening.isoformat()}
    for _ in range(2):
        assert deploy_model.python_func(**deploy) == f"{shop.second.version} serves: trained on schedule"
    seen = CanaryReport.read(state.canary(evening))
    assert seen.num_requests == NUM_REQUESTS and "second InferenceService" in (seen.way or "")
    assert shop.version() == shop.second.version

    back = {"reason": "a person wants it", "as_of": (evening + timedelta(hours=1)).isoformat(), "server_url": ""}
    for _ in range(2):
        assert roll_back_model.python_func(**back, **cluster) == shop.first.version
    assert shop.version() == shop.first.version
    assert [one.version for one in state.released()] == [
        shop.first.version,
        shop.second.version,
        shop.first.version,
    ]
    assert only_service()


def test_compiled_step_releases_from_its_own_image_and_account(shop: Shop, folder: Path, tmp_path: Path) -> None:
    """As Kubeflow Pipelines starts it: the compiled command in a pod, with all that `restricted` asks for and more."""
    volume = folder.parent
    state, champion = LoopState(volume / "state"), volume / "champion"
    FeatureStore.create(state.feature_store, shop.world.tables).materialize(shop.world.snapshot.as_of)
    shutil.copytree(shop.second.path, champion)
    shutil.copytree(shop.world.training_set.path, volume / "training_set")
    for path in (volume / "state", folder):
        _open_to_all(path)
    inputs = {
        "training_set": ("system.Dataset", "/models/training_set"),
        "champion": ("system.Model", "/models/champion"),
        "retriever": ("system.Model", "/models/no_retriever"),
    }
    parameters = {
        "impressions": "/models/impressions",
        "state": "/models/state",
        "as_of": shop.world.snapshot.as_of.isoformat(),
        "canary_requests": NUM_REQUESTS,
        "latency_budget_ms": 5_000.0,
        "seed": 0,
        "server_token_file": "",
        "inference_service": "evergreen",
        "namespace": NAMESPACE,
        "model_store": MODELS,
        "model_store_path": "/models/bundles",
    }
    pod = _step_pod("deploy-model", inputs, parameters, tmp_path)
    try:
        kubectl("apply", "-f", "-", stdin=json.dumps(pod))
        phase = wait_until(
            "the step to end",
            lambda: _ended("step"),
            limit=400,
            explain=lambda: explain_namespace(NAMESPACE),
        )
        log = kubectl("-n", NAMESPACE, "logs", "step")
        assert phase == "Succeeded", log
        assert f"{shop.second.version} serves: the first model of the loop" in log
        assert shop.version() == shop.second.version
    finally:
        for name in ("state", "champion", "training_set"):
            shutil.rmtree(volume / name)


def _artifact(kind: type[dsl.Artifact], path: Path) -> Any:
    return kind(path.name, uri=str(path))


def _broken(shop: Shop, folder: Path, version: str) -> str:
    """A bundle whose weights were damaged on their way."""
    shop.models.write(version, package=shop.second.path, feature_store=shop.world.feature_store)
    weights = folder / version / "model" / ModelPackage.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00\x00")
    return version


def _ask_and_log(shop: Shop, until: datetime, impressions: str, log: Path) -> None:
    """Users ask the first package, and what they are shown is logged."""
    options = ["--feature-store", str(shop.world.feature_store), "--impressions", impressions]
    with served(shop.first.path, log=log, options=options) as url, RecommenderClient(url) as client:
        for number, request in enumerate(shop.requests):
            at = until - timedelta(seconds=NUM_REQUESTS - number)
            client.recommend(request["user_id"], k=5, event_timestamp=at, context={"device": "phone"})


def _ended(pod: str) -> str | None:
    """Succeeded or Failed; None: it runs, or is yet to."""
    phase: str = (get("pod", pod, NAMESPACE) or {"status": {"phase": "Pending"}})["status"]["phase"]
    return phase if phase in ("Succeeded", "Failed") else None


def _open_to_all(path: Path) -> None:
    """Let any user write a folder of the volume, as a file system that a driver mounts for a pod's group does."""
    for one in (path, *path.rglob("*")):
        one.chmod(0o777 if one.is_dir() else 0o666)


def _step_pod(
    step: str, inputs: dict[str, tuple[str, str]], parameters: dict[str, Any], scratch: Path
) -> dict[str, Any]:
    """A step of the compiled training pipeline as a pod, on a file system for reading only."""
    images = Path(__file__).parents[2] / "manifests" / "images" / "kustomization.yaml"
    compile_for_cluster(training_pipeline, scratch / "training.yaml", image=image_name(images))
    spec = next(yaml.safe_load_all((scratch / "training.yaml").read_text()))
    container = spec["deploymentSpec"]["executors"][f"exec-{step}"]["container"]
    artifacts = {
        name: {"artifacts": [{"name": name, "type": {"schemaTitle": kind}, "uri": uri, "metadata": {}}]}
        for name, (kind, uri) in inputs.items()
    }
    executor = {
        "inputs": {"parameterValues": parameters, "artifacts": artifacts},
        "outputs": {
            "outputFile": "/tmp/outputs/metadata.json",
            "parameters": {"Output": {"outputFile": "/tmp/outputs/Output"}},
        },
    }
    asked = container["resources"]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": "step",
            "namespace": NAMESPACE,
            "labels": {"app.kubernetes.io/name": "evergreen-step", "evergreen/caller": "true"},
        },
        "spec": {
            "restartPolicy": "Never",
            "serviceAccountName": "steps",
            "automountServiceAccountToken": True,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 65532,
                "runAsGroup": 65532,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": "main",
                    "image": container["image"],
                    "imagePullPolicy": "IfNotPresent",
                    "command": container["command"],
                    "args": [argument.replace("{{$}}", json.dumps(executor)) for argument in container["args"]],
                    "resources": {
                        "requests": {"cpu": asked["resourceCpuRequest"], "memory": asked["resourceMemoryRequest"]},
                        "limits": {"cpu": asked["resourceCpuLimit"], "memory": asked["resourceMemoryLimit"]},
                    },
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "readOnlyRootFilesystem": True,
                        "capabilities": {"drop": ["ALL"]},
                    },
                    "volumeMounts": [
                        {"name": "models", "mountPath": "/models"},
                        {"name": "tmp", "mountPath": "/tmp"},
                    ],
                }
            ],
            "volumes": [
                {"name": "models", "persistentVolumeClaim": {"claimName": "models"}},
                {"name": "tmp", "emptyDir": {}},
            ],
        },
    }
