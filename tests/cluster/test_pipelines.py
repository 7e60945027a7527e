"""The compiled training pipeline, step by step in pods of its image, to a model that answers in the cluster."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from evergreen.release.cluster import Cluster
from evergreen.serving.client import RecommenderClient
from pipelines.training import training_pipeline
from tests.cluster.conftest import SERVING, STEPS, run
from tests.cluster.step_pods import StepPods
from tests.e2e.cluster import get, why_not_here

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(why_not_here()), reason=why_not_here() or ""),
]


def test_training_pipeline_runs_in_pods_and_its_model_answers(models: Path, work: Path, evergreen: Path) -> None:
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
