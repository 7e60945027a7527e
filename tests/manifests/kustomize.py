"""Builds kustomizations as `kubectl apply -k` does, and finds the pods in what comes out."""

from __future__ import annotations

import copy
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

Object = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
MANIFESTS = ROOT / "manifests"
SERVING, STEPS = "base", "steps"
OVERLAYS = ("kind", "gpu", "production")
COMPONENTS = {
    "autoscaling": SERVING,
    "canary": SERVING,
    "gpu": SERVING,
    "monitoring": SERVING,
    "object-store": SERVING,
    "redis": SERVING,
    "stream": SERVING,
    "tokens": SERVING,
    "distributed-training": STEPS,
    "feast": STEPS,
    "recurring-runs": STEPS,
    "spark": STEPS,
}
"""Each component, and what it is a component of."""
VARIANTS = [f"overlays/{name}" for name in OVERLAYS] + [f"components/{name}" for name in COMPONENTS]


@functools.cache
def _built(variant: str) -> str:
    if shutil.which("kubectl") is None:
        pytest.skip("there is no kubectl, whose kustomize builds manifests")
    kind, _, name = variant.partition("/")
    if kind == "overlays":
        return _kustomize(MANIFESTS / kind / name)
    with tempfile.TemporaryDirectory() as folder:
        base = COMPONENTS[name]
        kustomization = {
            # Two levels, as in the overlays: an object with a namespace of its own keeps it.
            "resources": ["inner"],
            "components": [os.path.relpath(MANIFESTS / kind / name, folder)],
        }
        inner = {
            "namespace": "evergreen" if base == SERVING else "kubeflow",
            "resources": [os.path.relpath(MANIFESTS / base, Path(folder) / "inner")],
        }
        if name not in ("canary", "object-store"):  # these say themselves that they belong outside
            inner["components"] = [os.path.relpath(MANIFESTS / kind / name, Path(folder) / "inner")]
            del kustomization["components"]
        for path, content in ((Path(folder), kustomization), (Path(folder) / "inner", inner)):
            path.mkdir(exist_ok=True)
            (path / "kustomization.yaml").write_text(yaml.safe_dump(content))
        return _kustomize(Path(folder))


def _kustomize(folder: Path) -> str:
    run = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, f"kubectl kustomize {folder}: {run.stderr}"
    return run.stdout


def build(variant: str) -> list[Object]:
    """The objects of an overlay, or of a component on what it is a component of.

    Args:
        variant: of `VARIANTS`.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return [found for found in yaml.load_all(_built(variant), Loader=loader) if found]


def find(objects: Sequence[Object], kind: str, name: str, namespace: str | None = None) -> Object:
    """The one object of this kind and name (and namespace, where several have the name)."""
    (found,) = (
        o
        for o in objects
        if (o["kind"], o["metadata"]["name"]) == (kind, name) and namespace in (None, o["metadata"].get("namespace"))
    )
    return found


@dataclass(frozen=True)
class Pod:
    """A pod that an object leads to."""

    origin: str
    """Kind and name of the object."""
    namespace: str
    labels: dict[str, str]
    spec: Object
    serves: bool
    """It runs until it is stopped, so it wants probes and a budget."""

    @property
    def containers(self) -> list[Object]:
        """All of its containers, those that run before the others too."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


def pods(objects: Sequence[Object]) -> Iterator[Pod]:
    """Every pod that the objects lead to, predictors as KServe merges them; not those of Spark's and Feast's."""
    for each in objects:
        spec, kind = each.get("spec", {}), each["kind"]
        if kind in ("Deployment", "StatefulSet", "Job"):
            template = spec["template"]
        elif kind == "CronJob":
            template = spec["jobTemplate"]["spec"]["template"]
        elif kind == "TrainingRuntime":
            (job,) = spec["template"]["spec"]["replicatedJobs"]
            template = job["template"]["spec"]["template"]
        elif kind == "InferenceService":
            template = _predictor(each, objects)
        else:
            continue
        yield Pod(
            f"{kind} {each['metadata']['name']}",
            each["metadata"]["namespace"],
            template["metadata"]["labels"],
            template["spec"],
            kind in ("Deployment", "StatefulSet", "InferenceService"),
        )


def _predictor(service: Object, objects: Sequence[Object]) -> Object:
    """The pod's template, from the service, its runtime and its storage container."""
    predictor = copy.deepcopy(service["spec"]["predictor"])
    model = predictor.pop("model")
    runtime = copy.deepcopy(find(objects, "ServingRuntime", model["modelFormat"]["name"])["spec"])
    spec = predictor | {"containers": runtime["containers"], "volumes": runtime.get("volumes", [])}
    spec["containers"][0]["resources"] = model["resources"]
    if storage := predictor.get("storageContainerName"):
        spec["initContainers"] = [find(objects, "ClusterStorageContainer", storage)["spec"]["container"]]
    return {"metadata": {"labels": runtime["labels"]}, "spec": spec}
