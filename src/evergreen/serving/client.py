"""A small client of the inference service. Needs httpx and pydantic alone, and is quick to import."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any, Literal, Self

import httpx

from evergreen.contracts.errors import EvergreenError, RequestError
from evergreen.serving.schema import RankedItem, Recommendation

Protocol = Literal["v1", "v2", "v2-binary"]

_POLL_SECONDS = 0.2
_HEADER_LENGTH = "Inference-Header-Content-Length"
_DATATYPES = {"k": "INT64", "exclude_seen": "BOOL", "diversity": "FP64"}  # the other inputs are BYTES
_FORMATS = {"INT64": "q", "BOOL": "?", "FP64": "d", "FP32": "f"}


class RecommenderClient:
    """Asks a served model for recommendations over HTTP."""

    def __init__(
        self, url: str, model_name: str = "evergreen", *, timeout: float = 30.0, token: str | None = None
    ) -> None:
        """Connect lazily.

        Args:
            url: base of the service, e.g. http://127.0.0.1:8080.
            model_name: name of the model in the URL.
            timeout: seconds to wait for an answer.
            token: that the server asks for, if it does.
        """
        self.url = url.rstrip("/")
        self.model_name = model_name
        headers = {"Authorization": f"Bearer {token}"} if token is not None else None
        try:
            # The service is named outright, so the proxies of the environment are not asked.
            self._http = httpx.Client(base_url=self.url, timeout=timeout, trust_env=False, headers=headers)
        except httpx.InvalidURL as error:
            raise RequestError(f"{url}: not a URL: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def wait_until_ready(self, timeout: float = 60.0, *, still_alive: Callable[[], bool] = lambda: True) -> None:
        """Return as soon as the model is ready.

        Args:
            timeout: seconds to wait at most.
            still_alive: asked between attempts; False ends the wait, because a server that has ended will not come up.

        Raises:
            TimeoutError: the model is not ready in time, or the server has ended.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                response = self._http.get(f"/v2/models/{self.model_name}/ready")
                if response.status_code == httpx.codes.OK:
                    return
                last = f"HTTP {response.status_code}"
            except httpx.TransportError as error:
                last = str(error) or type(error).__name__
            if not still_alive():
                raise TimeoutError(f"{self.url}: the server has ended before {self.model_name} was ready ({last})")
            if time.monotonic() >= deadline:
                raise TimeoutError(f"{self.url}: {self.model_name} is not ready after {timeout:g} s ({last})")
            time.sleep(_POLL_SECONDS)

    def recommend(
        self,
        user_id: str | None = None,
        *,
        k: int | None = None,
        candidates: Sequence[str] | None = None,
        context: Mapping[str, Any] | None = None,
        event_timestamp: datetime | None = None,
        request_id: str | None = None,
        exclude_seen: bool | None = None,
        diversity: float | None = None,
        protocol: Protocol = "v1",
    ) -> Recommendation:
        """Ask for recommendations.

        Args:
            user_id: whom to recommend to; None for a log without users.
            k: how many items to return.
            candidates: item ids to rank; None for the whole catalogue.
            context: context features by name.
            event_timestamp: of the request, with a time zone; None for now.
            request_id: what the impression log calls the request; None for a new one, which the answer tells.
            exclude_seen: whether items that the user chose before are left out; None for the server's way.
            diversity: from 0 to 1, how much the order avoids repeating a category; None for the server's.
            protocol: `v1` or `v2` of KServe's protocols, or `v2-binary`: that with binary tensor data.

        Raises:
            RequestError: the server refuses the request, or knows no such model; with the server's words.
            EvergreenError: the server cannot be reached, is not ready, or fails.
        """
        request = {
            "user_id": user_id,
            "request_id": request_id,
            "k": k,
            "candidates": list(candidates) if candidates is not None else None,
            "context": dict(context) if context else None,
            "event_timestamp": event_timestamp.isoformat() if event_timestamp else None,
            "exclude_seen": exclude_seen,
            "diversity": diversity,
        }
        request = {name: value for name, value in request.items() if value is not None}
        if protocol == "v1":
            response = self._post(f"/v1/models/{self.model_name}:predict", json={"instances": [request]})
            return Recommendation.model_validate(response.json()["predictions"][0])
        path = f"/v2/models/{self.model_name}/infer"
        if protocol == "v2":
            return _recommendation(self._post(path, json={"inputs": _inputs(request)}).json(), user_id)
        body, length = _binary_call(request)
        headers = {"Content-Type": "application/octet-stream", _HEADER_LENGTH: str(length)}
        response = self._post(path, content=body, headers=headers)
        return _recommendation(_binary_answer(response.content, int(response.headers[_HEADER_LENGTH])), user_id)

    def _post(self, path: str, **body: Any) -> httpx.Response:
        try:
            response = self._http.post(path, **body)
        except httpx.TransportError as error:
            reason = str(error) or type(error).__name__
            raise EvergreenError(f"{self.url}: cannot be reached: {reason}; is the server running?") from error
        except ValueError as error:
            raise RequestError(f"the request cannot be written as JSON: {error}") from error
        if response.is_success:
            return response
        message = _error_message(response)
        if response.is_client_error:
            raise RequestError(message)
        raise EvergreenError(f"{self.url}: HTTP {response.status_code}: {message}")


