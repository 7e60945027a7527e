"""The helpers of the end-to-end test, on a real cluster: they reach, wait, and explain what went wrong."""

import json
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import httpx
import pytest
from urllib3.exceptions import HTTPError

from pipelines.kubernetes import compile_for_cluster
from pipelines.rollback import rollback_pipeline
from tests.e2e import pipelines
from tests.e2e.cluster import (
    ClusterError,
    delete_namespace,
    explain_namespace,
    get,
    kubectl,
    port_forward,
    secret,
    wait_until,
    why_not_here,
)

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(why_not_here()), reason=why_not_here() or ""),
]


ROOT = Path(__file__).parents[2]


def _pod(name: str, program: str, image: str) -> dict:
    """A pod that `restricted` accepts, of an image that the node has anyway."""
    container = {
        "name": "main",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python", "-c", program],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "resources": {"limits": {"cpu": "500m", "memory": "128Mi"}},
    }
    security = {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {"restartPolicy": "Never", "securityContext": security, "containers": [container]},
    }


@pytest.fixture(scope="module")
def image() -> str:
    """An image with Python: the server's, if a node has it."""
    nodes = json.loads(kubectl("get", "nodes", "-o", "json"))["items"]
    names = [name for node in nodes for image in node["status"]["images"] for name in image.get("names", [])]
    found = [name for name in names if "evergreen-server" in name and "@" not in name]
    if not found:
        pytest.skip("no node has the server's image")
    return found[0]


@pytest.fixture(scope="module")
def namespace() -> Iterator[str]:
    name = f"s6-e2e-{uuid4().hex[:6]}"
    kubectl("create", "namespace", name)
    kubectl("label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted")
    yield name
    delete_namespace(name)


@pytest.fixture
def pipelines_api(namespace: str, image: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As much of Kubeflow Pipelines' API as submitting and waiting needs, as a Service of its name in our namespace."""
    program = (ROOT / "tests" / "kfp_server.py").read_text()
    _apply(_pod("ml-pipeline", program, image), namespace)
    kubectl("-n", namespace, "expose", "pod", "ml-pipeline", "--port=8888")
    kubectl("-n", namespace, "wait", "--for=condition=Ready", "pod/ml-pipeline", "--timeout=60s")
    monkeypatch.setattr(pipelines, "STEPS", namespace)
    monkeypatch.setattr(pipelines, "_LOOK_SECONDS", 0.5)
    yield
    kubectl("-n", namespace, "delete", "pod,service", "ml-pipeline")


def _apply(manifest: dict, namespace: str) -> None:
    kubectl("-n", namespace, "apply", "-f", "-", stdin=json.dumps(manifest))


def test_a_wait_in_vain_tells_pods_events_and_logs(namespace: str, image: str) -> None:
    _apply(_pod("fails", "raise SystemExit('the reason why')", image), namespace)

    def ready() -> bool | None:
        pod = get("pod", "fails", namespace)
        assert pod is not None
        return True if pod["status"].get("phase") == "Succeeded" else None

    with pytest.raises(ClusterError) as caught:
        wait_until("pod fails", ready, limit=15, explain=lambda: explain_namespace(namespace))
    told = str(caught.value)
    assert told.startswith("waited 15 s for pod fails, in vain")
    assert "the reason why" in told, "the log of what failed"
    assert "Scheduled" in told, "events"
    assert "fails   0/1" in told, "pods"


def test_a_pod_that_cannot_start_is_explained_by_its_events(namespace: str) -> None:
    _apply(_pod("no-image", "", "example.invalid/nothing:1"), namespace)

    def told() -> str | None:
        text = explain_namespace(namespace, "app=no-image")
        return text if "ErrImage" in text or "ImagePullBackOff" in text else None

    text = wait_until("the event of the image", told, limit=60, explain=lambda: explain_namespace(namespace))
    assert "example.invalid/nothing:1" in text


def test_a_service_is_asked_through_a_forwarded_port(namespace: str, image: str) -> None:
    _apply(_pod("web", "import http.server as h; h.test(h.SimpleHTTPRequestHandler, port=8080)", image), namespace)
    kubectl("-n", namespace, "expose", "pod", "web", "--port=80", "--target-port=8080")
    kubectl("-n", namespace, "wait", "--for=condition=Ready", "pod/web", "--timeout=60s")

    def answer(url: str) -> int | None:
        try:
            return httpx.get(url, trust_env=False).status_code
        except httpx.TransportError:
            return None

    with port_forward(namespace, "svc/web", 80) as url:
        status = wait_until(url, lambda: answer(url), limit=30, explain=lambda: explain_namespace(namespace))
        assert status == 200
    assert answer(url) is None, "the port is closed again"


def test_a_port_of_nothing_says_so(namespace: str) -> None:
    with pytest.raises(ClusterError, match=r'services "nobody" not found'), port_forward(namespace, "svc/nobody", 80):
        pass


def test_a_secret_is_read(namespace: str) -> None:
    kubectl("-n", namespace, "create", "secret", "generic", "keys", "--from-literal=one=1 and more")
    assert secret("keys", namespace) == {"one": "1 and more"}
    with pytest.raises(ClusterError, match="not found"):
        secret("nothing", namespace)


def test_what_is_not_there_is_none(namespace: str) -> None:
    assert get("configmap", "nothing", namespace) is None


def test_a_run_is_submitted_and_waited_for(pipelines_api: None, tmp_path: Path) -> None:
    compiled = tmp_path / "rollback.yaml"
    compile_for_cluster(rollback_pipeline, compiled, image="evergreen-pipeline-python:0.1.0")

    def listening() -> str | None:
        try:
            return pipelines.submit(compiled, "the way back", "evergreen-e2e", {"reason": "to see it"})
        except (HTTPError, ClusterError):
            return None

    run_id = wait_until("the API", listening, limit=30, explain=lambda: explain_namespace(pipelines.STEPS))
    run = pipelines.wait_for(run_id, "the way back", limit=60)
    assert run.state == "SUCCEEDED"
    assert run.runtime_config.parameters == {"reason": "to see it"}
    with pipelines.client() as api:
        cancelled = pipelines.submit(compiled, "again", "evergreen-e2e", {"reason": "to end it"})
        api.terminate_run(cancelled)
    with pytest.raises(ClusterError, match=r"run again .*: CANCELED"):
        pipelines.wait_for(cancelled, "again", limit=60)
