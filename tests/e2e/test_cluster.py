"""The loop on a cluster with Kubeflow Pipelines and KServe: train, serve, click, watch, drift, retrain, serve again.

It takes the overlay `kind` of the cluster that KUBECONFIG points to for itself, and takes it away in the end; with
E2E_KEEP=1 it leaves everything as it is. The images must be in reach of the cluster (`make kind-up` sees to it).
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from uuid import uuid4

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from evergreen.simulator.config import SimulatorConfig
from evergreen.simulator.days import run_day
from evergreen.simulator.log import simulate_log
from evergreen.simulator.scenarios import Scenario
from evergreen.simulator.served_model import ServedModel
from evergreen.simulator.visits import VisitPlan, Visits
from tests.e2e import pipelines
from tests.e2e.cluster import (
    ClusterError,
    explain_namespace,
    get,
    kubectl,
    port_forward,
    wait_until,
    why_not_here,
)

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
SERVING = "evergreen"
ISVC = "inferenceservices.serving.kserve.io"
BUCKET = "mlpipeline/evergreen"
IMPRESSIONS = f"s3://{BUCKET}/impressions"

LOG = SimulatorConfig(
    num_users=300,
    num_items=60,
    num_days=8,
    events_per_day=4_000,
    click_rate=0.15,
    segment_taste_share=0.9,
    interaction_strength=2.0,
    seed=5,
)
"""Small, and with tastes so strong that a day after they have turned is enough to see it and to learn it."""
SHIFT = Scenario(name="taste-shift", begins=1, taste_shift=1.0)
EVENINGS = 4  # one without drift, and as many as a challenger may need to beat what serves
MODELS = ["popularity", "deepfm"]
BATCH_HOURS = 24.0  # features are materialized every evening, and training has to know it, or they are called stale
# A kind cluster shares its cores with everything else: this test is not about milliseconds.
FIRST = {"feature_batch_hours": BATCH_HOURS, "latency_budget_ms": 2_000.0}
WINDOW = {
    **FIRST,
    "window_hours": BATCH_HOURS,
    # The newest quarter of a day tests, the one before validates: half a day after the shift is there to learn from.
    "test_hours": 6.0,
    "models": ["deepfm"],
    "decision_config": {"quality_windows": 1, "min_rows": 500, "cooldown": "PT12H"},
    "canary_requests": 200,
}

DEPLOY_SECONDS, TRAINING_SECONDS, WINDOW_SECONDS = 900.0, 3_600.0, 5_400.0
FLUSH_SECONDS, REFRESH_SECONDS = 120.0, 180.0


def _say(line: str) -> None:
    print(f"[{datetime.now():%H:%M:%S}] {line}", flush=True)


def _run(*command: str, limit: float) -> None:
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=limit)
    if ran.returncode != 0:
        raise ClusterError(f"{' '.join(command)}: exit code {ran.returncode}\n{ran.stdout[-5000:]}\n{ran.stderr}")


@dataclass
class Loop:
    """One loop on the cluster, and what it was made of."""

    folder: Path
    plan: VisitPlan = field(default_factory=lambda: VisitPlan(log=LOG, scenario=SHIFT, requests_per_day=1_500, k=6))
    prefix: str = field(default_factory=lambda: f"{BUCKET}/e2e-{uuid4().hex[:8]}")
    runs: list[str] = field(default_factory=list)

    @property
    def parameters(self) -> dict[str, str]:
        return {"log_uri": f"s3://{self.prefix}/log"}

    def evening(self, day: int) -> str:
        """When a day of the world ends; day -1 is the log's last."""
        return self.plan.date(day + 1).isoformat()

    def upload(self, source: Path, target: str) -> None:
        with pipelines.object_store() as files:
            for file in sorted(path for path in source.rglob("*") if path.is_file()):
                files.put_file(str(file), f"{self.prefix}/{target}/{file.relative_to(source)}")

    def run(self, pipeline: str, name: str, *, limit: float, **arguments: object) -> None:
        """Submit one of our pipelines and wait until it has succeeded."""
        file = self.folder / "compiled" / f"{pipeline}.yaml"
        run_id = pipelines.submit(file, name, "evergreen-e2e", {**self.parameters, **arguments})
        self.runs.append(run_id)
        _say(f"run {name}: {run_id}")
        _say(f"run {name} has ended:\n{pipelines.steps_of(pipelines.wait_for(run_id, name, limit=limit))}")

    def live(self, visits: Visits, day: int) -> dict[str, int]:
        """Let the world's people ask the InferenceService for a day; log what they saw and clicked. Versions seen."""
        world = self.folder / "world"
        with port_forward(SERVING, "svc/evergreen-predictor", 80) as url:
            _await_items(url)
            with ServedModel(url) as recommend:
                summary = run_day(visits, day, recommend, world)
            wait_until(
                "the server's impressions to be written",
                lambda: _metric(url, "evergreen_impressions_held_rows") == 0 or None,
                limit=FLUSH_SECONDS,
                explain=lambda: explain_namespace(SERVING),
            )
        self.upload(world / "events", "log/events")
        self.upload(world / "clicks", "clicks")
        _say(f"day {day}: {summary.requests} requests, {summary.click_rate:.1%} clicked, {summary.model_versions}")
        return summary.model_versions

    def watch(self, day: int) -> None:
        """The monitoring pipeline on that day."""
        self.run(
            "monitoring",
            f"evening of day {day}",
            limit=WINDOW_SECONDS,
            as_of=self.evening(day),
            clicks=f"s3://{self.prefix}/clicks",
            impressions=IMPRESSIONS,
            **WINDOW,
        )


