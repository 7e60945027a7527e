"""Runs of Kubeflow Pipelines and its object store, as an end-to-end test sees them from outside of the cluster."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import kfp
from kfp_server_api import ApiException, V2beta1Run
from urllib3.exceptions import HTTPError

from tests.e2e.cluster import ClusterError, explain_namespace, kubectl, port_forward, secret, wait_until

STEPS = "kubeflow"
"""Namespace of Kubeflow Pipelines standalone, and of the steps that it runs."""

_ENDED = {"SUCCEEDED", "SKIPPED", "FAILED", "CANCELED"}
_LOOK_SECONDS = 15.0


@contextmanager
def client() -> Iterator[kfp.Client]:
    """A client of the API. A forwarded port does not outlive its pod, so it is made for each use."""
    with port_forward(STEPS, "svc/ml-pipeline", 8888) as url, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield kfp.Client(host=url)


def submit(pipeline: Path, name: str, experiment: str, arguments: dict[str, Any]) -> str:
    """Create a run of a compiled pipeline; its id."""
    with client() as api:
        run = api.create_run_from_pipeline_package(
            str(pipeline), arguments=arguments, run_name=name, experiment_name=experiment
        )
    return str(run.run_id)


def wait_for(run_id: str, name: str, *, limit: float) -> V2beta1Run:
    """Wait until a run has succeeded.

    Not by `kfp.Client.wait_for_run_completion`: it waits on for a run that was cancelled.

    Args:
        run_id: of the run.
        name: of it, for people.
        limit: seconds.

    Raises:
        ClusterError: it failed, was cancelled, or did not end; with its steps, and pods, events and logs of them.
    """

    def explain() -> str:
        return explain_namespace(STEPS, f"pipeline/runid={run_id}")

    def ended() -> V2beta1Run | None:
        try:
            with client() as api:
                run = api.get_run(run_id)
        except (ApiException, HTTPError, ClusterError):
            return None  # the API server of Kubeflow Pipelines restarts now and then; the limit stands
        return run if run.state in _ENDED else None

    run = wait_until(f"run {name} ({run_id})", ended, limit=limit, explain=explain, every=_LOOK_SECONDS)
    if run.state != "SUCCEEDED":
        raise ClusterError(f"run {name} ({run_id}): {run.state}\n{steps_of(run)}\n{explain()}")
    return run


def steps_of(run: V2beta1Run) -> str:
    """A line a step: name, state, and what it said if it failed."""
    tasks = run.run_details.task_details or [] if run.run_details else []
    return "\n".join(
        f"   {task.display_name}: {task.state} {task.error.message if task.error else ''}" for task in tasks
    )


def delete(run_ids: list[str]) -> None:
    """Delete runs with their pods: a pod that has ended still holds on to the claim that it mounted."""
    with client() as api:
        for run_id in run_ids:
            api.delete_run(run_id)
    for run_id in run_ids:
        kubectl("-n", STEPS, "delete", "pods", "-l", f"pipeline/runid={run_id}", "--ignore-not-found", limit=300)


@contextmanager
def object_store() -> Iterator[fsspec.AbstractFileSystem]:
    """The cluster's object store, with the keys that the steps use."""
    keys = secret("evergreen-s3", STEPS)
    with port_forward(STEPS, "svc/seaweedfs", 9000) as url:
        yield fsspec.filesystem(
            "s3",
            key=keys["AWS_ACCESS_KEY_ID"],
            secret=keys["AWS_SECRET_ACCESS_KEY"],
            endpoint_url=url,
            client_kwargs={"region_name": "us-east-1"},
            skip_instance_cache=True,
            use_listings_cache=False,
        )
