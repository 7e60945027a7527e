"""What the steps need of a cluster, in one place: resources, retries, timeouts, caching, secrets, volumes, GPU nodes.

The pipelines say what is computed; this is put on them when they are compiled, and `kfp.local` never sees it. What is
not written here is so on purpose: a user id, which the image has as a number and a server of KFP 2.16 cannot be told.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from google.protobuf import json_format
from kfp import kubernetes
from kfp.compiler import pipeline_spec_builder
from kfp.dsl.graph_component import GraphComponent
from kfp.pipeline_spec import pipeline_spec_pb2

from components.image import PIPELINE_IMAGE
from evergreen.contracts.errors import ArtifactError
from pipelines.training import STATE, TOKEN_FILE

NUM_NODES, DATA = "EVERGREEN_TRAINER_NODES", "/data"
"""What evergreen.training.train_job looks for, which is not imported here: it would bring torch."""

STATE_CLAIM, DATA_CLAIM = "evergreen-state", "evergreen-data"
STORES = "evergreen-stores"
S3_SECRET, REDIS_SECRET, TOKENS_SECRET = "evergreen-s3", "evergreen-redis", "evergreen-tokens"
GPU = "nvidia.com/gpu"

_HOUR = 3600
_URLS = {"log_uri", "impressions", "clicks", "model_store", "mapping"}
"""Parameters that name places in the object store."""


@dataclass(frozen=True)
class StepSettings:
    """What one step needs. Requests are for a small log on a small cluster; limits leave a larger log its room."""

    cpu: str = "250m"
    max_cpu: str = "2"
    memory: str = "1Gi"
    max_memory: str = "8Gi"
    hours: float = 2.0
    """After which it is ended; retries count anew."""
    retries: int = 2
    """Every step may be repeated after it was killed; a node that goes away must not cost a day's run."""
    scratch: str = "10Gi"
    """Of /tmp, which then is not the node's disk without a limit."""
    is_cached: bool = False
    """Only where all that a step reads are artifacts and parameters: KFP's key knows nothing of a log that grows, of
    the loop's state, or of a clock."""
    trains: bool = False
    """Where the pipelines are compiled so it takes a GPU, or hands its work to several nodes."""


_SMALL = StepSettings(cpu="100m", max_cpu="1", memory="512Mi", max_memory="2Gi", hours=0.25, scratch="1Gi")
_PURE = StepSettings(is_cached=True)

SETTINGS: Mapping[str, StepSettings] = {
    "ingest-log": StepSettings(),
    "filter-events": _PURE,
    "build-feature-tables": StepSettings(max_cpu="4", max_memory="16Gi", hours=4, scratch="50Gi", is_cached=True),
    "build-training-set": StepSettings(max_cpu="4", max_memory="16Gi", hours=4, scratch="50Gi", is_cached=True),
    "train-model": StepSettings(max_cpu="4", max_memory="16Gi", hours=12, is_cached=True, trains=True),
    "evaluate-models": StepSettings(cpu="500m", is_cached=True),  # it measures latency
    "report-drift": _PURE,
    "materialize-features": StepSettings(),
    "summarize-run": _SMALL,
    "deploy-model": StepSettings(),
    "read-clock": _SMALL,
    "join-outcomes": StepSettings(),
    "monitor-window": StepSettings(),
    "refresh-features": StepSettings(),
    "decide-retraining": _SMALL,
    "start-run": _SMALL,
    "gate-challenger": StepSettings(cpu="500m"),
    "release-model": StepSettings(),
    "finish-run": _SMALL,
    "roll-back-model": StepSettings(),
}
"""By the name that a step has in the compiled pipeline. A step without an entry is not compiled."""


@dataclass
class _Step:
    """Stands for a task of a pipeline that is described already: kfp-kubernetes writes into `platform_config`."""

    platform_config: dict[str, Any] = field(default_factory=dict)


def image_name(file: Path) -> str:
    """The real name of the steps' image.

    Args:
        file: kustomize's list of images, manifests/images/kustomization.yaml, which `images/build` writes.

    Raises:
        ArtifactError: there is no such file, or the steps' image is not in it.
    """
    if not file.is_file():
        raise ArtifactError(f"{file}: no such file: run it in the repository's root, or give --image NAME")
    placeholder = PIPELINE_IMAGE.partition(":")[0]
    for image in yaml.safe_load(file.read_text())["images"]:
        if image["name"] == placeholder:
            name = image.get("newName", placeholder)
            return f"{name}@{image['digest']}" if "digest" in image else f"{name}:{image['newTag']}"
    raise ArtifactError(f"{file}: no image {placeholder}: run `make images`")


