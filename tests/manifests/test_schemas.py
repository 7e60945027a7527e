"""Every object is valid by the schemas that the clusters check it with, and says nothing that they do not know."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from evergreen.training import train_job
from evergreen.training.train_job import TrainJobConfig
from tests.manifests import schemas
from tests.manifests.kustomize import VARIANTS, build, find


def _errors(found: dict[str, Any]) -> list[str]:
    try:
        return schemas.errors(found)
    except schemas.SchemaUnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("variant", VARIANTS)
def test_objects_are_valid(variant: str) -> None:
    wrong: list[str] = []
    missing: list[str] = []
    for found in build(variant):
        try:
            wrong += schemas.errors(found)
        except schemas.SchemaUnavailableError as error:
            missing.append(str(error))
    assert not wrong, "\n".join(wrong)
    if missing:
        pytest.skip(f"the other objects are valid; not checked: {missing[0]}")


@pytest.mark.parametrize(
    ("kind", "name", "path"),
    [
        ("ServingRuntime", "evergreen", ("spec", "containers", 0)),
        ("InferenceService", "evergreen", ("spec", "predictor")),
        ("StatefulSet", "redis", ("spec", "template", "spec")),
        ("NetworkPolicy", "default-deny", ("metadata",)),
    ],
)
def test_unknown_field_is_an_error(kind: str, name: str, path: tuple[str | int, ...]) -> None:
    found = copy.deepcopy(find(build("overlays/kind"), kind, name))
    inner = found
    for key in path:
        inner = inner[key]  # type: ignore[index]
    inner["memmory"] = "1Gi"
    (error,) = _errors(found)
    assert "memmory" in error
    assert name in error


def test_train_job_of_the_training_step_is_valid() -> None:
    found = train_job.manifest("train-deepfm-0", ["/data/training_set"], TrainJobConfig(num_nodes=2))
    found["metadata"]["namespace"] = "kubeflow"
    assert _errors(found) == []
    found["spec"]["trainer"]["nodes"] = 2
    (error,) = _errors(found)
    assert "nodes" in error


def test_wrong_type_is_an_error() -> None:
    found = copy.deepcopy(find(build("overlays/kind"), "StatefulSet", "redis"))
    found["spec"]["replicas"] = "one"
    (error,) = _errors(found)
    assert "spec.replicas" in error


def test_missing_field_is_an_error() -> None:
    found = copy.deepcopy(find(build("overlays/production"), "PrometheusRule", "evergreen"))
    del found["spec"]["groups"][0]["rules"][0]["expr"]
    (error,) = _errors(found)
    assert "expr" in error


def test_kubernetes_takes_numbers_as_quantities_and_names_as_ports() -> None:
    found = copy.deepcopy(find(build("overlays/kind"), "StatefulSet", "redis"))
    (container,) = found["spec"]["template"]["spec"]["containers"]
    container["resources"]["limits"]["cpu"] = 1
    container["livenessProbe"]["tcpSocket"]["port"] = 6379
    assert _errors(found) == []
