"""The few things that a release asks of a cluster, by the Kubernetes API.

All of it lies in one namespace but for the questions about KServe itself (`why_no_split`), which a role may refuse.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from evergreen.kube import Namespace, unmet_conditions

_KSERVE = ("serving.kserve.io", "v1beta1")
_KIND = "inferenceservices"
_ROUTES = ("gateway.networking.k8s.io", "v1")
_MANAGER = "evergreen-release"
_OF_SERVICE = "serving.kserve.io/inferenceservice"
_CONTAINER = "kserve-container"
_SOURCE = "internal.serving.kserve.io/storage-initializer-sourceuri"


class Cluster(Namespace):
    """InferenceServices of one namespace, and the pods behind them."""

    def get(self, name: str) -> dict[str, Any] | None:
        """An InferenceService as it is; None where there is none."""
        found: dict[str, Any] | None = self.call(
            f"read InferenceService {name}",
            self._objects.get_namespaced_custom_object, *_KSERVE, self.namespace, _KIND, name, none_for=404,
        )  # fmt: skip
        return found

    def create(self, body: Mapping[str, Any]) -> None:
        """Create an InferenceService."""
        self.call(
            f"create InferenceService {body['metadata']['name']}",
            self._objects.create_namespaced_custom_object, *_KSERVE, self.namespace, _KIND, body,
            field_manager=_MANAGER,
        )  # fmt: skip

    def patch(self, name: str, body: Mapping[str, Any]) -> None:
        """Change fields of an InferenceService (JSON merge patch): what is null goes, what is not named stays."""
        self.call(
            f"patch InferenceService {name}",
            self._objects.patch_namespaced_custom_object, *_KSERVE, self.namespace, _KIND, name, body,
            field_manager=_MANAGER,
        )  # fmt: skip

    def delete(self, name: str) -> None:
        """Delete an InferenceService and all that it made; it may be gone already."""
        self.call(
            f"delete InferenceService {name}",
            self._objects.delete_namespaced_custom_object, *_KSERVE, self.namespace, _KIND, name,
            propagation_policy="Foreground", none_for=404,
        )  # fmt: skip

    def pods(self, name: str) -> list[Any]:
        """Pods of an InferenceService that are not on their way out."""
        return self.select_pods(_OF_SERVICE, name)

    def address(self, service: str) -> str | None:
        """URL of a Service: by its name in the cluster, by its address outside of it; None where there is none."""
        found = self.call(
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
        known = self.optional(self._discover, f"/openapi/v3/apis/{'/'.join(_KSERVE)}")
        if isinstance(known, str):
            return f"the schema of InferenceService cannot be read ({known})"
        [service] = [
            schema for name, schema in known["components"]["schemas"].items() if name.endswith(".InferenceService")
        ]
        if "canary" not in service["properties"]["spec"]["properties"]:
            return "this KServe has no spec.canary, which came with 0.20"
        settings = self.optional(self._core.read_namespaced_config_map, "inferenceservice-config", "kserve")
        if isinstance(settings, str):
            return f"kserve/inferenceservice-config cannot be read ({settings})"
        if not json.loads((settings.data or {}).get("ingress", "{}")).get("enableGatewayApi"):
            return "enableGatewayApi is not true in kserve/inferenceservice-config"
        routes = self.optional(self._discover, f"/apis/{'/'.join(_ROUTES)}")
        return f"there are no HTTPRoutes ({routes})" if isinstance(routes, str) else None

    def weights(self, service: str) -> list[int]:
        """Weights by which HTTPRoutes of the namespace send requests to a Service."""
        found = self.optional(self._objects.list_namespaced_custom_object, *_ROUTES, self.namespace, "httproutes")
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
        lines = [*unmet_conditions(self.get(name)), *self.events(name)]
        for pod in self.pods(name):
            lines += self.log(pod, _CONTAINER)
        return "\n".join(f"  {line}" for line in lines or [f"no InferenceService {name}, no events, no pods"])

    def _discover(self, path: str, **options: Any) -> Any:
        """What the API server tells every account about itself."""
        return self._api.call_api(
            path, "GET", auth_settings=["BearerToken"], response_type=object, _return_http_data_only=True, **options
        )


def source_of(pod: Any) -> str | None:
    """The storageUri that a pod was started with."""
    source: str | None = (pod.metadata.annotations or {}).get(_SOURCE)
    return source