def compile_for_cluster(
    pipeline: GraphComponent, target: Path, *, image: str, use_gpu: bool = False, trainer_nodes: int = 0
) -> None:
    """Write the YAML that `kfp run create -f` takes.

    Args:
        pipeline: a function decorated with @dsl.pipeline.
        target: the file.
        image: name of the steps' image.
        use_gpu: let the steps that train run on nodes that have a GPU.
        trainer_nodes: let Kubeflow Trainer train on as many nodes, by manifests/components/distributed-training; the
            step itself then needs no GPU. 0: it trains by itself.

    Raises:
        KeyError: a step has no entry in `SETTINGS`.
    """
    spec = json_format.MessageToDict(pipeline.pipeline_spec)
    platform = json_format.MessageToDict(pipeline.platform_spec)
    executors = platform.setdefault("platforms", {}).setdefault("kubernetes", {}).setdefault("deploymentSpec", {})
    steps = {
        name: component["executorLabel"]
        for name, component in spec["components"].items()
        if "executorLabel" in component
    }
    use_gpu = use_gpu and not trainer_nodes
    for name, label in steps.items():
        settings = SETTINGS[name.removeprefix("comp-")]
        component, container = spec["components"][name], spec["deploymentSpec"]["executors"][label]["container"]
        container["image"] = image
        container["resources"] = _resources(settings, use_gpu=use_gpu)
        parameters = set(component.get("inputDefinitions", {}).get("parameters", {}))
        of_pod = _pod(settings, parameters, use_gpu=use_gpu, trainer_nodes=trainer_nodes)
        if trainer_nodes and settings.trains:
            container.setdefault("env", []).append({"name": NUM_NODES, "value": str(trainer_nodes)})
        executors.setdefault("executors", {}).setdefault(label, {}).update(of_pod)
    for task in _tasks(spec):
        if (name := task["componentRef"]["name"]) in steps:
            settings = SETTINGS[name.removeprefix("comp-")]
            task["cachingOptions"] = {"enableCache": True} if settings.is_cached else {}
            task["retryPolicy"] = {
                "maxRetryCount": settings.retries,
                "backoffDuration": "30s",
                "backoffFactor": 2.0,
                "backoffMaxDuration": "600s",
            }
    # Through their messages, which know no field that a server does not know.
    pipeline_spec_builder.write_pipeline_spec_to_file(
        json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec()),
        pipeline.description,
        json_format.ParseDict(platform, pipeline_spec_pb2.PlatformSpec()),
        str(target),
    )


def _tasks(spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    graphs = [spec["root"], *spec["components"].values()]
    return [task for graph in graphs for task in graph.get("dag", {"tasks": {}})["tasks"].values()]


def _resources(settings: StepSettings, *, use_gpu: bool) -> dict[str, Any]:
    resources: dict[str, Any] = {
        "resourceCpuRequest": settings.cpu,
        "resourceCpuLimit": settings.max_cpu,
        "resourceMemoryRequest": settings.memory,
        "resourceMemoryLimit": settings.max_memory,
    }
    if use_gpu and settings.trains:
        resources["accelerator"] = {"resourceType": GPU, "resourceCount": "1"}
    return resources


def _pod(settings: StepSettings, parameters: set[str], *, use_gpu: bool, trainer_nodes: int) -> dict[str, Any]:
    """What a step's pod has, as kfp-kubernetes writes it; a step gets what its parameters show that it uses."""
    step: Any = _Step()
    kubernetes.set_timeout(step, int(settings.hours * _HOUR))
    kubernetes.set_image_pull_policy(step, "IfNotPresent")  # the name is immutable
    kubernetes.add_pod_label(step, "app.kubernetes.io/name", "evergreen-step")  # network policies know it by this
    kubernetes.empty_dir_mount(step, "tmp", "/tmp", size_limit=settings.scratch)
    if "state" in parameters:
        kubernetes.mount_pvc(step, STATE_CLAIM, STATE)
    if _URLS & parameters:
        keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
        # A cloud may give the pod an identity instead, and has an endpoint that nobody needs to name.
        kubernetes.use_secret_as_env(step, S3_SECRET, {key: key for key in keys}, optional=True)
        places = ("AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION")
        kubernetes.use_config_map_as_env(step, STORES, {key: key for key in places}, optional=True)
    if "store_config" in parameters:
        kubernetes.use_secret_as_env(step, REDIS_SECRET, {"password": "REDIS_PASSWORD"})
        kubernetes.use_config_map_as_env(step, STORES, {"REDIS_ADDRESS": "REDIS_ADDRESS"})
    if "server_token_file" in parameters:
        kubernetes.use_secret_as_volume(step, TOKENS_SECRET, str(Path(TOKEN_FILE).parent), optional=True)
    if use_gpu and settings.trains:
        kubernetes.add_node_selector(step, f"{GPU}.present", "true")
        kubernetes.add_toleration(step, key=GPU, operator="Exists", effect="NoSchedule")
    if trainer_nodes and settings.trains:
        kubernetes.mount_pvc(step, DATA_CLAIM, DATA)
    made: dict[str, Any] = step.platform_config["kubernetes"]
    return made
