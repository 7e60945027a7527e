"""Training past one node: Kubeflow Trainer runs `torchrun … evergreen train` on several, and a step waits for it.

The step and the nodes share a volume: what is learned from and what comes of it lie in a folder of the job's name,
which says what is trained, how and from where. So a step that was killed and is repeated finds the job that it began,
and a job that failed goes on from its checkpoint. Resources of a node: manifests/components/distributed-training.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evergreen.contracts.artifact import atomic_directory, canonical_json
from evergreen.contracts.errors import EvergreenError, TrainingError
from evergreen.contracts.training_set import TrainingSet
from evergreen.kube import Namespace, unmet_conditions, why_stuck
from evergreen.models.package import ModelPackage
from evergreen.training.config import TrainingConfig
from evergreen.training.trainer import Train, train_model

NUM_NODES = "EVERGREEN_TRAINER_NODES"
"""Environment variable that `evergreen compile --trainer-nodes` gives the step. Unset or 0: it trains by itself."""

_TRAINER = ("trainer.kubeflow.org", "v1alpha1")
_KIND = "trainjobs"
_OF_JOB = "jobset.sigs.k8s.io/jobset-name"
_INDEX = "batch.kubernetes.io/job-completion-index"
_CONTAINER = "node"
_MANAGER = "evergreen-training"
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_GONE_SECONDS = 180.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainJobConfig:
    """Where nodes come from, and how patient a training is with them."""

    num_nodes: int
    runtime: str = "evergreen-torch"
    """A TrainingRuntime of the namespace."""
    folder: Path = Path("/data")
    """Of the volume that the nodes and this process share."""
    start_seconds: float = 3600.0
    """Until all nodes run: a cluster may have to fetch machines with GPUs first."""
    poll_seconds: float = 5.0


def chosen_trainer() -> Train:
    """What trains: `train_model` in this process, or on nodes where `NUM_NODES` says how many.

    Raises:
        TrainingError: the number is none, or the volume of the nodes is not mounted here.
        EvergreenError: there is no cluster.
    """
    text = os.environ.get(NUM_NODES, "0")
    if not text.isdecimal():
        raise TrainingError(f"{NUM_NODES}={text}: must be a number of nodes, 0 for none")
    if not int(text):
        return train_model
    config = TrainJobConfig(num_nodes=int(text))
    if not config.folder.is_dir():
        raise TrainingError(
            f"{NUM_NODES}={text}, and {config.folder} is not mounted: compile with --trainer-nodes {text}, "
            "which mounts the claim evergreen-data"
        )
    return TrainJobs.connect(_NAMESPACE_FILE.read_text().strip()).trainer(config)


class TrainJobs(Namespace):
    """TrainJobs of one namespace, and the pods behind them."""

    def trainer(self, settings: TrainJobConfig) -> Train:
        """A function that is called like `train_model`, and trains on nodes."""

        def train(
            training_set: TrainingSet, out: Path, *, config: TrainingConfig, warm_start: ModelPackage | None = None
        ) -> ModelPackage:
            return self.train(training_set, out, config=config, warm_start=warm_start, settings=settings)

        return train

    def train(
        self,
        training_set: TrainingSet,
        out: Path,
        *,
        config: TrainingConfig,
        warm_start: ModelPackage | None = None,
        settings: TrainJobConfig,
    ) -> ModelPackage:
        """Train one model by a TrainJob, and fetch its package. The job and its folder are gone afterwards.

        Args:
            training_set: the splits.
            out: where the package goes; written whole or not at all.
            config: which model, and how.
            warm_start: a package of the same model, whose weights are the start.
            settings: of the nodes.

        Raises:
            TrainingError: the job failed, or its nodes do not start; with conditions, events and the first node's log.
                The job stays to be looked at, and the next try begins with taking it away.
            EvergreenError: the cluster refuses, or cannot be reached.
        """
        name = _job_name(training_set, config, warm_start, settings)
        folder = settings.folder / "trainings" / name
        _copy_once(training_set.path, folder / "training_set")
        if warm_start is not None:
            _copy_once(warm_start.path, folder / "warm_start")
        self._begin(name, _arguments(folder, config, is_warm=warm_start is not None), settings)
        self._wait(name, settings)
        package = ModelPackage.load(folder / "package")
        with atomic_directory(Path(out)) as scratch:
            shutil.copytree(package.path, scratch, dirs_exist_ok=True)
        self._delete(name)
        shutil.rmtree(folder, ignore_errors=True)
        return ModelPackage.load(Path(out))

    def _get(self, name: str) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self.call(
            f"read TrainJob {name}",
            self._objects.get_namespaced_custom_object, *_TRAINER, self.namespace, _KIND, name, none_for=404,
        )  # fmt: skip
        return found

    def _delete(self, name: str) -> None:
        self.call(
            f"delete TrainJob {name}",
            self._objects.delete_namespaced_custom_object, *_TRAINER, self.namespace, _KIND, name,
            propagation_policy="Foreground", none_for=404,
        )  # fmt: skip

    def _begin(self, name: str, arguments: list[str], settings: TrainJobConfig) -> None:
        """Create the job, unless an earlier try of this very training did and it did not fail."""
        found = self._get(name)
        if found is not None and _ended(found) == "Failed":
            self._delete(name)
            deadline = time.monotonic() + _GONE_SECONDS
            while self._get(name) is not None:
                if time.monotonic() > deadline:
                    raise EvergreenError(f"{self.namespace}: TrainJob {name} failed, was deleted, and does not go away")
                time.sleep(settings.poll_seconds)
            found = None
        if found is not None:
            logger.info("goes on with TrainJob %s", name)
            return
        body = manifest(name, arguments, settings)
        body["metadata"] |= self._owner()
        self.call(
            f"create TrainJob {name}",
            self._objects.create_namespaced_custom_object, *_TRAINER, self.namespace, _KIND, body,
            field_manager=_MANAGER,
        )  # fmt: skip
        logger.info(
            "TrainJob %s: %d nodes; kubectl -n %s logs -f -l %s=%s,%s=0",
            name, settings.num_nodes, self.namespace, _OF_JOB, name, _INDEX,
        )  # fmt: skip

    def _owner(self) -> dict[str, Any]:
        """This pod, so that its nodes go with it when somebody ends the run and its pods are removed."""
        if not self.is_inside:
            return {}
        pod = self.optional(self._core.read_namespaced_pod, os.environ["HOSTNAME"], self.namespace)
        if isinstance(pod, str):
            logger.warning("nodes will outlive this step if it is removed: its pod cannot be read (%s)", pod)
            return {}
        owner = {"apiVersion": "v1", "kind": "Pod", "name": pod.metadata.name, "uid": pod.metadata.uid}
        return {"ownerReferences": [owner]}

    def _wait(self, name: str, settings: TrainJobConfig) -> None:
        deadline, told = time.monotonic() + settings.start_seconds, -1
        while True:
            job = self._get(name)
            if job is None:
                raise TrainingError(f"{self.namespace}: TrainJob {name} was deleted while it ran: start the step again")
            if (end := _ended(job)) == "Complete":
                return
            if end:
                raise TrainingError(f"{self.namespace}: TrainJob {name} failed:\n{self._explain(name)}")
            pods = self.select_pods(_OF_JOB, name)
            for stuck in filter(None, map(why_stuck, pods)):
                raise TrainingError(f"{self.namespace}: TrainJob {name}: {stuck}\n{self._explain(name)}")
            begun = sum(pod.status.phase in ("Running", "Succeeded") for pod in pods)
            if begun != told:
                logger.info("%d of %d nodes run", begun, settings.num_nodes)
                told = begun
            if begun == settings.num_nodes:
                deadline = float("inf")  # how long it trains is the step's own limit
            if time.monotonic() > deadline:
                raise TrainingError(
                    f"{self.namespace}: TrainJob {name}: {begun} of {settings.num_nodes} nodes run after "
                    f"{settings.start_seconds:.0f} s:\n{self._explain(name)}"
                )
            time.sleep(settings.poll_seconds)

    def _explain(self, name: str) -> str:
        """What is known of a job that does not come to its end: conditions, events, and the first node's log."""
        job = self._get(name)
        lines = [f"condition {c['type']}: {c.get('message', '')}" for c in _conditions(job) if c["status"] == "True"]
        lines += [*unmet_conditions(job), *self.events(name)]
        pods = self.select_pods(_OF_JOB, name)
        firsts = [pod for pod in pods if (pod.metadata.labels or {}).get(_INDEX) == "0"]
        for pod in firsts[-1:]:
            lines += self.log(pod, _CONTAINER)
        return "\n".join(
            f"  {line}" for line in lines or ["no conditions, no events, no pods: is Kubeflow Trainer there?"]
        )


