"""Releases by KServe: a version serves when the InferenceService names its bundle and answers with it.

In Standard mode KServe ignores `canaryTrafficPercent`, and sends a share of the requests to `spec.canary` only by an
HTTPRoute of the Gateway API. So the cluster is asked what it does. Where it cannot split, the canary is a second
InferenceService that is asked the newest logged requests, and of which users see nothing. Either way it is gone in the
end, and the report says which way it was.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx

from evergreen.contracts.errors import ArtifactError, EvergreenError
from evergreen.contracts.release import CanaryReport
from evergreen.kube import is_ready, why_stuck
from evergreen.release.bundle import ModelStore
from evergreen.release.canary import CanaryConfig, not_started, run_canary
from evergreen.release.cluster import Cluster, source_of

VERSION_LABEL = "evergreen/model-version"

_POLL_SECONDS = 2.0
_ANSWERS = 5  # in a row, each over a connection of its own: an old pod may still be behind the Service
_ROUTE_SECONDS = 60.0
_GONE_SECONDS = 180.0
_SMOKE = {"user_id": "evergreen-smoke", "k": 1, "shown": False}
# A canary has as many replicas as it is told, whatever the InferenceService of the users does.
_SCALING = ("minReplicas", "maxReplicas", "scaleTarget", "scaleMetric", "scaleMetricType", "autoScaling")

_Found = TypeVar("_Found")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServiceConfig:
    """Which InferenceService, and how patient a release is with it."""

    name: str = "evergreen"
    model_name: str = "evergreen"
    """In URLs; the same on a canary."""
    runtime: str = "evergreen"
    service_account: str = "evergreen-server"
    ready_seconds: float = 600.0
    """From a new bundle to a pod that answers with it: image, download, start."""
    canary_percent: int = 10
    """Of the users' requests, where traffic can be split."""


