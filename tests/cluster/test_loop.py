"""The end-to-end test of tests/e2e without Kubeflow Pipelines: its graph is walked here, its steps are pods.

Logs, impressions and catalogue go to an object store, moto's server on this machine; bundles to a claim, since the
storage initializer that would fetch them is not at hand everywhere.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pipelines.monitoring import monitoring_pipeline
from pipelines.training import training_pipeline
from tests.cluster.conftest import SERVING, STEPS
from tests.cluster.step_pods import StepPods
from tests.e2e import test_cluster
from tests.e2e.cluster import explain_namespace, get, kubectl, wait_until, why_not_here

BUCKET = "mlpipeline"
PIPELINES = {"training": training_pipeline, "monitoring": monitoring_pipeline}
MOTO = os.environ.get("MOTO_SERVER") or shutil.which("moto_server")

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(why_not_here()), reason=why_not_here() or ""),
    pytest.mark.skipif(MOTO is None, reason="no moto_server on PATH or in MOTO_SERVER (pip install 'moto[server,s3]')"),
]


def _address_for_pods() -> str:
    """The address of this machine on the way to the node, which pods reach, too."""
    node = json.loads(kubectl("get", "nodes", "-o", "json"))["items"][0]
    address = next(one["address"] for one in node["status"]["addresses"] if one["type"] == "InternalIP")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        asked.connect((address, 9))
        return str(asked.getsockname()[0])


@dataclass
class ObjectStore:
    """An S3 that runs here."""

    url: str

    @property
    def files(self) -> Any:
        return fsspec.filesystem("s3", key="evergreen", secret="evergreen-secret", endpoint_url=self.url)


@pytest.fixture(scope="module")
def object_store() -> Iterator[ObjectStore]:
    assert MOTO is not None
    address = _address_for_pods()
    with socket.socket() as free:
        free.bind((address, 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [MOTO, "-H", address, "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    )
    try:
        store = ObjectStore(f"http://{address}:{port}")

        def listens() -> bool | None:
            with socket.socket() as tried:
                return tried.connect_ex((address, port)) == 0 or None

        wait_until("moto_server to listen", listens, limit=60, explain=lambda: f"exit code {process.poll()}")
        store.files.mkdir(BUCKET)
        yield store
    finally:
        process.kill()
        process.wait()


class LoopInPods(test_cluster.Loop):
    """The end-to-end test's loop; what it asks of Kubeflow Pipelines and its object store is done in other ways."""

    root: Path
    bundles: Path
    store: ObjectStore

    def upload(self, source: Path, target: str) -> None:
        for file in sorted(path for path in source.rglob("*") if path.is_file()):
            self.store.files.put_file(str(file), f"{self.prefix}/{target}/{file.relative_to(source)}")

    def run(self, pipeline: str, name: str, *, limit: float, **arguments: Any) -> None:
        compiled = self.folder / "compiled" / f"{pipeline}.yaml"
        steps = StepPods(compiled, namespace=STEPS, account="pipeline-runner", folders={"/bundles": self.bundles})
        root = self.root / name.replace(" ", "-")
        root.mkdir()
        with steps.run_the_steps(root):
            PIPELINES[pipeline](
                **{
                    **self.parameters,
                    **arguments,
                    "model_store": "pvc://models/bundles",
                    "model_store_path": "/bundles",
                }
            )
        test_cluster._say(f"run {name} has ended: {', '.join(steps.ran)}")


@pytest.fixture
def loop(models: Path, object_store: ObjectStore) -> Iterator[LoopInPods]:
    keys = {"AWS_ACCESS_KEY_ID": "evergreen", "AWS_SECRET_ACCESS_KEY": "evergreen-secret"}
    places = {"AWS_ENDPOINT_URL": object_store.url, "IMPRESSIONS_URL": test_cluster.IMPRESSIONS}
    for namespace in (SERVING, STEPS):
        secret = {
            "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "evergreen-s3", "namespace": namespace},
            "stringData": keys,
        }  # fmt: skip
        kubectl("apply", "-f", "-", stdin=json.dumps(secret))
        patch = json.dumps({"data": places})
        kubectl("-n", namespace, "patch", "configmap", "evergreen-stores", "--type=merge", "-p", patch)
    before = os.umask(0)
    folder = Path(tempfile.mkdtemp(prefix="evergreen-", dir="/var/tmp"))
    folder.chmod(0o777)
    made = LoopInPods(folder)
    made.store, made.root, made.bundles = object_store, folder / "runs", models / "bundles"
    for path in (made.root, made.bundles):
        path.mkdir(mode=0o777, exist_ok=True)
    try:
        yield made
    finally:
        os.umask(before)
        if os.environ.get("E2E_KEEP") != "1":
            shutil.rmtree(folder)


def test_the_loop_closes_in_pods(loop: LoopInPods) -> None:
    test_cluster.test_the_loop_closes(loop)
    history = loop.store.files.ls(f"{test_cluster.BUCKET}/impressions")
    assert history, "the server logged to the object store"
    assert get("inferenceservice", "evergreen-canary", SERVING) is None, explain_namespace(SERVING)
