"""The policies hold in every overlay and with every component, and each can fail."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from tests.manifests import policies
from tests.manifests.kustomize import VARIANTS, Object, build, find

KIND, PRODUCTION = "overlays/kind", "overlays/production"


@pytest.mark.parametrize("policy", policies.POLICIES, ids=lambda policy: policy.__name__)
@pytest.mark.parametrize("variant", VARIANTS)
def test_policy_holds(variant: str, policy: policies.Policy) -> None:
    assert policy(build(variant)) == []


def _redis(objects: list[Object]) -> Object:
    spec: Object = find(objects, "StatefulSet", "redis")["spec"]["template"]["spec"]
    return spec


def _container(objects: list[Object]) -> Object:
    (container,) = _redis(objects)["containers"]
    found: Object = container
    return found


def _runtime(objects: list[Object]) -> Object:
    found: Object = find(objects, "ServingRuntime", "evergreen")["spec"]["containers"][0]
    return found


def _role(objects: list[Object]) -> list[Object]:
    rules: list[Object] = find(objects, "Role", "evergreen-release")["rules"]
    return rules


def _policy(objects: list[Object], name: str) -> Object:
    found: Object = find(objects, "NetworkPolicy", name)["spec"]
    return found


def _stores(objects: list[Object]) -> dict[str, Any]:
    data: dict[str, Any] = find(objects, "ConfigMap", "evergreen-stores", "evergreen")["data"]
    return data


def _without(objects: list[Object], kind: str, name: str) -> None:
    objects.remove(find(objects, kind, name, "evergreen"))


BREACHES: list[tuple[policies.Policy, str, Callable[[list[Object]], Any]]] = [
    (policies.images_have_a_version, "latest", lambda o: _container(o).update(image="redis:latest")),
    (policies.images_have_a_version, "redis", lambda o: _container(o).update(image="host:5000/redis")),
    (
        policies.containers_have_requests_and_limits,
        "limits of memory",
        lambda o: _container(o)["resources"]["limits"].pop("memory"),
    ),
    (
        policies.containers_have_requests_and_limits,
        "requests of cpu",
        lambda o: find(o, "InferenceService", "evergreen")["spec"]["predictor"]["model"]["resources"].pop("requests"),
    ),
    (policies.pods_are_restricted, "seccompProfile", lambda o: _redis(o)["securityContext"].pop("seccompProfile")),
    (policies.pods_are_restricted, "numeric", lambda o: _redis(o)["securityContext"].pop("runAsUser")),
    (policies.pods_are_restricted, "as root", lambda o: _container(o)["securityContext"].update(runAsUser=0)),
    (policies.pods_are_restricted, "token", lambda o: _redis(o).pop("automountServiceAccountToken")),
    (
        policies.pods_are_restricted,
        "of the host",
        lambda o: _redis(o)["volumes"].append({"name": "x", "hostPath": {"path": "/"}}),
    ),
    (
        policies.pods_are_restricted,
        "gain privileges",
        lambda o: find(o, "ClusterStorageContainer", "evergreen")["spec"]["container"].pop("securityContext"),
    ),
    (policies.pods_are_restricted, "capabilities", lambda o: _runtime(o)["securityContext"].pop("capabilities")),
    (
        policies.root_file_systems_are_read_only,
        "root file system",
        lambda o: _runtime(o)["securityContext"].pop("readOnlyRootFilesystem"),
    ),
    (
        policies.root_file_systems_are_read_only,
        "sizeLimit",
        lambda o: find(o, "ServingRuntime", "evergreen")["spec"]["volumes"][0].update(emptyDir={}),
    ),
    (
        policies.no_secret_in_clear,
        "with its value",
        lambda o: o.append({"kind": "Secret", "metadata": {"name": "x"}, "data": {}}),
    ),
    (policies.no_secret_in_clear, "AWS_SECRET_ACCESS_KEY", lambda o: _stores(o).update(AWS_SECRET_ACCESS_KEY="x")),
    (
        policies.no_secret_in_clear,
        "URL with credentials",
        lambda o: _stores(o).update(REDIS_URL="redis://user:pass@host"),
    ),
    (
        policies.no_secret_in_clear,
        "in clear",
        lambda o: _container(o)["env"].append({"name": "DB_PASSWORD", "value": "x"}),
    ),
    (policies.no_secret_in_clear, "--requirepass", lambda o: _container(o).update(args=["--requirepass", "hunter2"])),
    (
        policies.selectors_name_no_version,
        "version",
        lambda o: find(o, "Service", "redis")["spec"]["selector"].update({"app.kubernetes.io/version": "7"}),
    ),
    (
        policies.selectors_name_no_version,
        "holds a version",
        lambda o: _policy(o, "redis")["podSelector"]["matchLabels"].update({"app": "redis-7.2"}),
    ),
    (policies.network_policies_cover_every_pod, "denies all", lambda o: _without(o, "NetworkPolicy", "default-deny")),
    (
        policies.network_policies_cover_every_pod,
        "no policy for Ingress",
        lambda o: o.remove(find(o, "NetworkPolicy", "evergreen-recurring-runs")),
    ),
    (
        policies.network_policies_cover_every_pod,
        "everyone in",
        lambda o: _policy(o, "predictors")["ingress"][0].pop("from"),
    ),
    (policies.network_policies_cover_every_pod, "everything out", lambda o: _policy(o, "dns").update(egress=[{}])),
    (
        policies.roles_grant_what_is_listed,
        "whole cluster",
        lambda o: o.append({"kind": "ClusterRoleBinding", "metadata": {"name": "x"}}),
    ),
    (policies.roles_grant_what_is_listed, "secrets", lambda o: _role(o)[1]["resources"].append("secrets")),
    (policies.roles_grant_what_is_listed, "create", lambda o: _role(o)[2]["verbs"].append("create")),
    (
        policies.roles_grant_what_is_listed,
        "configmaps",
        lambda o: _role(o).append({"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get"]}),
    ),
    (policies.references_exist, "redis-data", lambda o: _without(o, "PersistentVolumeClaim", "redis-data")),
    (policies.references_exist, "evergreen-stores", lambda o: _without(o, "ConfigMap", "evergreen-stores")),
    (policies.references_exist, "evergreen-server", lambda o: _without(o, "ServiceAccount", "evergreen-server")),
    (
        policies.references_exist,
        "other-secret",
        lambda o: _container(o)["env"][0]["valueFrom"]["secretKeyRef"].update(name="other-secret"),
    ),
    (policies.servers_have_probes_and_a_budget, "livenessProbe", lambda o: _runtime(o).pop("livenessProbe")),
    (policies.servers_have_probes_and_a_budget, "0 budgets", lambda o: _without(o, "PodDisruptionBudget", "redis")),
    (policies.variables_in_arguments_exist, "ITEMS_URL", lambda o: _stores(o).pop("ITEMS_URL")),
]


@pytest.mark.parametrize(("policy", "says", "breach"), BREACHES, ids=[f"{p.__name__}-{s}" for p, s, _ in BREACHES])
def test_breach_is_found(policy: policies.Policy, says: str, breach: Callable[[list[Object]], Any]) -> None:
    objects = copy.deepcopy(build(KIND))
    breach(objects)
    assert any(says in wrong for wrong in policy(objects)), policy(objects)


def test_every_policy_can_fail() -> None:
    assert {policy for policy, _, _ in BREACHES} == set(policies.POLICIES)
