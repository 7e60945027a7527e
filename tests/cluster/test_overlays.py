"""The overlays on a real cluster: applied twice, admitted by `restricted`, and never in the way of a release.

They go to namespaces of their own, so that an Evergreen that runs on the cluster is not touched. Claims ask for a class
that there is none of: what is tested needs no volume, and a hostPath volume that was claimed once is lost to others.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from tests.manifests import schemas
from tests.manifests.kustomize import OVERLAYS, VARIANTS, Object, build, find, pods

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not os.environ.get("KUBECONFIG"), reason="KUBECONFIG names no cluster"),
]

SERVING, STEPS = "overlay-test-serving", "overlay-test-steps"
NAMESPACES = {"evergreen": SERVING, "kubeflow": STEPS}
SHARED = "overlay-test"
"""Name of what lies in no namespace, or in KServe's."""
APPLIED = [
    *(f"overlays/{name}" for name in OVERLAYS),
    # The components that no overlay chooses.
    *(f"components/{name}" for name in ("distributed-training", "feast", "spark", "stream", "tokens")),
]
LIMIT_SECONDS = 60.0


def kubectl(*arguments: str, given: str | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run kubectl.

    Args:
        arguments: of the command line.
        given: what it reads.
        check: that it succeeds.
    """
    run = subprocess.run(["kubectl", *arguments], input=given, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 or not check, f"kubectl {' '.join(arguments)}: {run.stdout}{run.stderr}"
    return run


def wait_for(what: str, found: Callable[[], Any]) -> Any:
    """What `found` returns as soon as it is true.

    Raises:
        AssertionError: after a minute; with the events of the namespace.
    """
    until = time.monotonic() + LIMIT_SECONDS
    while not (result := found()):
        if time.monotonic() > until:
            events = kubectl("-n", SERVING, "get", "events", "--sort-by=.lastTimestamp").stdout
            raise AssertionError(f"waited {LIMIT_SECONDS:.0f} s for {what}; events of {SERVING}:\n{events[-6000:]}")
        time.sleep(0.5)
    return result


def moved(objects: list[Object]) -> list[Object]:
    """The same objects in namespaces of this test."""
    objects = copy.deepcopy(objects)
    for found in objects:
        metadata, namespace = found["metadata"], found["metadata"].get("namespace")
        if found["kind"] == "Namespace":
            metadata["name"] = NAMESPACES[metadata["name"]]
        elif namespace in NAMESPACES:
            metadata["namespace"] = NAMESPACES[namespace]
        else:
            metadata["name"] = SHARED
        if found["kind"] == "RoleBinding":
            if namespace not in NAMESPACES:
                found["roleRef"]["name"] = SHARED
            for subject in found["subjects"]:
                subject["namespace"] = NAMESPACES[subject.get("namespace", namespace)]
        if found["kind"] == "InferenceService" and "storageContainerName" in found["spec"]["predictor"]:
            found["spec"]["predictor"]["storageContainerName"] = SHARED
        if found["kind"] == "PersistentVolumeClaim":
            found["spec"]["storageClassName"] = SHARED
    return objects


def _yaml(objects: list[Object]) -> str:
    return yaml.safe_dump_all(objects)


def _apply(objects: list[Object]) -> list[str]:
    return kubectl("apply", "-f", "-", given=_yaml(objects)).stdout.splitlines()


def _state(objects: list[Object]) -> dict[str, int]:
    """Generation of each object that has one: it counts the changes of what was asked for."""
    listed = json.loads(kubectl("get", "-f", "-", "-o", "json", given=_yaml(objects)).stdout)["items"]
    return {
        f"{o['kind']} {o['metadata'].get('namespace')} {o['metadata']['name']}": o["metadata"].get("generation", 0)
        for o in listed
    }


def _remove() -> None:
    kubectl("delete", "namespace", SERVING, STEPS, "--ignore-not-found", "--wait", "--timeout=110s")
    kubectl("delete", "clusterstoragecontainer", SHARED, "--ignore-not-found")
    kubectl("-n", "kserve", "delete", "role,rolebinding", SHARED, "--ignore-not-found")


@pytest.fixture(scope="module", autouse=True)
def namespaces() -> Iterator[None]:
    """The namespace of the steps, which is Kubeflow's and so in no overlay; all is away afterwards."""
    _remove()
    kubectl("create", "namespace", STEPS)
    yield
    _remove()


@pytest.fixture(scope="module", autouse=True)
def crds() -> Iterator[None]:
    """The operators' CustomResourceDefinitions that the cluster lacks."""
    present = set(kubectl("get", "crd", "-o", "jsonpath={.items[*].metadata.name}").stdout.split())
    added = []
    for name in schemas.crds():
        try:
            definition = schemas.crd(name)
        except schemas.SchemaUnavailableError:
            continue
        if definition["metadata"]["name"] not in present:
            kubectl("apply", "--server-side", "-f", "-", given=yaml.safe_dump(definition))
            added.append(definition["metadata"]["name"])
    for name in added:
        kubectl("wait", "--for=condition=Established", f"crd/{name}", "--timeout=60s")
    yield
    if added:
        kubectl("delete", "crd", *added)


def _known(objects: list[Object]) -> list[Object]:
    """What the cluster has a kind for; skips where something is left out."""
    kinds = set(kubectl("api-resources", "--no-headers", "-o", "name").stdout.split())
    groups = {kind.partition(".")[2] for kind in kinds}
    left_out = [o["kind"] for o in objects if "." in o["apiVersion"] and o["apiVersion"].split("/")[0] not in groups]
    if left_out:
        pytest.skip(f"the cluster knows no {', '.join(sorted(set(left_out)))}, and their definitions cannot be had")
    return objects


@pytest.mark.parametrize("variant", APPLIED)
def test_applied_twice_changes_nothing(variant: str) -> None:
    objects = _known(moved(build(variant)))
    for namespace in NAMESPACES.values():  # overlays ask for different claims, and a claim cannot be changed
        kubectl("-n", namespace, "delete", "statefulset,pvc", "--all", "--timeout=60s")
    _apply(objects)
    before = _state(objects)
    again = _apply(objects)
    assert _state(objects) == before
    assert len(again) == len(objects)
    # kubectl sends the selector of a PodDisruptionBudget each time, and says `configured` though nothing is.
    assert [line for line in again if not line.endswith(" unchanged") and "poddisruptionbudget" not in line] == []
    difference = kubectl("diff", "-f", "-", given=_yaml(objects), check=False)
    assert (difference.returncode, difference.stdout) == (0, "")


@pytest.fixture
def kind() -> list[Object]:
    """Overlay kind, applied, without a release."""
    kubectl("-n", SERVING, "delete", "inferenceservice", "evergreen", "--ignore-not-found", check=False)
    objects = moved(build(f"overlays/{OVERLAYS[0]}"))
    _apply(objects)
    for secret, key in (("evergreen-redis", "password"), ("evergreen-s3", "AWS_ACCESS_KEY_ID")):
        made = kubectl(
            "-n",
            SERVING,
            "create",
            "secret",
            "generic",
            secret,
            f"--from-literal={key}=x",
            "--dry-run=client",
            "-o",
            "yaml",
        )
        kubectl("apply", "-f", "-", given=made.stdout)
    return objects


def _service() -> Object:
    found: Object = json.loads(kubectl("-n", SERVING, "get", "inferenceservice", "evergreen", "-o", "json").stdout)
    return found


def _release(uri: str) -> None:
    model = {"storageUri": uri, "runtime": "evergreen"}
    patch = json.dumps({"spec": {"predictor": {"model": model}}})
    kubectl("-n", SERVING, "patch", "inferenceservice", "evergreen", "--type=merge", "-p", patch)


def _predictors() -> list[Object]:
    listed = kubectl("-n", SERVING, "get", "pods", "-l", "app.kubernetes.io/name=evergreen-server", "-o", "json").stdout
    found: list[Object] = json.loads(listed)["items"]
    return found


def test_before_the_first_release_nothing_runs(kind: list[Object]) -> None:
    def reason() -> str | None:
        failure = _service().get("status", {}).get("modelStatus", {}).get("lastFailureInfo", {})
        return failure.get("reason")

    assert wait_for("KServe's status", reason) == "NoSupportingRuntime"
    assert not _predictors()


@pytest.mark.parametrize("uri", ["pvc://models/a", "s3://mlpipeline/evergreen/models/a"])
def test_restricted_admits_the_predictor_and_a_release_survives_an_apply(kind: list[Object], uri: str) -> None:
    _release(uri)
    # It only has to be there: it waits for its claim, or for its model, and there is neither.
    (pod,) = wait_for("the predictor's pod", _predictors)
    assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    assert len(pod["spec"].get("initContainers", [])) == (0 if uri.startswith("pvc:") else 1)
    assert pod["spec"]["containers"][0]["resources"]["limits"] == {"cpu": "2", "memory": "2Gi"}
    service = find(kind, "InferenceService", "evergreen")
    again = _apply(kind)
    assert "inferenceservice.serving.kserve.io/evergreen unchanged" in again
    model = _service()["spec"]["predictor"]["model"]
    assert (model["storageUri"], model["runtime"]) == (uri, "evergreen")
    # So does one by another field manager.
    kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", given=_yaml([service]))
    assert _service()["spec"]["predictor"]["model"]["storageUri"] == uri


def _as_pod(spec: Object, labels: dict[str, str], name: str) -> Object:
    """A pod to try: accounts and budgets are not what is asked about."""
    spec = {key: value for key, value in spec.items() if key in POD_FIELDS} | {"restartPolicy": "Never"}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels}, "spec": spec}