def manifest(name: str, arguments: Sequence[str], settings: TrainJobConfig) -> dict[str, Any]:
    """A TrainJob that gives `evergreen train` its arguments on every node."""
    return {
        "apiVersion": "/".join(_TRAINER),
        "kind": "TrainJob",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/part-of": "evergreen"}},
        "spec": {
            "runtimeRef": {"apiGroup": _TRAINER[0], "kind": "TrainingRuntime", "name": settings.runtime},
            "trainer": {"numNodes": settings.num_nodes, "args": list(arguments)},
        },
    }


def _conditions(job: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    conditions: list[dict[str, Any]] = ((job or {}).get("status") or {}).get("conditions") or []
    return conditions


def _ended(job: Mapping[str, Any]) -> str:
    """`Complete`, `Failed`, or nothing while it may still become one of them."""
    ends = [c["type"] for c in _conditions(job) if c["status"] == "True" and c["type"] in ("Complete", "Failed")]
    return ends[0] if ends else ""


def _job_name(
    training_set: TrainingSet, config: TrainingConfig, warm_start: ModelPackage | None, settings: TrainJobConfig
) -> str:
    """Of what is trained, how, on what rows, from where and on how many nodes."""
    told = {
        "training_set": training_set.manifest.model_dump(mode="json"),
        "config": config.model_dump(mode="json"),
        "warm_start": warm_start.digest if warm_start is not None else None,
        "nodes": settings.num_nodes,
    }
    digest = hashlib.sha256(canonical_json(told)).hexdigest()[:10]
    return f"train-{config.model.replace('_', '-')}-{digest}"


def _copy_once(source: Path, target: Path) -> None:
    if not target.is_dir():
        with atomic_directory(target) as scratch:
            shutil.copytree(source, scratch, dirs_exist_ok=True)


def _arguments(folder: Path, config: TrainingConfig, *, is_warm: bool) -> list[str]:
    """Of `evergreen train`, behind the runtime's command."""
    paths = {"out": "package", "checkpoint": "checkpoint.pt"} | ({"warm-start": "warm_start"} if is_warm else {})
    settings = config.model_dump(mode="json", exclude_defaults=True, exclude_none=True) | {"model": config.model}
    return [
        str(folder / "training_set"),
        *(f"--{option}={folder / name}" for option, name in paths.items()),
        *(f"--set={key}={json.dumps(value)}" for key, value in _leaves(settings)),
    ]


def _leaves(values: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by their full names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{place}{name}.")
        else:
            yield f"{place}{name}", value
