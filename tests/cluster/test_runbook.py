"""Commands of the runbook that change a cluster, as they are printed there, on a real one."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from tests.e2e.cluster import (
    ClusterError,
    delete_namespace,
    explain_namespace,
    get,
    kubectl,
    secret,
    wait_until,
    why_not_here,
)

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(why_not_here()), reason=why_not_here() or ""),
]

ROOT = Path(__file__).parents[2]
OLD = "r-the-old-password"


def _block(containing: str) -> str:
    """The sh block of the runbook that has these words."""
    blocks = re.findall(r"^ *```sh\n(.*?)^ *```", (ROOT / "docs" / "runbook.md").read_text(), re.DOTALL | re.MULTILINE)
    (found,) = (block for block in blocks if containing in block)
    return found


def _image(part: str) -> str:
    nodes = json.loads(kubectl("get", "nodes", "-o", "json"))["items"]
    names = [name for node in nodes for image in node["status"]["images"] for name in image.get("names", [])]
    found = [name for name in names if part in name and "@" not in name]
    if not found:
        pytest.skip(f"no node has the image {part}")
    return found[0]


@pytest.fixture(scope="module")
def namespace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Redis as the manifests have it, and an InferenceService of the same name as ours, with a small server inside."""
    _image("redis:")
    server = {
        "name": "kserve-container",
        "image": _image("evergreen-server"),
        "imagePullPolicy": "IfNotPresent",
        "command": ["python", "-m", "http.server", "8080", "--directory", "/tmp"],
        "ports": [{"containerPort": 8080}],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "resources": {"requests": {"cpu": "50m", "memory": "64Mi"}, "limits": {"cpu": "500m", "memory": "128Mi"}},
    }
    service = {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            "name": "evergreen",
            "annotations": {
                "serving.kserve.io/deploymentMode": "Standard",
                "serving.kserve.io/autoscalerClass": "none",
            },
        },
        "spec": {
            "predictor": {
                "minReplicas": 1,
                "securityContext": {
                    "runAsNonRoot": True,
                    "runAsUser": 65532,
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
                "containers": [server],
            }
        },
    }
    name = f"s6-runbook-{uuid4().hex[:6]}"
    folder = tmp_path_factory.mktemp("overlay")
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": name,
        "components": [os.path.relpath(ROOT / "manifests" / "components" / "redis", folder)],
    }
    (folder / "kustomization.yaml").write_text(json.dumps(kustomization))
    kubectl("create", "namespace", name)
    try:
        kubectl("label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted")
        kubectl("-n", name, "create", "secret", "generic", "evergreen-redis", f"--from-literal=password={OLD}")
        kubectl("apply", "-k", str(folder))
        kubectl("-n", name, "apply", "-f", "-", stdin=json.dumps(service))
        wait_until(
            "KServe's Deployment",
            lambda: get("deployment", "evergreen-predictor", name),
            limit=60,
            explain=lambda: explain_namespace(name),
        )
        for target in ("statefulset/redis", "deployment/evergreen-predictor"):
            _rolled_out(target, name)
        yield name
    finally:
        delete_namespace(name)


@pytest.fixture(scope="module")
def state_namespace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The state shell beside what the steps have."""
    image = _image("evergreen-pipeline-python")
    name = f"s6-state-{uuid4().hex[:6]}"
    folder = tmp_path_factory.mktemp("state")
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": name,
        "resources": [os.path.relpath(ROOT / path, folder) for path in ("manifests/steps", "examples/state-shell")],
        "patches": [
            {
                "target": {"kind": "Pod"},
                "patch": json.dumps([{"op": "replace", "path": "/spec/containers/0/image", "value": image}]),
            }
        ],
    }
    (folder / "kustomization.yaml").write_text(json.dumps(kustomization))
    kubectl("create", "namespace", name)
    try:
        kubectl("label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted")
        kubectl("apply", "-k", str(folder))
        yield name
    finally:
        delete_namespace(name)


def _rolled_out(target: str, namespace: str) -> None:
    try:
        kubectl("-n", namespace, "rollout", "status", target, "--timeout=120s", limit=150)
    except ClusterError as error:
        raise ClusterError(f"{error}\n{explain_namespace(namespace)}") from error


def _redis_says(password: str, namespace: str) -> str:
    command = f"REDISCLI_AUTH={password} redis-cli --no-auth-warning get kept"
    return kubectl("-n", namespace, "exec", "redis-0", "--", "sh", "-c", command).strip()


def _template(namespace: str) -> dict[str, str]:
    deployment = get("deployment", "evergreen-predictor", namespace)
    assert deployment is not None
    return deployment["spec"]["template"]["metadata"].get("annotations", {})


def test_the_password_of_redis_is_rotated(namespace: str) -> None:
    kubectl("-n", namespace, "exec", "redis-0", "--", "redis-cli", "set", "kept", "1")
    before = _template(namespace)
    block = _block("ACL SETUSER").replace("in evergreen kubeflow", f"in {namespace}")
    script = block.replace("kubectl -n evergreen ", f"kubectl -n {namespace} ")
    ran = subprocess.run(["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, timeout=400)
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}\n{explain_namespace(namespace)}"
    assert _template(namespace) != before, "predictors were started anew, to read it"
    _rolled_out("statefulset/redis", namespace)
    password = secret("evergreen-redis", namespace)["password"]
    assert password != OLD
    assert password[0].isalpha()
    assert _redis_says(password, namespace) == "1", "what it held is there"
    assert "WRONGPASS" in _redis_says(OLD, namespace) or "NOAUTH" in _redis_says(OLD, namespace)


def test_kserve_takes_a_restart_of_its_deployment_back(namespace: str) -> None:
    """Why the runbook restarts predictors by an annotation of the InferenceService."""
    kubectl("-n", namespace, "rollout", "restart", "deployment/evergreen-predictor")

    def taken_back() -> bool | None:
        return True if "kubectl.kubernetes.io/restartedAt" not in _template(namespace) else None

    wait_until("KServe", taken_back, limit=60, explain=lambda: explain_namespace(namespace))


def test_replicas_are_set_by_hand(namespace: str) -> None:
    (command,) = re.findall(
        r"`(kubectl -n evergreen patch inferenceservice evergreen [^`]*minReplicas[^`]*)`",
        (ROOT / "docs" / "runbook.md").read_text(),
    )
    subprocess.run(["bash", "-c", command.replace("-n evergreen", f"-n {namespace}")], check=True, timeout=60)

    def scaled() -> bool | None:
        deployment = get("deployment", "evergreen-predictor", namespace)
        return True if deployment is not None and deployment["spec"]["replicas"] == 4 else None

    wait_until("four replicas", scaled, limit=60, explain=lambda: explain_namespace(namespace))


def test_the_state_shell_tells_the_history(state_namespace: str) -> None:
    lines = [line for line in _block("examples/state-shell").splitlines() if " exec " in line or " wait " in line]
    assert len(lines) == 3
    told = [
        subprocess.run(
            ["bash", "-c", line.replace("-n kubeflow", f"-n {state_namespace}")],
            capture_output=True,
            text=True,
            timeout=180,
        )
        for line in lines
    ]
    assert [ran.returncode for ran in told] == [0, 0, 0], f"{told}\n{explain_namespace(state_namespace)}"
    assert "nothing was decided yet" in told[1].stdout
