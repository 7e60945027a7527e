"""What must hold of every object that we give to a cluster: each policy returns what breaks it, in words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tests.manifests.kustomize import Object, Pod, pods

Policy = Callable[[Sequence[Object]], list[str]]

SECRETS_OF_THE_SCRIPT = {"evergreen-redis", "evergreen-s3"}
"""Made by manifests/kind/cluster; never in a manifest."""
GIVEN = {
    # Chosen with a component that says so, and made by whoever chooses it.
    *(("Secret", name) for name in (*SECRETS_OF_THE_SCRIPT, "evergreen-tokens", "evergreen-feast")),
    ("PersistentVolumeClaim", "evergreen-data"),
    ("ServiceAccount", "pipeline-runner"),  # of Kubeflow Pipelines
}
ALLOWED_RULES = {
    ("serving.kserve.io", "inferenceservices"): {"get", "list", "watch", "create", "patch", "update", "delete"},
    ("", "pods"): {"get", "list"},
    ("", "events"): {"get", "list"},
    ("", "services"): {"get", "list"},
    ("", "pods/log"): {"get"},
    ("", "configmaps"): {"get"},
    ("gateway.networking.k8s.io", "httproutes"): {"get", "list"},
    ("trainer.kubeflow.org", "trainjobs"): {"get", "create", "delete"},
}
SPARK_RULES = {"pods", "services", "configmaps", "persistentvolumeclaims"}
# KServe's own image, which nobody here has run that way.
WRITES_ITS_ROOT = {"storage-initializer"}
_SECRET_WORD = re.compile(r"password|secret|token|api_?key|access_?key|credential", re.IGNORECASE)
_CREDENTIALS_IN_URL = re.compile(r"://[^/\s:@$]+:[^/\s@$]+@")
_VERSION_LABELS = {"app.kubernetes.io/version", "helm.sh/chart", "version", "evergreen/model-version"}


def _walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value under its path, from the outside in."""
    yield path, value
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _walk(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _walk(inner, f"{path}[{index}]")


def _name(found: Object) -> str:
    return f"{found['kind']} {found['metadata']['name']}"


def _containers(objects: Sequence[Object]) -> Iterator[tuple[Pod, Object, str]]:
    for pod in pods(objects):
        for container in pod.containers:
            yield pod, container, f"{pod.origin}, container {container['name']}"


def images_have_a_version(objects: Sequence[Object]) -> list[str]:
    """A tag that moves gives another program under the same name."""
    wrong = []
    for found in objects:
        for path, image in _walk(found):
            if path.rpartition(".")[2] == "image" and isinstance(image, str):
                tag = image.rpartition("/")[2].partition(":")[2]
                if "@sha256:" not in image and tag in ("", "latest"):
                    wrong.append(f"{_name(found)}: {path}: {image}: no version")
    return wrong


def containers_have_requests_and_limits(objects: Sequence[Object]) -> list[str]:
    """Of CPU and memory both."""
    return [
        f"{where}: no {part} of {resource}"
        for _, container, where in _containers(objects)
        for part in ("requests", "limits")
        for resource in ("cpu", "memory")
        if resource not in container.get("resources", {}).get(part, {})
    ]


def pods_are_restricted(objects: Sequence[Object]) -> list[str]:
    """Pod Security `restricted`, with a numeric user, without a token of the cluster."""
    wrong = []
    for pod in pods(objects):
        context = pod.spec.get("securityContext", {})
        if context.get("runAsNonRoot") is not True or not isinstance(context.get("runAsUser"), int):
            wrong.append(f"{pod.origin}: not runAsNonRoot with a numeric runAsUser")
        if context.get("runAsUser") == 0:
            wrong.append(f"{pod.origin}: runs as root")
        if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
            wrong.append(f"{pod.origin}: seccompProfile is not RuntimeDefault")
        if pod.spec.get("automountServiceAccountToken") is not False:
            wrong.append(f"{pod.origin}: mounts a token of the cluster")
        wrong += [f"{pod.origin}: {key}" for key in ("hostNetwork", "hostPID", "hostIPC") if pod.spec.get(key)]
        wrong += [
            f"{pod.origin}: volume {v['name']} of the host" for v in pod.spec.get("volumes", []) if "hostPath" in v
        ]
    for _, container, where in _containers(objects):
        context = container.get("securityContext", {})
        if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
            wrong.append(f"{where}: may gain privileges")
        if context.get("capabilities", {}).get("drop") != ["ALL"] or context.get("capabilities", {}).get("add"):
            wrong.append(f"{where}: keeps capabilities")
        if context.get("runAsUser") == 0:
            wrong.append(f"{where}: runs as root")
    return wrong


def root_file_systems_are_read_only(objects: Sequence[Object]) -> list[str]:
    """What is written goes to a volume with a limit."""
    wrong = [
        f"{where}: writes to its root file system"
        for _, container, where in _containers(objects)
        if container["name"] not in WRITES_ITS_ROOT
        and container.get("securityContext", {}).get("readOnlyRootFilesystem") is not True
    ]
    return wrong + [
        f"{pod.origin}: volume {volume['name']} has no sizeLimit"
        for pod in pods(objects)
        for volume in pod.spec.get("volumes", [])
        if "emptyDir" in volume and "sizeLimit" not in (volume["emptyDir"] or {})
    ]


def no_secret_in_clear(objects: Sequence[Object]) -> list[str]:
    """Neither as a Secret with its value, nor as a variable, an argument, a key of a ConfigMap or in a URL."""
    wrong = [f"{_name(found)}: a Secret with its value in a manifest" for found in objects if found["kind"] == "Secret"]
    for found in objects:
        if found["kind"] == "ConfigMap":
            wrong += [f"{_name(found)}: {key}" for key in found.get("data", {}) if _SECRET_WORD.search(key)]
        for path, value in _walk(found):
            if isinstance(value, str) and _CREDENTIALS_IN_URL.search(value):
                wrong.append(f"{_name(found)}: {path}: a URL with credentials")
    for _, container, where in _containers(objects):
        for entry in container.get("env", []):
            value = entry.get("value", "")
            if _SECRET_WORD.search(entry["name"]) and value and not re.fullmatch(r"\$\(\w+\)", value):
                wrong.append(f"{where}: {entry['name']} in clear")
        arguments = [*container.get("command", []), *container.get("args", [])]
        for before, argument in zip(["", *arguments], arguments, strict=False):
            option, _, value = argument.partition("=") if argument.startswith("-") else (before, "", argument)
            secret = re.search(r"password|requirepass|secret(?!-file)|api-?key", option) and option.startswith("-")
            if secret and value and not re.fullmatch(r"\$\(\w+\)", value):
                wrong.append(f"{where}: {option} in clear")
    return wrong


def selectors_name_no_version(objects: Sequence[Object]) -> list[str]:
    """A selector does not change while the pods that it selects do."""
    wrong = []
    for found in objects:
        for path, value in _walk(found):
            last = path.rpartition(".")[2]
            if last == "matchLabels" or (last == "selector" and found["kind"] == "Service"):
                versions = _VERSION_LABELS & set(value)
                wrong += [f"{_name(found)}: {path}: selects by {label}" for label in sorted(versions)]
                wrong += [
                    f"{_name(found)}: {path}: {label}={text} holds a version"
                    for label, text in value.items()
                    if re.search(r"\d+\.\d+|[0-9a-f]{12}", str(text))
                ]
    return wrong


def _matches(selector: Object, labels: dict[str, str]) -> bool:
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for rule in selector.get("matchExpressions", []):
        assert rule["operator"] == "In", f"{rule}: the tests know `In` alone"
        if labels.get(rule["key"]) not in rule["values"]:
            return False
    return True


def network_policies_cover_every_pod(objects: Sequence[Object]) -> list[str]:
    """In our namespace nothing is open that no policy opens; elsewhere nobody calls a pod of ours uninvited."""
    wrong = []
    policies = [found for found in objects if found["kind"] == "NetworkPolicy"]
    namespaces = {found["metadata"]["name"] for found in objects if found["kind"] == "Namespace"}
    for namespace in namespaces:
        mine = [p["spec"] for p in policies if p["metadata"]["namespace"] == namespace]
        denies = [p for p in mine if p["podSelector"] == {} and not {"ingress", "egress"} & set(p)]
        if not any(set(p["policyTypes"]) == {"Ingress", "Egress"} for p in denies):
            wrong.append(f"namespace {namespace}: no policy that denies all by default")
    for pod in pods(objects):
        directions = {
            direction
            for policy in policies
            if policy["metadata"]["namespace"] == pod.namespace and _matches(policy["spec"]["podSelector"], pod.labels)
            for direction in policy["spec"]["policyTypes"]
        }
        wanted = {"Ingress", "Egress"} if pod.namespace in namespaces else {"Ingress"}
        if not wanted <= directions:
            wrong.append(f"{pod.origin}: no policy for {', '.join(sorted(wanted - directions))}")
    for policy in policies:
        for rule in policy["spec"].get("ingress", []):
            if not rule.get("from"):
                wrong.append(f"{_name(policy)}: lets everyone in")
        for rule in policy["spec"].get("egress", []):
            if not rule.get("to") and not rule.get("ports"):
                wrong.append(f"{_name(policy)}: lets everything out")
    return wrong


def roles_grant_what_is_listed(objects: Sequence[Object]) -> list[str]:
    """A step manages InferenceServices of one namespace and reads why one failed; Spark's driver makes executors."""
    wrong = [f"{_name(found)}: of the whole cluster" for found in objects if found["kind"].startswith("ClusterRole")]
    for found in objects:
        for rule in found.get("rules", []) if found["kind"] == "Role" else []:
            spark = found["metadata"]["name"] == "evergreen-spark"
            for group in rule["apiGroups"]:
                for resource in rule["resources"]:
                    verbs = set(rule["verbs"]) - ALLOWED_RULES.get((group, resource), set())
                    if spark and group == "" and resource in SPARK_RULES:
                        verbs = {"*"} & set(rule["verbs"])
                    if (group, resource) == ("", "configmaps") and not spark and not rule.get("resourceNames"):
                        verbs = set(rule["verbs"])
                    if verbs:
                        wrong.append(f"{_name(found)}: {', '.join(sorted(verbs))} on {group}/{resource}")
    return wrong


def references_exist(objects: Sequence[Object]) -> list[str]:
    """Every Secret, ConfigMap, claim, account and role that is named is there, or is on the list of what is given."""
    known = {(o["kind"], o["metadata"].get("namespace"), o["metadata"]["name"]) for o in objects}
    wanted: list[tuple[str, str, str, str]] = []
    for pod in pods(objects):
        for path, value in _walk(pod.spec):
            last = re.sub(r"\[\d+\]$", "", path).rpartition(".")[2]
            if last in ("secretRef", "secretKeyRef"):
                wanted.append((pod.origin, "Secret", pod.namespace, value["name"]))
            elif last in ("configMapRef", "configMapKeyRef"):
                wanted.append((pod.origin, "ConfigMap", pod.namespace, value["name"]))
            elif last == "secretName":
                wanted.append((pod.origin, "Secret", pod.namespace, value))
            elif last == "claimName":
                wanted.append((pod.origin, "PersistentVolumeClaim", pod.namespace, value))
            elif last == "serviceAccountName":
                wanted.append((pod.origin, "ServiceAccount", pod.namespace, value))
    for found in objects:
        namespace = found["metadata"].get("namespace", "")
        if found["kind"] == "ServiceAccount":
            wanted += [(_name(found), "Secret", namespace, secret["name"]) for secret in found.get("secrets", [])]
        if found["kind"] == "RoleBinding":
            wanted.append((_name(found), found["roleRef"]["kind"], namespace, found["roleRef"]["name"]))
            wanted += [(_name(found), s["kind"], s.get("namespace", namespace), s["name"]) for s in found["subjects"]]
    return [
        f"{origin}: {kind} {name} is neither in {namespace} nor given"
        for origin, kind, namespace, name in wanted
        if (kind, namespace, name) not in known and (kind, name) not in GIVEN
    ]


def servers_have_probes_and_a_budget(objects: Sequence[Object]) -> list[str]:
    """What runs for long is probed, and a drained node takes one pod of it at a time."""
    wrong = []
    budgets = [found for found in objects if found["kind"] == "PodDisruptionBudget"]
    for pod in (pod for pod in pods(objects) if pod.serves):
        for container in pod.spec["containers"]:
            missing = {"startupProbe", "readinessProbe", "livenessProbe"} - set(container)
            wrong += [f"{pod.origin}, container {container['name']}: no {probe}" for probe in sorted(missing)]
        selecting = [
            b
            for b in budgets
            if b["metadata"]["namespace"] == pod.namespace and _matches(b["spec"]["selector"], pod.labels)
        ]
        if len(selecting) != 1:
            wrong.append(f"{pod.origin}: {len(selecting)} budgets, not one")
    return wrong


def variables_in_arguments_exist(objects: Sequence[Object]) -> list[str]:
    """`$(NAME)` of an argument is a variable of the container, else Kubernetes passes it on as it stands."""
    data = {(o["metadata"].get("namespace"), o["metadata"]["name"]): o for o in objects if o["kind"] == "ConfigMap"}
    wrong = []
    for pod, container, where in _containers(objects):
        known = {entry["name"] for entry in container.get("env", [])}
        for source in container.get("envFrom", []):
            if reference := source.get("configMapRef"):
                known |= set(data.get((pod.namespace, reference["name"]), {}).get("data", {}))
        used = {name for argument in container.get("args", []) for name in re.findall(r"\$\((\w+)\)", argument)}
        wrong += [f"{where}: there is no variable {name}" for name in sorted(used - known)]
    return wrong


POLICIES: tuple[Policy, ...] = (
    images_have_a_version,
    containers_have_requests_and_limits,
    pods_are_restricted,
    root_file_systems_are_read_only,
    no_secret_in_clear,
    selectors_name_no_version,
    network_policies_cover_every_pod,
    roles_grant_what_is_listed,
    references_exist,
    servers_have_probes_and_a_budget,
    variables_in_arguments_exist,
)
