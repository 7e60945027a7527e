"""Training on two nodes by Kubeflow Trainer: the training step makes the TrainJob, and gets its package back."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pipelines.kubernetes import DATA_CLAIM
from pipelines.training import training_pipeline
from tests.cluster.conftest import CLAIM, ROOT, STEPS, run, volume_folder
from tests.cluster.step_pods import StepPods
from tests.e2e.cluster import get, kubectl, why_not_here

_TRAIN_JOBS = "trainjobs.trainer.kubeflow.org"


def _why_not_here() -> str:
    if why := why_not_here():
        return why
    if get("customresourcedefinition", _TRAIN_JOBS, "default") is None:
        return "there is no Kubeflow Trainer on this cluster"
    return ""


pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(_why_not_here()), reason=_why_not_here()),
]

ANY_NODE = """
- {op: remove, path: /spec/template/spec/replicatedJobs/0/template/spec/template/spec/nodeSelector}
- {op: remove, path: /spec/template/spec/replicatedJobs/0/template/spec/template/spec/tolerations}
- op: replace
  path: /spec/template/spec/replicatedJobs/0/template/spec/template/spec/containers/0/resources
  value: {requests: {cpu: 100m, memory: 512Mi}, limits: {cpu: "2", memory: 4Gi}}
"""


@pytest.fixture
def data(models: Path, tmp_path: Path) -> Iterator[Path]:
    """The component beside the overlay, for nodes without GPUs; the folder of the claim that nodes and steps share."""
    kustomization = {
        "namespace": STEPS,
        "components": [
            os.path.relpath(ROOT / "manifests" / part, tmp_path)
            for part in ("components/distributed-training", "images")
        ],
        "patches": [{"target": {"kind": "TrainingRuntime"}, "patch": ANY_NODE}],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    claim = CLAIM | {"metadata": {"name": DATA_CLAIM, "namespace": STEPS}}
    kubectl("apply", "-f", "-", stdin=json.dumps(claim))
    kubectl("apply", "-k", str(tmp_path))
    folder = volume_folder(DATA_CLAIM, STEPS)
    folder.chmod(0o777)
    yield folder


def test_training_step_hands_its_work_to_two_nodes(
    data: Path, work: Path, evergreen: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(evergreen, "compile", "--out", work, "--trainer-nodes", "2")
    size = ("--num-users=300", "--num-items=60", "--num-days=6", "--events-per-day=2000", "--click-rate=0.1")
    run(evergreen, "simulate", "log", "--out", work / "log", *size)
    steps = StepPods(work / "training.yaml", namespace=STEPS, account="pipeline-runner", folders={"/log": work / "log"})
    (work / "root").mkdir()
    with steps.run_the_steps(work / "root"):
        outputs = training_pipeline(
            log_uri="/log",
            models=["deepfm"],
            latency_budget_ms=5_000.0,
            check_leakage=False,
            inference_service="",
        ).outputs
    assert outputs["champion"].metadata["model"] == "deepfm"
    log = capsys.readouterr().out
    assert "TrainJob train-deepfm-" in log and "2 of 2 nodes run" in log
    assert not json.loads(kubectl("-n", STEPS, "get", _TRAIN_JOBS, "-o", "json"))["items"]
    assert not list((data / "trainings").iterdir())
