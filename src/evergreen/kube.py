"""The Kubernetes API of one namespace, with errors for people: what steps that make objects there have in common."""

from __future__ import annotations

import json
import os
from typing import Any, Self

from kubernetes import client, config  # type: ignore[import-untyped]
from kubernetes.client.rest import ApiException  # type: ignore[import-untyped]
from urllib3.exceptions import HTTPError

from evergreen.contracts.errors import EvergreenError

_SECONDS = 30.0  # of one call
_NUM_EVENTS, _NUM_LOG_LINES = 10, 15
_STUCK = ("CrashLoopBackOff", "ImagePullBackOff", "ErrImagePull", "InvalidImageName", "CreateContainerConfigError")


class Namespace:
    """A namespace of a cluster; what builds on it knows its own kinds."""

    def __init__(self, name: str, api: client.ApiClient) -> None:
        """Use a client that is connected; see `connect`."""
        self.namespace = name
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
        connected = cls(namespace, client.ApiClient(settings))
        connected.is_inside = inside
        return connected

    def select_pods(self, label: str, value: str) -> list[Any]:
        """Pods with a label that are not on their way out."""
        found = self.call(
            f"list the pods of {value}",
            self._core.list_namespaced_pod, self.namespace, label_selector=f"{label}={value}",
        )  # fmt: skip
        return [pod for pod in found.items if pod.metadata.deletion_timestamp is None]

    def events(self, name: str) -> list[str]:
        """What was told of the objects whose names begin so, in words, the newest last; warnings first of all."""
        events = self.optional(self._core.list_namespaced_event, self.namespace)
        if isinstance(events, str):
            return [f"events cannot be read ({events})"]
        ours = [event for event in events.items if event.involved_object.name.startswith(name)]
        ours = [event for event in ours if event.type != "Normal"] or ours
        ours.sort(key=lambda event: event.last_timestamp or event.metadata.creation_timestamp)
        return [
            f"event of {event.involved_object.name}: {event.reason}: {event.message}" for event in ours[-_NUM_EVENTS:]
        ]

    def log(self, pod: Any, container: str) -> list[str]:
        """The end of a container's log; of its last life if it has begun another one."""
        name, statuses = pod.metadata.name, pod.status.container_statuses or []
        restarted = any(status.restart_count for status in statuses)
        log = self.optional(
            self._core.read_namespaced_pod_log, name, self.namespace,
            container=container, tail_lines=_NUM_LOG_LINES, previous=restarted,
        )  # fmt: skip
        return [f"log of {name}:", *(f"  {line}" for line in log.splitlines())]

    def optional(self, call: Any, *arguments: Any, **options: Any) -> Any:
        """What a call gives, or why it gives nothing, in words."""
        try:
            return call(*arguments, **options, _request_timeout=_SECONDS)
        except ApiException as error:
            return f"HTTP {error.status} {error.reason}"
        except HTTPError as error:
            return str(error)

    def call(self, what: str, call: Any, *arguments: Any, none_for: int | None = None, **options: Any) -> Any:
        """What a call gives; None for one status that is no error.

        Raises:
            EvergreenError: what could not be done, where, and what the cluster says.
        """
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


def unmet_conditions(found: dict[str, Any] | None) -> list[str]:
    """Conditions of an object that are not true, in words."""
    lines = []
    for condition in ((found or {}).get("status") or {}).get("conditions", []):
        if condition["status"] != "True":
            words = " ".join(filter(None, (condition.get("reason"), condition.get("message"))))
            lines.append(f"condition {condition['type']} is {condition['status']}: {words or 'no reason given'}")
    return lines


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
