"""The recurring runs as they are declared here: `python -m pipelines.recurring`, which a Job in the cluster repeats.

What is there as declared is left alone; what differs is replaced, for Kubeflow Pipelines cannot change a recurring run.
"""

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import kfp
from kfp.dsl.graph_component import GraphComponent

from pipelines.kubernetes import compile_for_cluster
from pipelines.monitoring import monitoring_pipeline
from pipelines.training import training_pipeline

_PAGE = 100
_BATCH_HOURS = 1.0  # features are materialized by the monitor, so with every run of it

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recurring:
    """A pipeline and when it runs.

    No run waits for its turn: a run of a window that has passed would ask the clock and find the present one, so missed
    ones are not caught up with, and one that is late has the place to itself.
    """

    name: str
    pipeline: GraphComponent
    cron: str
    """Six fields, seconds first, UTC."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """That are not the pipeline's defaults."""


MONITORING = Recurring(
    "evergreen-monitoring",
    monitoring_pipeline,
    "0 5 * * * *",  # servers write their impressions within a minute, and a clock may be off by some
    {"window_hours": 1.0, "feature_batch_hours": _BATCH_HOURS, "live": True},
)
TRAINING = Recurring(
    "evergreen-training",
    training_pipeline,
    "0 35 3 * * 0",  # Sunday; between two runs of the monitor
    {"feature_batch_hours": _BATCH_HOURS},
)


def with_parameters(declared: Sequence[Recurring], given: Mapping[str, str]) -> list[Recurring]:
    """Recurring runs with parameters that a person gave as text; each goes to the pipelines that have it.

    Raises:
        ValueError: no pipeline has such a parameter, or it is not of its type.
    """
    types = {one.name: _types(one.pipeline) for one in declared}
    for name in given:
        if not any(name in known for known in types.values()):
            known = sorted({parameter for one in types.values() for parameter in one})
            raise ValueError(f"{name}={given[name]}: no such parameter; known: {', '.join(known)}")
    return [
        Recurring(
            one.name,
            one.pipeline,
            one.cron,
            {
                **one.parameters,
                **{name: _typed(name, given[name], types[one.name]) for name in given.keys() & types[one.name]},
            },
        )
        for one in declared
    ]


def keep(
    client: kfp.Client,
    declared: Sequence[Recurring],
    *,
    image: str,
    experiment: str,
    use_gpu: bool = False,
    trainer_nodes: int = 0,
) -> dict[str, str]:
    """Make the recurring runs of an experiment as declared; others with other names stay as they are.

    Args:
        client: of Kubeflow Pipelines.
        declared: what is to be there.
        image: name of the steps' image.
        experiment: its name; made if there is none.
        use_gpu: train on nodes that have a GPU.
        trainer_nodes: train on so many nodes at once; 0: in the step itself.

    Returns:
        By name: `unchanged`, `created` or `replaced`.
    """
    experiment_id = client.create_experiment(experiment).experiment_id
    done = {}
    with tempfile.TemporaryDirectory(prefix="evergreen-pipelines-") as folder:
        for one in declared:
            package = Path(folder) / f"{one.name}.yaml"
            compile_for_cluster(one.pipeline, package, image=image, use_gpu=use_gpu, trainer_nodes=trainer_nodes)
            mark = f"kept by evergreen, {_digest(package, one)}"
            found = [run for run in _all(client, experiment_id) if run.display_name == one.name]
            same = [run for run in found if run.description == mark]
            # First away with the old: two would run at once, and a run that breaks off here is repeated.
            for run in found:
                if run not in same[:1]:
                    client.delete_recurring_run(run.recurring_run_id)
            if not same:
                client.create_recurring_run(
                    experiment_id,
                    one.name,
                    description=mark,
                    cron_expression=one.cron,
                    max_concurrency=1,  # one writer of the loop's state
                    no_catchup=True,
                    params=dict(one.parameters),
                    pipeline_package_path=str(package),
                )
            done[one.name] = "unchanged" if same else "replaced" if found else "created"
            logger.info("%s: %s: %s", one.name, one.cron, done[one.name])
    return done


def _all(client: kfp.Client, experiment_id: str) -> Iterator[Any]:
    token = ""
    while True:
        page = client.list_recurring_runs(page_token=token, page_size=_PAGE, experiment_id=experiment_id)
        yield from page.recurring_runs or []
        if not (token := page.next_page_token or ""):
            return


def _digest(package: Path, one: Recurring) -> str:
    """Of all that makes a recurring run what it is; servers give back what they were told in other words."""
    told = json.dumps([one.cron, dict(one.parameters)], sort_keys=True).encode()
    return hashlib.sha256(package.read_bytes() + told).hexdigest()[:12]


def _types(pipeline: GraphComponent) -> dict[str, str]:
    parameters = pipeline.component_spec.inputs or {}
    return {name: parameter.type for name, parameter in parameters.items()}


def _typed(name: str, text: str, types: Mapping[str, str]) -> Any:
    if types[name] == "String":
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name}={text}: must be JSON of type {types[name]}") from error


@click.command(context_settings={"show_default": True})
@click.option("--host", required=True, help="URL of Kubeflow Pipelines' API, e.g. http://ml-pipeline.kubeflow:8888.")
@click.option("--image", required=True, help="Name of the steps' image: the one that this runs in.")
@click.option("--namespace", default=None, help="Of the profile, in a multi-user Kubeflow.")
@click.option("--experiment", default="evergreen")
@click.option("--parameter", "parameters", multiple=True, help="NAME=VALUE, for each pipeline that has it; repeat it.")
@click.option("--monitor-cron", default=MONITORING.cron, help="Seconds first, UTC.")
@click.option("--train-cron", default=TRAINING.cron, help="Seconds first, UTC.")
@click.option("--gpu", is_flag=True, envvar="TRAIN_ON_GPU", show_envvar=True, help="Train on nodes that have a GPU.")
@click.option(
    "--trainer-nodes",
    type=click.IntRange(min=0),
    default=0,
    envvar="TRAINER_NODES",
    show_envvar=True,
    help="Train on so many nodes at once, by Kubeflow Trainer; 0: in the step itself.",
)
def main(
    host: str,
    image: str,
    namespace: str | None,
    experiment: str,
    parameters: tuple[str, ...],
    monitor_cron: str,
    train_cron: str,
    gpu: bool,
    trainer_nodes: int,
) -> None:
    """Let the monitor run every hour and the training every week."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if wrong := [text for text in parameters if "=" not in text]:
        raise click.UsageError(f"--parameter {wrong[0]!r}: write NAME=VALUE")
    given = dict(text.split("=", 1) for text in parameters)
    if "log_uri" not in given:
        raise click.UsageError("--parameter log_uri=...: missing: where the click log is")
    declared = [
        Recurring(MONITORING.name, MONITORING.pipeline, monitor_cron, MONITORING.parameters),
        Recurring(TRAINING.name, TRAINING.pipeline, train_cron, TRAINING.parameters),
    ]
    try:
        wanted = with_parameters(declared, given)
    except ValueError as error:
        raise click.UsageError(f"--parameter {error}") from error
    client = kfp.Client(host=host, namespace=namespace or "kubeflow")
    keep(client, wanted, image=image, experiment=experiment, use_gpu=gpu, trainer_nodes=trainer_nodes)


if __name__ == "__main__":
    main()
