"""As much of a Kubernetes API server, and of KServe and Kubeflow Trainer behind it, as our steps ask for.

Real clusters are in tests/cluster. This one splits traffic by the Gateway API, refuses what a role does not allow, or
never gets ready, as its test chooses; the real client talks to it over a real connection. It also answers as the models
behind its Services: of the users at 127.0.0.1, and of a canary at 127.0.0.2; and what a TrainJob is to run, it runs.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

_SERVICES = "/apis/serving.kserve.io/v1beta1/namespaces/evergreen/inferenceservices"
_TRAIN_JOBS = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/evergreen/trainjobs"
_OF_SERVICE, _OF_JOB = "serving.kserve.io/inferenceservice", "jobset.sigs.k8s.io/jobset-name"
_USERS_HOST, _CANARY_HOST = "127.0.0.1", "127.0.0.2"
_SOURCE = "internal.serving.kserve.io/storage-initializer-sourceuri"


class KubeApi(ThreadingHTTPServer):
    """Its state: InferenceServices by name, and what the cluster can do."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("0.0.0.0", 0), _Handler)
        self.services: dict[str, dict[str, Any]] = {}
        self.changes: list[str] = []
        """Every request that changed something, in order."""
        self.has_canary_field = True
        self.has_gateway = False
        self.makes_weights = True
        self.asked: list[tuple[str, dict[str, Any]]] = []
        """Address and instance of each prediction."""
        self.forbidden: set[str] = set()
        """Paths that end so are answered with 403."""
        self.never_ready: set[str] = set()
        """storageUris whose pods crash."""
        self.train_jobs: dict[str, dict[str, Any]] = {}
        self.run_node: Callable[[dict[str, Any]], tuple[int, str]] | None = None
        """Runs what a TrainJob says: exit status and log. None: there is no node for it."""
        self.logs: dict[str, str] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def reconcile(self, service: dict[str, Any]) -> dict[str, Any]:
        """What KServe's controller would write."""
        meta, predictor = service["metadata"], service["spec"]["predictor"]
        meta["generation"] = meta.get("generation", 0) + 1
        ready = predictor["model"].get("storageUri") not in self.never_ready
        status = "True" if ready else "False"
        condition = {"type": "Ready", "status": status, "reason": "MinimumReplicasUnavailable"}
        service["status"] = {"observedGeneration": 1, "conditions": [condition]}
        if canaries := service["spec"].get("canary"):
            names = [canary["predictor"]["name"] for canary in canaries]
            service["status"]["canaryStatuses"] = [{"name": name, "ready": True} for name in names]
        return service

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        """Status and body."""
        if any(path.endswith(end) for end in self.forbidden):
            return 403, {"message": f"may not {method} {path}"}
        if path.startswith(_SERVICES):
            return self._service(method, path.removeprefix(_SERVICES).strip("/"), body)
        if path.startswith(_TRAIN_JOBS):
            return self._train_job(method, path.removeprefix(_TRAIN_JOBS).strip("/"), body)
        found = self._read(path)
        return (404, {"message": f"no {path}"}) if found is None else (200, found)

    def _service(self, method: str, name: str, body: Any) -> tuple[int, Any]:
        if method == "POST":
            name = body["metadata"]["name"]
            self.services[name] = self.reconcile(body)
        elif name not in self.services:
            return 404, {"message": f"no InferenceService {name}"}
        elif method == "PATCH":
            before = json.dumps(self.services[name]["spec"])
            _merge(self.services[name], body)
            if json.dumps(self.services[name]["spec"]) != before:
                self.reconcile(self.services[name])
        if method != "GET":
            self.changes.append(f"{method} {name}")
        return 200, self.services.pop(name) if method == "DELETE" else self.services[name]

    def _train_job(self, method: str, name: str, body: Any) -> tuple[int, Any]:
        if method == "POST":
            name = body["metadata"]["name"]
            if name in self.train_jobs:
                return 409, {"message": f"{name} exists"}
            self.train_jobs[name] = body
            if self.run_node is not None:
                threading.Thread(target=self._run, args=(name, self.run_node), daemon=True).start()
        elif name not in self.train_jobs:
            return 404, {"message": f"no TrainJob {name}"}
        if method != "GET":
            self.changes.append(f"{method} {name}")
        return 200, self.train_jobs.pop(name) if method == "DELETE" else self.train_jobs[name]

    def _run(self, name: str, run_node: Callable[[dict[str, Any]], tuple[int, str]]) -> None:
        code, self.logs[f"{name}-node-0-0"] = run_node(self.train_jobs[name])
        end = {"type": "Failed" if code else "Complete", "status": "True", "message": f"jobs ended with {code}"}
        self.train_jobs[name]["status"] = {"conditions": [end]}

    def model(self, host: str, body: Any) -> Any:
        """What a model server says of itself, or of the one instance that it is asked about."""
        users = self.services["evergreen"]["spec"]
        of = users["predictor"]
        if host == _CANARY_HOST:
            second = self.services.get("evergreen-canary")
            of = second["spec"]["predictor"] if second else users["canary"][0]["predictor"]
        version = of["model"]["storageUri"].rpartition("/")[2]
        if body is None:
            return {"name": "evergreen", "versions": [version]}
        [instance] = body["instances"]
        self.asked.append((host, instance))
        items = [{"item_id": item, "probability": 0.1} for item in instance.get("candidates", ["i"])]
        return {"predictions": [{"model_version": version, "degraded": False, "items": items}]}

    def _read(self, path: str) -> Any:
        if path.endswith("/pods"):
            servers = [_pod(name, one, self) for name, one in self.services.items()]
            return {
                "items": servers + [node for name, job in self.train_jobs.items() for node in _nodes(name, job, self)]
            }
        if path.endswith("/log"):
            return self.logs.get(path.split("/")[-2], "the weights are damaged")
        if path.endswith("/events"):
            return {"items": []}
        if "/services/" in path:
            port = {"port": self.server_address[1], "targetPort": 8080}
            host = _CANARY_HOST if path.endswith("/evergreen-canary-predictor") else _USERS_HOST
            return {"spec": {"clusterIP": host, "ports": [port]}}
        if path.startswith("/openapi"):
            properties = {"predictor": {}, **({"canary": {}} if self.has_canary_field else {})}
            schema = {"properties": {"spec": {"properties": properties}}}
            return {"components": {"schemas": {"io.kserve.serving.v1beta1.InferenceService": schema}}}
        if path.endswith("/configmaps/inferenceservice-config"):
            return {"data": {"ingress": json.dumps({"enableGatewayApi": self.has_gateway})}}
        if path.endswith("/httproutes"):
            shares = [canary for one in self.services.values() for canary in one["spec"].get("canary") or ()]
            refs = [{"name": "evergreen-canary-predictor", "weight": one["trafficPercent"]} for one in shares]
            return {"items": [{"spec": {"rules": [{"backendRefs": refs if self.makes_weights else []}]}}]}
        return {"resources": []} if path == "/apis/gateway.networking.k8s.io/v1" and self.has_gateway else None