POD_FIELDS = {
    *("containers", "initContainers", "volumes", "securityContext", "automountServiceAccountToken", "tolerations"),
    *("nodeSelector", "terminationGracePeriodSeconds", "enableServiceLinks"),
}


@pytest.fixture
def restricted(kind: list[Object]) -> Callable[[Object], subprocess.CompletedProcess[str]]:
    """Asks the server whether it would take a pod into the namespace that serves."""
    return lambda pod: kubectl(
        *("-n", SERVING, "apply", "--dry-run=server", "-f", "-"), given=yaml.safe_dump(pod), check=False
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_restricted_admits_every_pod(variant: str, restricted: Callable[[Object], Any]) -> None:
    for number, pod in enumerate(pods(build(variant))):
        answer = restricted(_as_pod(pod.spec, pod.labels, f"trial-{number}"))
        assert (answer.returncode, answer.stderr) == (0, ""), pod.origin


@pytest.mark.parametrize("missing", ["seccompProfile", "runAsNonRoot"])
def test_restricted_refuses_a_pod_that_breaks_it(missing: str, restricted: Callable[[Object], Any]) -> None:
    (pod,) = (pod for pod in pods(build("overlays/kind")) if pod.origin == "StatefulSet redis")
    spec = copy.deepcopy(pod.spec)
    del spec["securityContext"][missing]
    answer = restricted(_as_pod(spec, pod.labels, "trial"))
    assert answer.returncode != 0
    assert "violates PodSecurity" in answer.stderr
    assert missing in answer.stderr


@pytest.mark.parametrize(
    ("verb", "resource", "namespace", "may"),
    [
        *(
            (verb, "inferenceservices.serving.kserve.io", SERVING, "yes")
            for verb in ("create", "patch", "delete", "watch")
        ),
        *(
            (verb, resource, SERVING, "yes")
            for verb, resource in (("list", "pods"), ("get", "pods/log"), ("list", "events"))
        ),
        ("patch", "inferenceservices.serving.kserve.io", "default", "no"),
        *(
            (verb, resource, SERVING, "no")
            for verb, resource in (("get", "secrets"), ("create", "pods"), ("patch", "deployments"))
        ),
        *((verb, resource, SERVING, "no") for verb, resource in (("create", "pods/exec"), ("create", "rolebindings"))),
        ("patch", "servingruntimes.serving.kserve.io", SERVING, "no"),
    ],
)
def test_steps_may_release_and_nothing_more(
    kind: list[Object], verb: str, resource: str, namespace: str, may: str
) -> None:
    account = f"system:serviceaccount:{STEPS}:pipeline-runner"
    answer = kubectl("auth", "can-i", verb, resource, "-n", namespace, f"--as={account}", check=False)
    assert answer.stdout.strip() == may
