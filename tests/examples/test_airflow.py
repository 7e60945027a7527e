"""The Airflow example, in an environment of its own with the real Airflow, against a server that speaks KFP's API."""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.kfp_server import KfpServer, kfp_server

pytestmark = pytest.mark.heavy

EXAMPLE = Path(__file__).parents[2] / "examples" / "airflow"
TOKEN = "a-token-that-must-not-leak"
HOUR = "2026-11-23T05:00:00+00:00"
BY_HAND = "2026-11-23T05:30:00+00:00"
"""A run by hand gets the last interval that had ended by then."""

DESCRIBE = """
import json, logging
logging.disable()
from airflow.dag_processing.dagbag import DagBag
bag = DagBag()
print(json.dumps({"errors": bag.import_errors, "dags": {dag.dag_id: {
    "schedule": dag.timetable.expression, "catchup": dag.catchup, "max_active_runs": dag.max_active_runs,
    "pools": sorted({task.pool for task in dag.tasks}), "tasks": sorted(dag.task_ids),
} for dag in bag.dags.values()}}))
"""


@pytest.fixture(scope="module")
def environment() -> Path:
    """A virtual environment with what the example requires; kept in the user's cache, by the digest of the list."""
    requirements = EXAMPLE / "requirements.txt"
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "evergreen" / f"airflow-{digest}"
    if not (cache / "complete").exists():
        uv = shutil.which("uv")
        if uv is None:
            pytest.skip("uv is not installed: it makes Airflow's environment")
        shutil.rmtree(cache, ignore_errors=True)
        for command in (
            ["venv", "--quiet", "--python", f"{sys.version_info.major}.{sys.version_info.minor}", str(cache)],
            ["pip", "install", "--quiet", "--python", str(cache / "bin" / "python"), "-r", str(requirements)],
        ):
            made = subprocess.run([uv, *command], capture_output=True, text=True, check=False, timeout=900)
            if made.returncode != 0:
                pytest.skip(f"Airflow cannot be installed here: {made.stderr[-300:]}")
        (cache / "complete").touch()
    return cache / "bin"


@pytest.fixture
def server() -> Iterator[KfpServer]:
    with kfp_server(TOKEN) as started:
        yield started


class Airflow:
    """An Airflow of its own that was set up by the commands of the README."""

    def __init__(self, programs: Path, home: Path) -> None:
        self.home = home
        self._programs = programs
        unset = {name for name in os.environ if name.startswith(("AIRFLOW", "VIRTUAL_ENV", "PYTHONPATH"))}
        self._variables = {name: value for name, value in os.environ.items() if name not in unset} | {
            "AIRFLOW_HOME": str(home),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def run(self, *command: str, **variables: str) -> str:
        ran = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=400,
            env=self._variables | variables,
            cwd=EXAMPLE.parents[1],
        )
        assert ran.returncode == 0, f"{shlex.join(command)}\n{ran.stdout[-3000:]}\n{ran.stderr[-3000:]}"
        return ran.stdout

    def set_up(self) -> None:
        """Run what the README says, line by line."""
        (self.home / "dags").mkdir(parents=True)
        (self.home / "plugins").mkdir()
        self.run("airflow", "db", "migrate")
        (block,) = re.findall(r"```sh\n(.*?)```", (EXAMPLE / "README.md").read_text(), flags=re.DOTALL)
        self.run("bash", "-euc", block, KFP_URL="http://replaced", KFP_TOKEN=TOKEN)

    def test_dag(self, dag: str, moment: str, server: KfpServer) -> subprocess.CompletedProcess[str]:
        """One DAG run with its deferrals, as `airflow dags test` does it."""
        connection = {"conn_type": "http", "host": server.url, "password": TOKEN}
        return subprocess.run(
            ["airflow", "dags", "test", dag, moment],
            capture_output=True,
            text=True,
            check=False,
            timeout=400,
            env=self._variables | {"AIRFLOW_CONN_KUBEFLOW_PIPELINES": json.dumps(connection)},
        )


