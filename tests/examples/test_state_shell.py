"""The pod to look into the loop's state with holds to what every pod of ours holds to."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.manifests import policies
from tests.manifests.kustomize import build, find, pods
from tests.manifests.schemas import SchemaUnavailableError, errors

EXAMPLE = Path(__file__).parents[2] / "examples" / "state-shell"


@pytest.fixture(scope="module")
def pod() -> dict[str, Any]:
    if shutil.which("kubectl") is None:
        pytest.skip("there is no kubectl, whose kustomize builds manifests")
    built = subprocess.run(["kubectl", "kustomize", str(EXAMPLE)], capture_output=True, text=True, check=True)
    (made,) = yaml.safe_load_all(built.stdout)
    return made


@pytest.mark.parametrize(
    "policy",
    [
        policies.images_have_a_version,
        policies.containers_have_requests_and_limits,
        policies.pods_are_restricted,
        policies.root_file_systems_are_read_only,
        policies.no_secret_in_clear,
        policies.references_exist,
    ],
    ids=lambda policy: policy.__name__,
)
def test_a_policy_holds(pod: dict[str, Any], policy: policies.Policy) -> None:
    # The policies look at pods of workloads: a job of this one pod, beside what the steps have.
    template = {"metadata": {"labels": pod["metadata"]["labels"]}, "spec": pod["spec"]}
    job = {"kind": "Job", "metadata": pod["metadata"], "spec": {"template": template}}
    assert policy([*build("overlays/kind"), job]) == []


def test_it_is_valid(pod: dict[str, Any]) -> None:
    try:
        assert errors(pod) == []
    except SchemaUnavailableError as error:
        pytest.skip(str(error))


def test_it_sees_the_state_as_the_steps_do(pod: dict[str, Any]) -> None:
    overlay = build("overlays/kind")
    claim = find(overlay, "PersistentVolumeClaim", "evergreen-state")
    (volume,) = (v for v in pod["spec"]["volumes"] if "persistentVolumeClaim" in v)
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert pod["metadata"]["namespace"] == claim["metadata"]["namespace"]
    (recurring,) = (p for p in pods(overlay) if p.origin == "CronJob evergreen-recurring-runs")
    (container,) = pod["spec"]["containers"]
    assert container["image"] == recurring.containers[0]["image"], "the image that make images named"
    assert pod["spec"]["securityContext"]["runAsUser"] == recurring.spec["securityContext"]["runAsUser"]
