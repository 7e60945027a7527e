"""Evergreen's loop on Airflow's schedule: both pipelines run on Kubeflow, Airflow says when and looks after them."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import DAG, CronDataIntervalTimetable, Param
from kubeflow_pipelines import KubeflowPipelineOperator

# The first full hour after the first release: earlier windows have no model to judge, and each would be made up for.
START = datetime(2026, 11, 23, tzinfo=UTC)
PIPELINES = Path(__file__).parent / "pipelines"
PARAMS = {"log_uri": Param("s3://mlpipeline/evergreen/log", type="string", description="Click log, an fsspec URL")}

DEFAULTS = {
    "owner": "evergreen",
    # Of the submission, and of looking after a run when the API is away: a run itself is never repeated.
    "retries": 5,
    "retry_delay": timedelta(minutes=1),
    "retry_exponential_backoff": True,
    # One slot for both pipelines, taken while they wait too: the state of the loop has one writer at a time.
    "pool": "evergreen",
}


def _run(pipeline: str, *, limit: timedelta, **arguments: Any) -> KubeflowPipelineOperator:
    """Submit a compiled pipeline as of the full hour in which the DAG run's interval ends."""
    as_of = "{{ data_interval_end.start_of('hour') | ts }}"
    return KubeflowPipelineOperator(
        task_id=pipeline,
        pipeline_file=str(PIPELINES / f"{pipeline}.yaml"),
        run_name=f"{pipeline} {as_of}",
        experiment="evergreen",
        # Features are materialized by the monitor, so with every run of it; training has to know that.
        arguments={"log_uri": "{{ params.log_uri }}", "as_of": as_of, "feature_batch_hours": 1.0, **arguments},
        limit=limit,
    )


# A window that was missed is made up for: the decision reads all windows before it, and a gap would look like no news.
with DAG(
    dag_id="evergreen_monitoring",
    description="Outcomes, monitors, decision; retraining or rollback if called for.",
    schedule=CronDataIntervalTimetable("5 * * * *", timezone="UTC"),  # impressions are written within a minute
    start_date=START,
    catchup=True,
    max_active_runs=1,
    default_args=DEFAULTS,
    params=PARAMS,
    tags=["evergreen"],
):
    _run("monitoring", limit=timedelta(hours=6), window_hours=1.0, live=True)

# A week that was missed is not: the next training knows all that it would have known.
with DAG(
    dag_id="evergreen_training",
    description="Click log to champion: snapshot, features, models, evaluation, release.",
    schedule=CronDataIntervalTimetable("5 3 * * 1", timezone="UTC"),
    start_date=START,
    catchup=False,
    max_active_runs=1,
    default_args=DEFAULTS,
    params=PARAMS,
    tags=["evergreen"],
):
    _run("training", limit=timedelta(hours=12))