@pytest.fixture(scope="module")
def airflow(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Airflow:
    made = Airflow(environment, tmp_path_factory.mktemp("airflow"))
    made.set_up()
    dag = made.home / "dags" / "evergreen.py"
    # The example looks every 30 seconds: too seldom for a test.
    dag.write_text(dag.read_text().replace("limit=limit,", "limit=limit, poll_seconds=0.2,"))
    return made


def _parameters(run: dict[str, Any]) -> dict[str, Any]:
    return run["runtime_config"]["parameters"]


def test_both_dags_import_and_are_scheduled_as_the_readme_says(airflow: Airflow) -> None:
    described = json.loads(airflow.run("python", "-c", DESCRIBE).splitlines()[-1])
    assert described["errors"] == {}
    one_writer = {"max_active_runs": 1, "pools": ["evergreen"]}
    assert described["dags"] == {
        "evergreen_monitoring": {"schedule": "5 * * * *", "catchup": True, "tasks": ["monitoring"], **one_writer},
        "evergreen_training": {"schedule": "5 3 * * 1", "catchup": False, "tasks": ["training"], **one_writer},
    }


def test_the_pool_has_one_slot_which_waiting_tasks_keep(airflow: Airflow) -> None:
    (pool,) = (
        pool
        for pool in json.loads(airflow.run("airflow", "pools", "list", "--output", "json"))
        if pool["pool"] == "evergreen"
    )
    assert (pool["slots"], pool["include_deferred"]) == ("1", "True")


@pytest.mark.parametrize("pipeline", ["monitoring", "training"])
def test_a_run_is_submitted_as_of_the_hour_and_waited_for(airflow: Airflow, server: KfpServer, pipeline: str) -> None:
    as_of = {"monitoring": HOUR, "training": "2026-11-23T03:00:00+00:00"}[pipeline]
    ran = airflow.test_dag(f"evergreen_{pipeline}", BY_HAND, server)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (run,) = server.runs
    assert run["state"] == "SUCCEEDED", "the task ended when the run had"
    assert run["display_name"] == f"{pipeline} {as_of}"
    assert _parameters(run)["as_of"] == as_of
    compiled = next(yaml.safe_load_all((airflow.home / "dags" / "pipelines" / f"{pipeline}.yaml").read_text()))
    definitions = compiled["root"]["inputDefinitions"]["parameters"]
    needed = {name for name, value in definitions.items() if not value.get("isOptional")}
    assert needed <= set(_parameters(run)) <= set(definitions), "what the pipeline asks for, and nothing else"
    submitted = run["pipeline_spec"].get("pipeline_spec", run["pipeline_spec"])
    assert submitted["pipelineInfo"]["name"] == f"evergreen-{pipeline}"
    assert TOKEN not in json.dumps(run), "no token is a parameter"
    assert TOKEN not in ran.stdout + ran.stderr


def test_a_run_that_fails_fails_the_task_with_the_steps_own_words(airflow: Airflow, server: KfpServer) -> None:
    server.outcome = "FAILED"
    server.task_details = [
        {"display_name": "ingest-log", "state": "FAILED", "error": {"code": 2, "message": "log/x.csv: no such file"}},
        {"display_name": "filter-events", "state": "PENDING"},
    ]
    ran = airflow.test_dag("evergreen_monitoring", BY_HAND, server)
    assert "FAILED: ingest-log: log/x.csv: no such file" in ran.stdout + ran.stderr
    assert f"{server.url}/#/runs/details/{server.runs[0]['run_id']}" in ran.stdout + ran.stderr
    assert len(server.runs) == 1, "what failed on Kubeflow is not repeated by Airflow"


def test_a_retry_waits_for_the_run_that_is_under_way(airflow: Airflow, server: KfpServer) -> None:
    experiment = server.add_experiment({"display_name": "evergreen"})["experiment_id"]
    server.add_run({"experiment_id": experiment, "display_name": f"monitoring {HOUR}"}, state="RUNNING")
    ran = airflow.test_dag("evergreen_monitoring", BY_HAND, server)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert [run["state"] for run in server.runs] == ["SUCCEEDED"], "no second one"


def test_a_run_past_its_limit_is_terminated(airflow: Airflow, server: KfpServer) -> None:
    server.outcome = ""
    experiment = server.add_experiment({"display_name": "evergreen"})["experiment_id"]
    run = server.add_run(
        {"experiment_id": experiment, "display_name": f"monitoring {HOUR}"},
        state="RUNNING",
        created_at=datetime.now(UTC) - timedelta(hours=7),
    )
    ran = airflow.test_dag("evergreen_monitoring", BY_HAND, server)
    assert server.terminated == [run["run_id"]]
    assert "still RUNNING after 6:00:00, so it was terminated" in ran.stdout + ran.stderr