class InferenceServer:
    """The InferenceService that users ask. What it is told, it is told again without harm."""

    def __init__(
        self, cluster: Cluster, models: ModelStore, config: ServiceConfig | None = None, *, token_file: str = ""
    ) -> None:
        """Name a server; nothing is asked yet.

        Args:
            cluster: its namespace.
            models: where bundles are.
            config: which InferenceService.
            token_file: its first word is the bearer token that the server asks for; empty, or no such file: none.
        """
        self._cluster, self.models = cluster, models
        self._config = config or ServiceConfig()
        token = Path(token_file)
        self._headers = (
            {"Authorization": f"Bearer {token.read_text().split()[0]}"} if token_file and token.is_file() else {}
        )

    @classmethod
    def connect(
        cls, name: str, namespace: str, model_store: str, model_store_path: str = "", *, token_file: str = ""
    ) -> Self:
        """The server that the parameters of a pipeline name.

        Raises:
            ArtifactError: the store of models is no store.
            EvergreenError: there is no cluster.
        """
        models = ModelStore(model_store, model_store_path)
        return cls(Cluster.connect(namespace), models, ServiceConfig(name=name), token_file=token_file)

    @property
    def serving(self) -> str | None:
        """The version that the InferenceService was told last; None where there is none."""
        found = self._cluster.get(self._config.name) or {}
        version: str | None = found.get("metadata", {}).get("labels", {}).get(VERSION_LABEL)
        return version

    def serve(self, version: str) -> None:
        """Let a version serve: create or patch the InferenceService, and wait until nothing else answers.

        Raises:
            ArtifactError: there is no whole bundle of this version.
            EvergreenError: it does not come up; with conditions, events and logs. What served before goes on serving.
        """
        uri = self._uri(version)
        name, found = self._config.name, self._cluster.get(self._config.name)
        if found is None:
            self._cluster.create(self._manifest(name, uri, version))
        else:
            change = {
                "metadata": {"labels": {VERSION_LABEL: version}},
                "spec": {"canary": None, "predictor": {"model": {"runtime": self._config.runtime, "storageUri": uri}}},
            }
            self._cluster.patch(name, change)
        self._remove_second()
        self._wait_until_up(name, uri)
        self._wait_for_answers(version)

    def try_out(
        self,
        version: str,
        requests: Sequence[Mapping[str, Any]],
        *,
        expected_ratio: float = 1.0,
        config: CanaryConfig | None = None,
    ) -> CanaryReport:
        """Ask a version and the one that serves the same requests. No answer is shown to anybody, or logged as shown.

        Args:
            version: the challenger, whose bundle is there.
            requests: see `replay.logged_requests`.
            expected_ratio: see `canary.run_canary`, like `config`.

        Returns:
            What was seen, and in which way; of a challenger that does not come up, why.

        Raises:
            ArtifactError: there is no whole bundle of this version.
            EvergreenError: the champion cannot be reached.
        """
        uri, champion = self._uri(version), self.serving
        with ExitStack() as stack:
            try:
                url, way = stack.enter_context(self._canary(version, uri))
            except EvergreenError as error:
                return not_started(version, champion, str(error))
            logger.info("canary of %s: %s", version, way)
            challenger = stack.enter_context(self._client(url))
            users_own = stack.enter_context(self._client(self._url(self._config.name)))
            asked = [{**request, "shown": False} for request in requests]
            seen = run_canary(
                challenger,
                users_own,
                asked,
                model_name=self._config.model_name,
                expected_ratio=expected_ratio,
                config=config,
            )
        return seen.model_copy(update={"way": way})

    @contextmanager
    def _canary(self, version: str, uri: str) -> Iterator[tuple[str, str]]:
        """A canary's URL, and which way it is one; it is gone when the block ends, however it ends."""
        reason = self._cluster.why_no_split()
        if reason is None:
            name = f"{self._config.name}-canary"
            try:
                self._cluster.patch(self._config.name, {"spec": {"canary": [self._canary_spec(uri)]}})
                self._wait(
                    f"the canary of {self._config.name}",
                    self._config.ready_seconds,
                    lambda: self._canary_is_ready() or None,
                )
                if self._shares():
                    share = f"{self._config.canary_percent} % of the users' requests by HTTPRoute, and the logged ones"
                    yield self._url(name), share
                    return
            finally:
                self._cluster.patch(self._config.name, {"spec": {"canary": None}})
            reason = "this KServe makes no weighted HTTPRoute of spec.canary"
        try:
            yield self._second(version, uri), f"a second InferenceService, asked the logged requests: {reason}"
        finally:
            self._remove_second()

    def _canary_spec(self, uri: str) -> dict[str, Any]:
        champion = self._cluster.get(self._config.name)
        if champion is None:
            raise EvergreenError(f"there is no InferenceService {self._config.name} to be the canary of")
        model = copy.deepcopy(champion["spec"]["predictor"]["model"])
        return {
            "trafficPercent": self._config.canary_percent,
            "predictor": {"name": "canary", "minReplicas": 1, "model": {**model, "storageUri": uri}},
        }

    def _canary_is_ready(self) -> bool:
        status = (self._cluster.get(self._config.name) or {}).get("status") or {}
        return any(canary["name"] == "canary" and canary.get("ready") for canary in status.get("canaryStatuses", []))

    def _shares(self) -> bool:
        """Whether requests really are shared out; the route comes after the pods."""
        deadline = time.monotonic() + _ROUTE_SECONDS
        while not any(self._cluster.weights(f"{self._config.name}-canary-predictor")):
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def _second(self, version: str, uri: str) -> str:
        """An InferenceService like the users' with one replica of another version; its URL."""
        name, champion = self._second_name, self._cluster.get(self._config.name)
        body = self._manifest(name, uri, version)
        if champion is not None:
            body["metadata"]["labels"] = champion["metadata"].get("labels", {}) | body["metadata"]["labels"]
            predictor = copy.deepcopy(champion["spec"]["predictor"])
            predictor["model"] |= body["spec"]["predictor"]["model"]
            body["spec"]["predictor"] = {key: value for key, value in predictor.items() if key not in _SCALING}
        body["metadata"]["annotations"] = {"serving.kserve.io/autoscalerClass": "none"}
        body["spec"]["predictor"]["minReplicas"] = 1
        if self._cluster.get(name) is not None:  # a run that was killed left it, and it may be of another version
            self._remove_second()
        self._cluster.create(body)
        self._wait_until_up(name, uri)
        return self._url(name)

    @property
    def _second_name(self) -> str:
        return f"{self._config.name}-canary"

    def _remove_second(self) -> None:
        """Delete the second InferenceService, and wait until its last pod has gone."""
        name = self._second_name
        if self._cluster.get(name) is None:
            return
        self._cluster.delete(name)
        self._wait(
            f"the end of {name}",
            _GONE_SECONDS,
            lambda: (self._cluster.get(name) is None and not self._cluster.pods(name)) or None,
            explain=name,
        )

    def _uri(self, version: str) -> str:
        if not self.models.has(version):
            raise ArtifactError(f"{self.models.storage_uri(version)}: no whole bundle there: write it first")
        return self.models.storage_uri(version)

    def _manifest(self, name: str, uri: str, version: str) -> dict[str, Any]:
        model = {
            "modelFormat": {"name": "evergreen", "version": "1"},
            "runtime": self._config.runtime,
            "storageUri": uri,
        }
        return {
            "apiVersion": "serving.kserve.io/v1beta1",
            "kind": "InferenceService",
            "metadata": {
                "name": name,
                "namespace": self._cluster.namespace,
                "labels": {"app.kubernetes.io/part-of": "evergreen", VERSION_LABEL: version},
            },
            "spec": {"predictor": {"serviceAccountName": self._config.service_account, "model": model}},
        }

    def _wait_until_up(self, name: str, uri: str) -> None:
        """Until the InferenceService is ready, and every pod of it is of this bundle and ready.

        The pods tell a finished roll-out: KServe says Ready all the while, and its observedGeneration stays behind.
        """

        def up() -> bool | None:
            pods = self._cluster.pods(name)
            ours = [pod for pod in pods if source_of(pod) == uri]
            for stuck in filter(None, map(why_stuck, ours)):
                raise EvergreenError(f"InferenceService {name}: {stuck}\n{self._cluster.explain(name)}")
            if not ours or len(ours) < len(pods) or not all(map(is_ready, ours)):
                return None
            status = (self._cluster.get(name) or {}).get("status") or {}
            ready = [condition for condition in status.get("conditions", []) if condition["type"] == "Ready"]
            return any(condition["status"] == "True" for condition in ready) or None

        self._wait(f"InferenceService {name} with {uri}", self._config.ready_seconds, up, explain=name)

    def _wait_for_answers(self, version: str) -> None:
        """Until the version, and no other, answers the users, and with a recommendation."""
        name, model = self._config.name, self._config.model_name
        url = self._url(name)

        def answers() -> bool | None:
            try:
                with self._client(url) as client:
                    client.headers["Connection"] = "close"
                    for _ in range(_ANSWERS):
                        told = client.get(f"/v2/models/{model}")
                        if version not in told.raise_for_status().json().get("versions", []):
                            return None
                    body = {"instances": [_SMOKE]}
                    return client.post(f"/v1/models/{model}:predict", json=body).raise_for_status().is_success
            except (httpx.HTTPError, ValueError):
                return None

        self._wait(f"{url} to answer with {version}", self._config.ready_seconds, answers, explain=name)

    def _wait(
        self, what: str, seconds: float, look: Callable[[], _Found | None], *, explain: str | None = None
    ) -> _Found:
        deadline = time.monotonic() + seconds
        while (found := look()) is None:
            if time.monotonic() > deadline:
                raise EvergreenError(
                    f"waited {seconds:g} s for {what}, in vain\n{self._cluster.explain(explain or self._config.name)}"
                )
            time.sleep(_POLL_SECONDS)
        return found

    def _url(self, name: str) -> str:
        service = f"{name}-predictor"
        if (url := self._cluster.address(service)) is None:
            raise EvergreenError(f"{self._cluster.namespace}: no Service {service}: KServe in Standard mode makes one")
        return url

    def _client(self, url: str) -> httpx.Client:
        # Named outright, so the proxies of the environment are not asked.
        return httpx.Client(base_url=url, headers=self._headers, trust_env=False, timeout=10.0)