def _merge(target: dict[str, Any], change: dict[str, Any]) -> None:
    """JSON merge patch, RFC 7386."""
    for key, value in change.items():
        if value is None:
            target.pop(key, None)
        elif isinstance(value, dict):
            _merge(target.setdefault(key, {}), value)
        else:
            target[key] = value


def _pod(name: str, service: dict[str, Any], api: KubeApi) -> dict[str, Any]:
    uri = service["spec"]["predictor"]["model"].get("storageUri")
    crashes = uri in api.never_ready
    waiting = {"reason": "CrashLoopBackOff", "message": "back-off"} if crashes else None
    container = {"name": "kserve-container", "image": "i", "imageID": "i", "ready": not crashes}
    container |= {"restartCount": 3 if crashes else 0, "state": {"waiting": waiting}}
    return {
        "metadata": {
            "name": f"{name}-predictor-1",
            "labels": {_OF_SERVICE: name},
            "annotations": {_SOURCE: uri},
        },
        "status": {
            "conditions": [{"type": "Ready", "status": "False" if crashes else "True"}],
            "containerStatuses": [container],
        },
    }


def _nodes(name: str, job: dict[str, Any], api: KubeApi) -> list[dict[str, Any]]:
    return [
        {
            "metadata": {
                "name": f"{name}-node-0-{index}",
                "labels": {_OF_JOB: name, "batch.kubernetes.io/job-completion-index": str(index)},
            },
            "status": {"phase": "Running" if api.run_node else "Pending"},
        }
        for index in range(job["spec"]["trainer"]["numNodes"])
    ]


class _Handler(BaseHTTPRequestHandler):
    server: KubeApi

    def _do(self) -> None:
        parts = urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        if "/models/evergreen" in parts.path:
            status, answer = 200, self.server.model(self.headers["Host"].partition(":")[0], body)
        else:
            status, answer = self.server.answer(self.command, parts.path, body)
        if status == 200 and parts.path.endswith("/pods"):
            key, _, wanted = parse_qs(parts.query)["labelSelector"][0].partition("=")
            answer = {"items": [pod for pod in answer["items"] if pod["metadata"]["labels"].get(key) == wanted]}
        payload = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    do_GET = do_POST = do_PATCH = do_DELETE = _do  # noqa: N815  (the names that the base class calls)

    def log_message(self, format: str, *args: Any) -> None:
        """Tests have no use for the access log."""


@contextmanager
def kube_api() -> Iterator[KubeApi]:
    """A cluster on a free port of this machine, for the time of a test."""
    with KubeApi() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
