"""Run a compiled Kubeflow pipeline from Airflow and wait for it, without holding a worker.

Airflow has no provider for Kubeflow Pipelines: this is the KFP SDK behind one deferrable operator. It lies in the
plugins folder because the triggerer must be able to import it. Where the API is and what opens it is in Airflow's
Connection: host (`https://pipelines.example.com`), password (a bearer token) or, in the extras, `token_path` (a file
with one that somebody renews), `ca_file` and `namespace` (multi-user Kubeflow: the profile).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseHook, BaseOperator
from airflow.sdk.exceptions import AirflowFailException
from airflow.triggers.base import BaseTrigger, TriggerEvent

if TYPE_CHECKING:
    import kfp
    from airflow.sdk import Connection, Context
    from kfp_server_api import V2beta1Run

ENDED = {"SUCCEEDED", "SKIPPED", "FAILED", "CANCELED"}


def kfp_client(connection: Connection) -> kfp.Client:
    """A client of the Kubeflow Pipelines that a Connection leads to."""
    # Here and not above: the import takes seconds, and every process of Airflow imports the plugins.
    import kfp
    from kfp.client.set_volume_credentials import ServiceAccountTokenVolumeCredentials

    extra = connection.extra_dejson
    path = extra.get("token_path")
    return kfp.Client(
        host=connection.host if not connection.port else f"{connection.host}:{connection.port}",
        namespace=extra.get("namespace", "kubeflow"),
        existing_token=connection.password,
        credentials=ServiceAccountTokenVolumeCredentials(path) if path else None,
        ssl_ca_cert=extra.get("ca_file"),
    )


class KubeflowPipelineOperator(BaseOperator):
    """Submit a compiled pipeline and wait until its run has ended.

    A retry finds the run that an earlier try submitted by its name, and waits for it: a lost answer or a triggerer
    that died makes no second run. A run that fails is not repeated, since its steps have had their retries.

    Args:
        pipeline_file: YAML that `evergreen compile` wrote.
        run_name: names the run within its experiment; the same for all tries of a task.
        experiment: of Kubeflow Pipelines; made if there is none.
        arguments: parameters of the pipeline; those that are left out keep its defaults.
        limit: a run that takes longer is terminated and fails.
        poll_seconds: between two looks at the run.
        connection_id: Airflow's Connection, see above.

    Raises:
        AirflowFailException: the run failed, was cancelled or took longer than its limit; the message names its failed
            steps and leads to its page.
    """

    template_fields = ("pipeline_file", "run_name", "arguments")

    def __init__(
        self,
        *,
        pipeline_file: str,
        run_name: str,
        experiment: str,
        arguments: dict[str, Any],
        limit: timedelta,
        poll_seconds: float = 30.0,
        connection_id: str = "kubeflow_pipelines",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.pipeline_file = pipeline_file
        self.run_name = run_name
        self.experiment = experiment
        self.arguments = arguments
        self.limit = limit
        self.poll_seconds = poll_seconds
        self.connection_id = connection_id

    def execute(self, context: Context) -> None:
        """Submit, unless a run of this name is under way, and hand over to the trigger."""
        client = kfp_client(BaseHook.get_connection(self.connection_id))
        run = self._under_way(client) or self._submitted(client)
        self.log.info("waiting for %s", _page(client, run.run_id))
        self.defer(
            trigger=KubeflowRunTrigger(
                connection_id=self.connection_id,
                run_id=run.run_id,
                deadline=(run.created_at + self.limit).isoformat(),
                poll_seconds=self.poll_seconds,
            ),
            method_name="execute_complete",
        )

    def execute_complete(self, context: Context, event: dict[str, str]) -> str:
        """Return the id of the run that succeeded, or say why there is none."""
        run_id, state = event["run_id"], event["state"]
        client = kfp_client(BaseHook.get_connection(self.connection_id))
        if state not in ENDED:
            client.terminate_run(run_id)
            raise AirflowFailException(
                f"{self.run_name}: still {state} after {self.limit}, so it was terminated; {_page(client, run_id)}"
            )
        if state != "SUCCEEDED":
            why = _failures(client.get_run(run_id))
            raise AirflowFailException(f"{self.run_name}: {state}: {why}; {_page(client, run_id)}")
        return run_id

    def _submitted(self, client: kfp.Client) -> V2beta1Run:
        return client.create_run_from_pipeline_package(
            self.pipeline_file, arguments=self.arguments, run_name=self.run_name, experiment_name=self.experiment
        ).run_info

    def _under_way(self, client: kfp.Client) -> V2beta1Run | None:
        experiment = client.create_experiment(self.experiment)  # or the one of this name
        named = {"operation": "EQUALS", "key": "display_name", "stringValue": self.run_name}
        found = client.list_runs(
            experiment_id=experiment.experiment_id,
            sort_by="created_at desc",
            filter=json.dumps({"predicates": [named]}),
        )
        return next((run for run in found.runs or [] if run.state not in ENDED), None)


class KubeflowRunTrigger(BaseTrigger):
    """Fires when a run has ended or its deadline has passed. Killed by a person, it terminates the run."""

    def __init__(self, connection_id: str, run_id: str, deadline: str, poll_seconds: float) -> None:
        super().__init__()
        self.connection_id = connection_id
        self.run_id = run_id
        self.deadline = deadline
        self.poll_seconds = poll_seconds

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """What the triggerer needs to make it again; no token is in it."""
        fields = ("connection_id", "run_id", "deadline", "poll_seconds")
        return "kubeflow_pipelines.KubeflowRunTrigger", {name: getattr(self, name) for name in fields}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Yield `{"run_id", "state"}` once; a state that is none of `ENDED` tells that the deadline has passed."""
        client, deadline = await self._client(), datetime.fromisoformat(self.deadline)
        # The SDK blocks, and the triggerer has one event loop for all triggers.
        while (state := (await asyncio.to_thread(client.get_run, self.run_id)).state) not in ENDED:
            if datetime.now(UTC) > deadline:
                break
            await asyncio.sleep(self.poll_seconds)
        yield TriggerEvent({"run_id": self.run_id, "state": state})

    async def on_kill(self) -> None:
        """Whoever clears the task or marks it wants no run of it to go on."""
        await asyncio.to_thread((await self._client()).terminate_run, self.run_id)

    async def _client(self) -> kfp.Client:
        # Made for each use: a token file may have been renewed.
        return await asyncio.to_thread(kfp_client, await BaseHook.aget_connection(self.connection_id))


def _page(client: kfp.Client, run_id: str) -> str:
    return f"{client._get_url_prefix()}/#/runs/details/{run_id}"


def _failures(run: V2beta1Run) -> str:
    """The failed steps of a run and what they said."""
    tasks = run.run_details.task_details or [] if run.run_details else []
    failed = [f"{task.display_name}: {task.error.message}" for task in tasks if task.state == "FAILED" and task.error]
    return ", ".join(failed) or (run.error.message if run.error else "it tells no reason")