def _error_message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        return response.text or response.reason_phrase


def _inputs(request: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One request as V2 tensors; an empty one still needs a tensor."""
    return [
        {
            "name": name,
            "datatype": _DATATYPES.get(name, "BYTES"),
            "shape": [1],
            "data": [json.dumps(value) if name in ("context", "candidates") else value],
        }
        for name, value in (request or {"context": {}}).items()
    ]


def _binary_call(request: Mapping[str, Any]) -> tuple[bytes, int]:
    """One request as V2 tensors with binary data, and the length of the JSON before it."""
    inputs, parts = _inputs(request), []
    for tensor in inputs:
        [value] = tensor.pop("data")
        if tensor["name"] == "candidates":
            ids = request["candidates"]
            tensor["shape"] = [1, len(ids)]
            parts.append(b"".join(map(_string, ids)))
        elif tensor["datatype"] == "BYTES":
            parts.append(_string(value))
        else:
            parts.append(struct.pack(f"<{_FORMATS[tensor['datatype']]}", value))
        tensor["parameters"] = {"binary_data_size": len(parts[-1])}
    header = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    return b"".join([header, *parts]), len(header)


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<I", len(encoded)) + encoded


def _binary_answer(body: bytes, length: int) -> dict[str, Any]:
    """A V2 answer with its binary data in the place of JSON's."""
    answer: dict[str, Any] = json.loads(body[:length])
    for output in answer["outputs"]:
        size = output["parameters"]["binary_data_size"]
        data = body[length : length + size]
        length += size
        if output["datatype"] != "BYTES":
            output["data"] = [value for (value,) in struct.iter_unpack(f"<{_FORMATS[output['datatype']]}", data)]
            continue
        output["data"] = []
        while data:
            end = 4 + int.from_bytes(data[:4], "little")
            output["data"].append(data[4:end].decode())
            data = data[end:]
    return answer


def _recommendation(body: Mapping[str, Any], user_id: str | None) -> Recommendation:
    """The first answer of a V2 response."""
    outputs = {output["name"]: output["data"] for output in body["outputs"]}
    value_name = "rating" if "rating" in outputs else "probability"
    values = outputs[value_name]
    items: tuple[RankedItem, ...] = ()
    if "item_id" in outputs:
        pairs = zip(outputs["item_id"], values, strict=True)
        items = tuple(
            RankedItem.model_validate({"item_id": item, "rank": rank, value_name: value})
            for rank, (item, value) in enumerate(pairs, start=1)
        )
    return Recommendation.model_validate(
        {
            "user_id": user_id,
            "known_user": outputs["known_user"][0],
            "items": items,
            "request_id": outputs["request_id"][0],
            "degraded": outputs["degraded"][0],
            "model_version": body["model_version"],
            **({} if "item_id" in outputs else {value_name: values[0]}),
            **json.loads(outputs["notes"][0]),
        }
    )
