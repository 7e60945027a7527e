"""KServe's data plane, honest about readiness, and what an error is called over HTTP.

What kserve 0.21 does by itself, and is mended here and in `endpoints`: `/v2/health/ready` is always true; a model that
is not ready is loaded inside a request; a broken V2 body gives 422; every 400 writes a stack trace to the log; an error
of its own is told with its class; a body may have any size; versions are refused.
"""

from __future__ import annotations

from typing import Any

from kserve.errors import (
    InvalidInput,
    ModelNotFound,
    ModelNotReady,
    ServerNotLive,
    ServerNotReady,
    UnsupportedProtocol,
)
from kserve.protocol.dataplane import DataPlane
from starlette.exceptions import HTTPException

from evergreen.contracts.errors import RequestError
from evergreen.serving.calls import UnknownVersionError, check_version

_MAX_ERROR_LENGTH = 1000
_STATUS = {
    UnknownVersionError: 404,
    RequestError: 400,
    InvalidInput: 400,
    ModelNotFound: 404,
    ModelNotReady: 503,
    ServerNotReady: 503,
    ServerNotLive: 503,
    NotImplementedError: 501,
    UnsupportedProtocol: 501,
}

KNOWN_ERRORS = tuple(_STATUS)
"""Errors that are told to the caller as they are."""


def error_of(error: Exception) -> tuple[int, str] | None:
    """HTTP status and text of an error that is told to the caller; None for a failure of ours."""
    if isinstance(error, HTTPException):
        return error.status_code, str(error.detail)
    for kind, status in _STATUS.items():
        if isinstance(error, kind):
            # A message may quote half a surrogate pair, which cannot be sent as UTF-8.
            text = str(error)[:_MAX_ERROR_LENGTH].encode("utf-8", "backslashreplace").decode()
            return status, text or "not offered"
    return None


class RecommenderDataPlane(DataPlane):  # type: ignore[misc]  # kserve has no type information
    """KServe's data plane for `predictor.RecommenderModel`s."""

    draining: bool = False
    """Whether the server is about to stop: not ready any more, but still answering."""

    def metadata(self) -> dict[str, Any]:
        """Server metadata: name, version, protocol extensions."""
        metadata: dict[str, Any] = super().metadata()
        return metadata | {"extensions": ["binary_tensor_data", "model_repository"]}

    async def get_model(self, name: str) -> Any:
        """A model that is ready.

        Raises:
            ModelNotFound: there is no such model.
            ModelNotReady: it is not loaded.
        """
        model = self.get_model_from_registry(name)
        if not model.ready:
            raise ModelNotReady(name)
        return model

    async def model_metadata(self, model_name: str, version: str | None = None) -> dict[str, Any]:
        """Model metadata: name, version, inputs and outputs.

        Raises:
            UnknownVersionError: another version is served.
        """
        self.check_version(model_name, version)
        metadata: dict[str, Any] = await super().model_metadata(model_name)
        return metadata | {"platform": "evergreen", "versions": [self._recommender(model_name).model_version]}

    async def model_ready(
        self, model_name: str, disable_predictor_health_check: bool = False, version: str | None = None
    ) -> bool:
        """Whether a model is loaded, and the server is not about to stop.

        Raises:
            UnknownVersionError: another version is served.
        """
        ready = bool(self.get_model_from_registry(model_name).ready) and not self.draining
        if ready:
            self.check_version(model_name, version)
        return ready

    async def ready(self) -> bool:
        """Whether every model is loaded, and the server is not about to stop."""
        models = self.model_registry.get_models()
        return not self.draining and bool(models) and all(model.ready for model in models.values())

    def check_version(self, model_name: str, version: str | None) -> None:
        """Raise UnknownVersionError unless this version of a model is served, or none is named."""
        check_version(version, self._recommender(model_name))

    def _recommender(self, model_name: str) -> Any:
        return self.get_model_from_registry(model_name).slot.recommender
