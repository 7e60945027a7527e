"""KServe's HTTP protocols with a caller's mistake answered as one: 400, what is wrong and where, no stack trace.

What kserve 0.21 does by itself, and is mended here: a broken V2 body gives 422; a broken binary body, and some headers,
give 500; every 400 writes a stack trace to the log; `application/json; charset=utf-8` is not taken for JSON;
`/v2/health/ready` is always true; anyone may unload the model over HTTP; a body may have any size.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

import fastapi
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from kserve.errors import InvalidInput, ModelNotFound, ModelNotReady
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.model_repository_extension import ModelRepositoryExtension
from starlette.exceptions import HTTPException
from starlette.middleware.body_limit import RequestBodyLimitMiddleware

from evergreen.contracts.errors import RequestError

MAX_BODY_BYTES = 4 * 1024 * 1024
"""Enough for 64 requests with 500 candidates of 100 bytes each."""

_JSON = "application/json"
_CURL_DEFAULT = "application/x-www-form-urlencoded"
_NO_REQUEST = 'the body is no inference request: send {"inputs": [...]} as JSON (binary tensor data is not offered)'


class RecommenderDataPlane(DataPlane):  # type: ignore[misc]  # kserve has no type information
    """KServe's data plane, strict about what comes in and honest about readiness."""

    def decode(
        self, body: Any, headers: dict[str, str], protocol_version: str = "v1", model_name: str | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Decode a body.

        Raises:
            RequestError: the content type or the body is not what the protocol asks for.
        """
        if isinstance(body, bytes):
            _check_media_type(headers)
            headers = headers | {"content-type": _JSON}
        try:
            decoded: tuple[Any, dict[str, Any]] = super().decode(body, headers, protocol_version, model_name)
        except InvalidInput as error:
            raise RequestError(str(error)) from error
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            # CloudEvents of a broken form; kserve lets these through as its own fault.
            raise RequestError(f"the body or its headers cannot be decoded: {error}") from error
        return decoded

    def decode_inference_request(self, body: Any, headers: dict[str, str], model_name: str) -> Any:
        """Decode a V2 body.

        Raises:
            RequestError: it is not JSON.
        """
        if isinstance(body, bytes):
            raise RequestError(_NO_REQUEST)
        return super().decode_inference_request(body, headers, model_name)

    def metadata(self) -> dict[str, Any]:
        """Server metadata: name, version, and no protocol extension."""
        metadata: dict[str, Any] = super().metadata()
        return metadata | {"extensions": []}

    async def model_metadata(self, model_name: str) -> dict[str, Any]:
        """Model metadata: name, version, inputs and outputs."""
        metadata: dict[str, Any] = await super().model_metadata(model_name)
        version = self.get_model_from_registry(model_name).recommender.model_version
        return metadata | {"platform": "evergreen", "versions": [version]}

    async def ready(self) -> bool:
        """Whether every model is loaded."""
        models = self.model_registry.get_models()
        return bool(models) and all([await model.healthy() for model in models.values()])


class FixedRepository(ModelRepositoryExtension):  # type: ignore[misc]  # kserve has no type information
    """Refuses to load and unload over HTTP: another model is another deployment."""

    async def load(self, model_name: str) -> None:
        """Refuse."""
        raise HTTPException(403, "models are not loaded over HTTP: deploy the other package")

    async def unload(self, model_name: str) -> None:
        """Refuse."""
        raise HTTPException(403, "models are not unloaded over HTTP: delete the deployment")


def install_handlers(app: fastapi.FastAPI) -> None:
    """Answer errors as `{"error": "…"}` with the right status, and bound the size of a body."""
    app.add_middleware(RequestBodyLimitMiddleware, max_body_size=MAX_BODY_BYTES)
    app.add_exception_handler(RequestError, _bad_request)
    app.add_exception_handler(RequestValidationError, _bad_request)
    app.add_exception_handler(HTTPException, _http_error)


class CallerMistakes(logging.Filter):
    """Keeps a caller's mistakes out of the log: kserve writes a stack trace for each, and anyone can make them."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to keep a record."""
        error = record.exc_info[1] if record.exc_info else None
        return not isinstance(error, InvalidInput | ModelNotFound | ModelNotReady | NotImplementedError)


def error_response(status: int, message: str) -> JSONResponse:
    """An error in KServe's form."""
    # A message may quote half a surrogate pair, which cannot be sent as UTF-8.
    text = message.encode("utf-8", "backslashreplace").decode()
    return JSONResponse({"error": text}, status_code=status)


async def _bad_request(_: fastapi.Request, error: Exception) -> JSONResponse:
    message = _explain(error) if isinstance(error, RequestValidationError) else str(error)
    return error_response(400, message)


async def _http_error(_: fastapi.Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return error_response(error.status_code, str(error.detail))


def _explain(error: RequestValidationError) -> str:
    """Why FastAPI did not take a V2 body. It tries the body as JSON and as bytes; the first is what is meant."""
    problems = error.errors()
    problem = next((p for p in problems if "InferenceRequest" in p["loc"]), problems[0])
    if problem["type"] == "json_invalid":
        return f"the body is not valid JSON: {problem['ctx']['error']} at character {problem['loc'][-1]}"
    path = [part for part in problem["loc"] if part not in ("body", "InferenceRequest")]
    place = (
        "".join(f"[{part}]" if isinstance(part, int) else f".{part!s:.60}" for part in path).lstrip(".") or "the body"
    )
    if problem["type"] == "missing":
        return f"{place}: missing"
    return f"{place}: {problem['msg'][:200]}"


def _check_media_type(headers: Mapping[str, str]) -> None:
    """Raise RequestError unless a body is said to be JSON, of any kind, or nothing is said of it.

    What curl -d says by default counts as nothing said: the examples of KServe's own documentation send JSON so.
    """
    given = headers.get("content-type", _JSON)
    media_type = given.split(";")[0].strip().lower()
    if media_type not in (_JSON, _CURL_DEFAULT) and not (
        media_type.startswith("application/") and media_type.endswith("+json")
    ):
        raise RequestError(f"Content-Type {json.dumps(given[:80])}: send JSON with Content-Type: {_JSON}")
