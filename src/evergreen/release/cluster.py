"""The few things that a release asks of a cluster, by the Kubernetes API.

All of it lies in one namespace but for the questions about KServe itself (`why_no_split`), which a role may refuse.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, Self

from kubernetes import client, config  # type: ignore[import-untyped]
from kubernetes.client.rest import ApiException  # type: ignore[import-untyped]
from urllib3.exceptions import HTTPError

from evergreen.contracts.errors import EvergreenError

_KSERVE = ("serving.kserve.io", "v1beta1")
_KIND = "inferenceservices"
_ROUTES = ("gateway.networking.k8s.io", "v1")
_SECONDS = 30.0  # of one call
_MANAGER = "evergreen-release"
_OF_SERVICE = "serving.kserve.io/inferenceservice"
_CONTAINER = "kserve-container"
_SOURCE = "internal.serving.kserve.io/storage-initializer-sourceuri"
_NUM_EVENTS, _NUM_LOG_LINES = 10, 15
_STUCK = ("CrashLoopBackOff", "ImagePullBackOff", "ErrImagePull", "InvalidImageName", "CreateContainerConfigError")


class Cluster:
    """InferenceServices of one namespace, and the pods behind them."""

    def __init__(self, namespace: str, api: client.ApiClient) -> None:
        """Use a client that is connected; see `connect`."""
        self.namespace = namespace
        self._objects = client.CustomObjectsApi(api)
        self._core = client.CoreV1Api(api)
        self._api = api
        self.is_inside = False

    @classmethod
    def connect(cls, namespace: str) -> Self:
        """Connect as the pod's service account, or outside of a cluster by KUBECONFIG.

        Raises:
            EvergreenError: there is neither.
        """
        settings = client.Configuration()
        try:
            config.load_incluster_config(client_configuration=settings)
            inside = True
        except config.ConfigException:
            inside = False
            try:
                # Named outright: the library reads the variable when it is imported, and never again.
                config.load_kube_config(os.environ.get("KUBECONFIG"), client_configuration=settings)
            except (config.ConfigException, OSError) as error:
                raise EvergreenError(f"no cluster: not in a pod, and KUBECONFIG does not help: {error}") from error
        settings.retries = 3
        cluster = cls(namespace, client.ApiClient(settings))
        cluster.is_inside = inside
        return cluster

    def get(self, name: str) -> dict[str, Any] | None:
        """An InferenceService as it is; None where there is none."""
        found: dict[str, Any] | None = self._call(
            f"read InferenceService {name}",
            self._objects.get_namespaced_custom_object, *_KSERVE, self.namespace, _KIND, name, none_for=404,
        )  # fmt: skip
        return found

    def create(self, body: Mapping[str, Any]) -> None:
        """Create an InferenceService."""
        self._call(
            f"create InferenceService {body['metadata']['name']}",
            self._objects.create_namespaced_custom_object, *_KSERVE, self.namespace, _KIND, body,
            field_manager=_MANAGER,
        )  # fmt: skip

    def patch(self, name: str, body: Mapping[str, Any]) -> None:
        """Change fields of an InferenceService (JSON merge patch): what is null goes, what is not named stays."""
        self._call(
            f"patch InferenceService {name}",
            self._objects.patch_namespaced_custom_object, *_KSERVE, self.namespace, _KIND, name, body,
            field_manager=_MANAGER,
        )  # fmt: skip

    def delete(self, name: str) -> None:
        """Delete an InferenceService and all that it made; it may be gone already."""
        self._call(
            f"delete InferenceService {name}",
            self._objects.delete_namespaced_custom_object, *_KSERVE, self.namespace, _KIND, name,
            propagation_policy="Foreground", none_for=404,
        )  # fmt: skip

    def pods(self, name: str) -> list[Any]:
        """Pods of an InferenceService that are not on their way out."""
        found = self._call(
            f"list the pods of {name}",
            self._core.list_namespaced_pod, self.namespace, label_selector=f"{_OF_SERVICE}={name}",
        )  # fmt: skip
        return [pod for pod in found.items if pod.metadata.deletion_timestamp is None]

    def address(self, service: str) -> str | None:
        """URL of a Service: by its name in the cluster, by its address outside of it; None where there is none."""
        found = self._call(
            f"read Service {service}", self._core.read_namespaced_service, service, self.namespace, none_for=404
        )
        if found is None:
            return None
        port = found.spec.ports[0]
        headless = found.spec.cluster_ip == "None"
        host = f"{service}.{self.namespace}" if self.is_inside or headless else found.spec.cluster_ip
        # Without an address of its own nobody maps its port to the container's.
        return f"http://{host}:{port.target_port if headless else port.port}"

    def why_no_split(self) -> str | None:
        """Why this cluster sends no share of the traffic to a canary, in words; None where it seems to.

        KServe 0.20 has the field and makes no weights of it, so who uses it looks at `weights` in the end.
        """
        known = self._optional(self._discover, f"/openapi/v3/apis/{'/'.join(_KSERVE)}")
        if isinstance(known, str):
            return f"the schema of InferenceService cannot be read ({known})"
        [service] = [
            schema for name, schema in known["components"]["schemas"].items() if name.endswith(".InferenceService")
        ]
        if "canary" not in service["properties"]["spec"]["properties"]:
            return "this KServe has no spec.canary, which came with 0.20"
        settings = self._optional(self._core.read_namespaced_config_map, "inferenceservice-config", "kserve")
        if isinstance(settings, str):
            return f"kserve/inferenceservice-config cannot be read ({settings})"
        if not json.loads((settings.data or {}).get("ingress", "{}")).get("enableGatewayApi"):
            return "enableGatewayApi is not true in kserve/inferenceservice-config"
        routes = self._optional(self._discover, f"/apis/{'/'.join(_ROUTES)}")
        return f"there are no HTTPRoutes ({routes})" if isinstance(routes, str) else None

    def weights(self, service: str) -> list[int]:
        """Weights by which HTTPRoutes of the namespace send requests to a Service."""
        found = self._optional(self._objects.list_namespaced_custom_object, *_ROUTES, self.namespace, "httproutes")
        if isinstance(found, str):
            return []
        backends = [
            backend
            for route in found["items"]
            for rule in route["spec"].get("rules", [])
            for backend in rule.get("backendRefs", [])
        ]
        return [backend.get("weight", 1) for backend in backends if backend["name"] == service]

    def explain(self, name: str) -> str:
        """What is known of an InferenceService that does not come up: conditions, events, and logs of its pods."""
        lines = []
        for condition in ((self.get(name) or {}).get("status") or {}).get("conditions", []):
            if condition["status"] != "True":
                words = " ".join(filter(None, (condition.get("reason"), condition.get("message"))))
                lines.append(f"condition {condition['type']} is {condition['status']}: {words or 'no reason given'}")
        events = self._optional(self._core.list_namespaced_event, self.namespace)
        if isinstance(events, str):
            lines.append(f"events cannot be read ({events})")
        else:
            ours = [event for event in events.items if event.involved_object.name.startswith(name)]
            ours = [event for event in ours if event.type != "Normal"] or ours
            ours.sort(key=lambda event: event.last_timestamp or event.metadata.creation_timestamp)
            lines += [
                f"event of {event.involved_object.name}: {event.reason}: {event.message}"
                for event in ours[-_NUM_EVENTS:]
            ]
        for pod in self.pods(name):
            lines += self._log(pod)
        return "\n".join(f"  {line}" for line in lines or [f"no InferenceService {name}, no events, no pods"])

    def _log(self, pod: Any) -> list[str]:
        name, statuses = pod.metadata.name, pod.status.container_statuses or []
        restarted = any(status.restart_count for status in statuses)
        log = self._optional(
            self._core.read_namespaced_pod_log, name, self.namespace,
            container=_CONTAINER, tail_lines=_NUM_LOG_LINES, previous=restarted,
        )  # fmt: skip
        return [f"log of {name}:", *(f"  {line}" for line in log.splitlines())]

    def _discover(self, path: str, **options: Any) -> Any:
        """What the API server tells every account about itself."""
        return self._api.call_api(
            path, "GET", auth_settings=["BearerToken"], response_type=object, _return_http_data_only=True, **options
        )

    def _optional(self, call: Any, *arguments: Any, **options: Any) -> Any:
        """What a call gives, or why it gives nothing, in words."""
        try:
            return call(*arguments, **options, _request_timeout=_SECONDS)
        except ApiException as error:
            return f"HTTP {error.status} {error.reason}"
        except HTTPError as error:
            return str(error)

    def _call(self, what: str, call: Any, *arguments: Any, none_for: int | None = None, **options: Any) -> Any:
        try:
            return call(*arguments, **options, _request_timeout=_SECONDS)
        except ApiException as error:
            if error.status == none_for:
                return None
            try:
                words = json.loads(error.body)["message"]
            except (ValueError, KeyError, TypeError):
                words = error.body or ""
            raise EvergreenError(
                f"{self.namespace}: cannot {what}: HTTP {error.status} {error.reason}: {words}"
            ) from error
        except HTTPError as error:
            raise EvergreenError(f"{self.namespace}: cannot {what}: the cluster cannot be reached: {error}") from error


def source_of(pod: Any) -> str | None:
    """The storageUri that a pod was started with."""
    source: str | None = (pod.metadata.annotations or {}).get(_SOURCE)
    return source


def is_ready(pod: Any) -> bool:
    """Whether a pod takes requests."""
    return any(condition.type == "Ready" and condition.status == "True" for condition in pod.status.conditions or [])


def why_stuck(pod: Any) -> str | None:
    """Why a pod will not come up however long one waits, in words; None while it may."""
    for status in [*(pod.status.init_container_statuses or []), *(pod.status.container_statuses or [])]:
        waiting = status.state.waiting
        # A first crash may be of a volume or a network that is not there yet.
        if (
            waiting is not None
            and waiting.reason in _STUCK
            and (waiting.reason != _STUCK[0] or status.restart_count > 1)
        ):
            return f"{pod.metadata.name}: {waiting.reason}: {waiting.message or 'no message'}"
    return None
