"""An Evergreen on a cluster that has KServe and no Kubeflow Pipelines, as its script deploys it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.cluster import delete_namespace, explain_namespace, get, kubectl, wait_until

ROOT = Path(__file__).resolve().parents[2]
SERVING, STEPS = "evergreen", "kubeflow"
CLAIM = {
    "apiVersion": "v1",
    "kind": "PersistentVolumeClaim",
    "metadata": {"name": "models", "namespace": SERVING},
    "spec": {
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": "",
        "resources": {"requests": {"storage": "1Gi"}},
    },
}


def run(*command: str | Path) -> str:
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def volume_folder(claim: str, namespace: str) -> Path:
    """Where the volume of a claim lies on this machine."""
    name = wait_until(
        f"a volume for {claim}",
        lambda: (found := get("pvc", claim, namespace)) and found["spec"].get("volumeName"),
        limit=60,
        explain=lambda: explain_namespace(namespace),
    )
    folder = Path(json.loads(kubectl("get", "pv", name, "-o", "json"))["spec"].get("hostPath", {}).get("path", "-"))
    if not folder.is_dir():
        pytest.skip(f"the volume {name} is no folder of this machine")
    return folder


@pytest.fixture(scope="module")
def models() -> Iterator[Path]:
    """The overlay kind, deployed by its script; the folder of a claim for bundles, since there is no object store."""
    if get("namespace", SERVING, "default") is not None or get("namespace", STEPS, "default") is not None:
        pytest.skip(f"{SERVING} or {STEPS} is in use on this cluster")
    kubectl("create", "namespace", STEPS)
    try:
        kubectl("-n", STEPS, "create", "serviceaccount", "pipeline-runner")
        run("manifests/kind/cluster", "deploy")
        kubectl("apply", "-f", "-", stdin=json.dumps(CLAIM))
        folder = volume_folder("models", SERVING)
        state = volume_folder("evergreen-state", STEPS)
        yield folder
        for path in (folder / "bundles", *state.iterdir()):
            shutil.rmtree(path, ignore_errors=True)
    finally:
        for namespace in (SERVING, STEPS):
            delete_namespace(namespace)
        kubectl("delete", "clusterstoragecontainer", "evergreen", "--ignore-not-found")


@pytest.fixture
def work() -> Iterator[Path]:
    """A folder that the steps' user may write to; not in /tmp, where a step has a volume of its own."""
    before = os.umask(0)
    folder = Path(tempfile.mkdtemp(prefix="evergreen-", dir="/var/tmp"))
    folder.chmod(0o777)
    yield folder
    os.umask(before)
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def evergreen() -> Path:
    """The command."""
    return Path(sys.executable).with_name("evergreen")
