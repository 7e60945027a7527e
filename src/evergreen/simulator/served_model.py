"""The served model, asked as a shop would ask it: KServe's V1 protocol over HTTP, and nothing of ours."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import httpx

from evergreen.contracts.errors import EvergreenError, InputError, RequestError
from evergreen.simulator.asking import Ask, Served

_PAUSES_SECONDS = (0.2, 1.0, 3.0)
"""Between a failed call and the next try; a restarting server is back by then, a shop's user is not."""


class ServedModel:
    """Answers by one HTTP call for up to 64 questions. Threads may share it."""

    def __init__(
        self, url: str, model_name: str = "evergreen", *, timeout: float = 60.0, token: str | None = None
    ) -> None:
        """Connect lazily.

        Args:
            url: base of the service, e.g. http://127.0.0.1:8080.
            model_name: name of the model in the URL.
            timeout: seconds to wait for an answer.
            token: that the server asks for, if it does.

        Raises:
            InputError: not a URL.
        """
        if not url.startswith(("http://", "https://")):
            raise InputError(f"{url}: not a URL: it begins with http:// or https://")
        headers = {"Authorization": f"Bearer {token}"} if token is not None else None
        try:
            # The service is named outright, so the proxies of the environment are not asked.
            self._http = httpx.Client(base_url=url, timeout=timeout, trust_env=False, headers=headers)
        except httpx.InvalidURL as error:
            raise InputError(f"{url}: not a URL: {error}") from error
        self._url = url
        self._path = f"/v1/models/{model_name}:predict"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._http.close()

    def __call__(self, asks: Sequence[Ask], /) -> list[Served]:
        """One answer each. A call that fails on the server's side is tried again, and counted.

        Raises:
            RequestError: the server refuses; with its words.
            EvergreenError: it cannot be reached, or keeps failing.
        """
        body = {"instances": [ask.instance() for ask in asks]}
        failures: list[str] = []
        for pause in (*_PAUSES_SECONDS, None):
            try:
                response = self._http.post(self._path, json=body)
            except httpx.TransportError as error:
                failures.append(str(error) or type(error).__name__)
            else:
                if response.is_success:
                    return self._answers(response, len(failures))
                if response.is_client_error:
                    raise RequestError(f"{self._url}{self._path}: {_words(response)}")
                failures.append(f"HTTP {response.status_code}: {_words(response)}")
            if pause is not None:
                time.sleep(pause)
        raise EvergreenError(
            f"{self._url}: no answer to {asks[0].request_id} after {len(failures)} tries ({failures[-1]}); "
            "the day is not finished: run again when the server is back"
        )

    def _answers(self, response: httpx.Response, failures: int) -> list[Served]:
        try:
            return [
                Served(
                    request_id=prediction["request_id"],
                    item_ids=tuple(item["item_id"] for item in prediction["items"]),
                    model_version=prediction["model_version"],
                    degraded=prediction["degraded"],
                    failures=failures if number == 0 else 0,  # they are the call's
                )
                for number, prediction in enumerate(response.json()["predictions"])
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise EvergreenError(
                f"{self._url}{self._path}: not an answer of KServe's V1 protocol ({error!r}): {response.text[:80]}"
            ) from error


def _words(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        return response.text or response.reason_phrase