def _await_items(url: str) -> None:
    """Wait until the server has read the items anew.

    It reads them once a minute, and a day of this world begins seconds after the evening: asked at once, it would serve
    all day what was known the day before, and the monitor would rightly call it skew.
    """
    began = time.monotonic()

    def read_since() -> bool | None:
        age = _metric(url, "evergreen_item_table_age_seconds")
        return (age is not None and age < time.monotonic() - began) or None

    wait_until("newer items", read_since, limit=REFRESH_SECONDS, explain=lambda: explain_namespace(SERVING))


def _metric(url: str, name: str) -> float | None:
    """The sum of a metric; None: the server does not answer."""
    try:
        text = httpx.get(f"{url}/metrics", trust_env=False).raise_for_status().text
    except httpx.HTTPError:
        return None
    families = text_string_to_metric_families(text)
    return sum(sample.value for family in families if family.name == name for sample in family.samples)


def _asked() -> dict:
    """The answer to one request over HTTP, through the Service."""
    with port_forward(SERVING, "svc/evergreen-predictor", 80) as url:
        body = {"instances": [{"user_id": "u0001", "k": 5, "shown": False}]}
        response = httpx.post(f"{url}/v1/models/evergreen:predict", json=body, trust_env=False)
    assert response.is_success, response.text
    return response.json()["predictions"][0]


def _storage_uri() -> str | None:
    service = get(ISVC, "evergreen", SERVING) or {}
    return service.get("spec", {}).get("predictor", {}).get("model", {}).get("storageUri")


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    """The overlay, deployed and without a model, and everything of it gone when the test ends."""
    if reason := why_not_here():
        pytest.skip(reason)
    if get("service", "ml-pipeline", pipelines.STEPS) is None:
        pytest.skip("no Kubeflow Pipelines in namespace kubeflow: `make kind-up` makes a cluster that has it")
    was_there = bool(kubectl("get", "namespace", SERVING, "--ignore-not-found").strip())
    if was_there and (uri := _storage_uri()):
        pytest.fail(f"InferenceService {SERVING}/evergreen serves {uri}: this test would take it over; choose another "
                    "cluster, or take it away by `kubectl delete -k manifests/overlays/kind`")  # fmt: skip
    made = Loop(tmp_path)
    _say("deploying the overlay kind")
    _run("manifests/kind/cluster", "deploy", limit=DEPLOY_SECONDS)
    try:
        yield made
    finally:
        if os.environ.get("E2E_KEEP") != "1":
            _clean_up(made, deploy_again=was_there)


def _clean_up(loop: Loop, *, deploy_again: bool) -> None:
    """Take away runs, what lies in the object store, and the overlay with its volumes; the rest if one cannot be."""
    _say("cleaning up")
    overlay = str(ROOT / "manifests" / "overlays" / "kind")
    with ExitStack() as last_first:
        if deploy_again:
            last_first.callback(_run, "manifests/kind/cluster", "deploy", limit=DEPLOY_SECONDS)
        last_first.callback(kubectl, "delete", "-k", overlay, "--ignore-not-found", limit=600)
        last_first.callback(_empty_object_store, loop)
        last_first.callback(pipelines.delete, loop.runs)


def _empty_object_store(loop: Loop) -> None:
    with pipelines.object_store() as files:
        for folder in (loop.prefix, f"{BUCKET}/models", f"{BUCKET}/impressions"):
            if files.exists(folder):
                files.rm(folder, recursive=True)


def test_the_loop_closes(loop: Loop) -> None:
    _run(sys.executable, "-m", "evergreen.cli", "compile", "--out", str(loop.folder / "compiled"), limit=300)
    simulate_log(LOG, loop.folder / "log")
    loop.upload(loop.folder / "log" / "events", "log/events")

    loop.run(
        "training",
        "first",
        limit=TRAINING_SECONDS,
        as_of=loop.evening(-1),
        models=MODELS,
        **FIRST,
    )
    first = _asked()
    assert len(first["items"]) == 5, "the InferenceService answers over HTTP, through its Service"
    assert (_storage_uri() or "").endswith(f"/{first['model_version']}"), "what answers is what was released"

    visits = Visits(loop.plan, num_days=EVENINGS)
    assert set(loop.live(visits, 0)) == {first["model_version"]}
    loop.watch(0)
    assert _asked()["model_version"] == first["model_version"], "nothing has happened: nothing is released"

    for day in range(1, EVENINGS):
        loop.live(visits, day)
        loop.watch(day)
        serving = _asked()["model_version"]
        if serving != first["model_version"]:
            break
    else:
        pytest.fail(f"tastes shifted on day 1, and by the evening of day {day} no other model serves; see the runs")
    assert (_storage_uri() or "").endswith(f"/{serving}")
    assert get(ISVC, "evergreen-canary", SERVING) is None, "no canary is left behind"
    if day + 1 < EVENINGS:
        assert set(loop.live(visits, day + 1)) == {serving}, "users are served by the new model alone"
