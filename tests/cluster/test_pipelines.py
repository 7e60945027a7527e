"""The compiled training pipeline, step by step in pods of its image, to a model that answers in the cluster."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from evergreen.release.cluster import Cluster
from evergreen.serving.client import RecommenderClient
from pipelines.training import training_pipeline
from tests.cluster.step_pods import StepPods
from tests.e2e.cluster import delete_namespace, explain_namespace, get, kubectl, wait_until, why_not_here

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

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(why_not_here()), reason=why_not_here() or ""),
]


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


def test_training_pipeline_runs_in_pods_and_its_model_answers(models: Path, work: Path) -> None:
    evergreen = Path(sys.executable).with_name("evergreen")
    run(evergreen, "compile", "--out", work)
    size = ("--num-users=300", "--num-items=60", "--num-days=6", "--events-per-day=2000", "--click-rate=0.1")
    run(evergreen, "simulate", "log", "--out", work / "log", *size)
    (models / "bundles").mkdir(mode=0o777)
    folders = {"/models": models, "/log": work / "log"}
    steps = StepPods(work / "training.yaml", namespace=STEPS, account="pipeline-runner", folders=folders)
    (work / "root").mkdir()
    with steps.run_the_steps(work / "root"):
        outputs = training_pipeline(
            log_uri="/log",
            models=["popularity", "logistic_regression"],
            impressions="/state/impressions",
            model_store="pvc://models/bundles",
            model_store_path="/models/bundles",
            latency_budget_ms=5_000.0,
            check_leakage=False,
        ).outputs
    assert {"ingest-log", "train-model", "materialize-features", "deploy-model"} <= set(steps.ran)
    version = outputs["champion"].metadata["version"]
    service = get("inferenceservice", "evergreen", SERVING)
    assert service is not None
    assert service["metadata"]["labels"]["evergreen/model-version"] == version
    url = Cluster.connect(SERVING).address("evergreen-predictor")
    assert url is not None
    user = pq.read_table(sorted((work / "log" / "events").iterdir())[0], columns=["user_id"])["user_id"][0].as_py()
    with RecommenderClient(url) as client:
        answer = client.recommend(user, k=5)
    assert answer.model_version == version
    assert answer.known_user
    assert not answer.degraded, "Redis holds the user's features"
    assert len(answer.items) == 5
