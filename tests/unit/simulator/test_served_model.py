"""Asking over HTTP, against a small server that fails as it is told to."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from evergreen.contracts.errors import EvergreenError, InputError, RequestError
from evergreen.simulator import served_model
from evergreen.simulator.asking import Ask, Served
from evergreen.simulator.served_model import ServedModel

ASKS = [Ask(f"r{number}", "u1", datetime(2025, 1, 31, tzinfo=UTC), 2, {"device": "tablet"}) for number in range(3)]


class Server(ThreadingHTTPServer):
    """Answers each call with the next of `replies`: a status, and a body where it is no answer."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies: list[tuple[int, Any]] = []
        self.calls: list[tuple[str, dict[str, str], Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        call = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.calls.append((self.path, dict(self.headers), call))
        status, body = self.server.replies.pop(0)
        if body is None:
            body = {
                "predictions": [
                    {
                        "request_id": instance["request_id"],
                        "items": [{"item_id": "i1", "rank": 1}, {"item_id": "i2", "rank": 2}],
                        "model_version": "m1",
                        "degraded": instance["request_id"] == "r1",
                    }
                    for instance in call["instances"]
                ]
            }
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(served_model, "_PAUSES_SECONDS", (0.0, 0.0, 0.0))
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_one_call_asks_all_and_answers_come_back(server: Server):
    server.replies = [(200, None)]
    with ServedModel(server.url, "shop", token="secret") as recommend:
        answers = recommend(ASKS)
    assert answers == [Served(f"r{n}", ("i1", "i2"), "m1", degraded=n == 1) for n in range(3)]
    [(path, headers, call)] = server.calls
    assert path == "/v1/models/shop:predict" and headers["Authorization"] == "Bearer secret"
    assert call["instances"][0] == {
        "request_id": "r0",
        "user_id": "u1",
        "event_timestamp": "2025-01-31T00:00:00+00:00",
        "k": 2,
        "context": {"device": "tablet"},
    }


def test_a_failing_server_is_asked_again_and_the_failures_are_counted(server: Server):
    server.replies = [(503, {"error": "not ready"}), (500, {"error": "oh"}), (200, None)]
    with ServedModel(server.url) as recommend:
        assert [answer.failures for answer in recommend(ASKS)] == [2, 0, 0], "of the call, not of each question"


def test_a_server_that_keeps_failing_ends_the_day_with_its_words(server: Server):
    server.replies = [(503, {"error": "not ready"})] * 4
    with (
        ServedModel(server.url) as recommend,
        pytest.raises(EvergreenError, match=r"no answer to r0 after 4 tries \(HTTP 503: not ready\); .* run again"),
    ):
        recommend(ASKS)


def test_a_server_that_is_gone_is_named(server: Server):
    with ServedModel("http://127.0.0.1:9") as recommend, pytest.raises(EvergreenError, match=r"http://127.0.0.1:9: no"):
        recommend(ASKS)


def test_a_refusal_is_not_tried_again(server: Server):
    server.replies = [(400, {"error": "instances[0].k: must be between 1 and 500"})]
    with ServedModel(server.url) as recommend, pytest.raises(RequestError, match=r"predict: instances\[0\].k: must be"):
        recommend(ASKS)
    assert len(server.calls) == 1


def test_an_answer_that_is_none_is_told(server: Server):
    server.replies = [(200, {"outputs": []})]
    with ServedModel(server.url) as recommend, pytest.raises(EvergreenError, match="not an answer of KServe's V1"):
        recommend(ASKS)


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "http://127.0.0.1:port"])
def test_no_url_is_told(url: str):
    with pytest.raises(InputError, match=f"{url}: not a URL"):
        ServedModel(url)
