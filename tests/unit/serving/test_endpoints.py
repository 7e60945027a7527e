"""What the routes say when there is no model yet, or not for long, or a caller is slow; no server is around them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import fastapi
import httpx
import pytest
from kserve.model_repository import ModelRepository
from kserve.protocol.model_repository_extension import ModelRepositoryExtension
from kserve.protocol.rest.v1_endpoints import register_v1_endpoints
from kserve.protocol.rest.v2_endpoints import register_v2_endpoints
from starlette.types import ASGIApp

from evergreen.serving import endpoints
from evergreen.serving.endpoints import install_endpoints
from evergreen.serving.predictor import RecommenderModel
from evergreen.serving.protocol import RecommenderDataPlane
from evergreen.serving.repository import LoadedModel, ModelSlot
from evergreen.serving.validation import RequestRules
from tests.serving import make_answer

V1, V2 = "/v1/models/evergreen:predict", "/v2/models/evergreen/infer"
INFER = {"inputs": [{"name": "user_id", "datatype": "BYTES", "shape": [1], "data": ["u1"]}]}


class Assembled:
    """KServe's application with our routes, and a slot for the model."""

    def __init__(self, **limits: int) -> None:
        self.slot = ModelSlot("evergreen")
        registry = ModelRepository()
        registry.update(RecommenderModel("evergreen", self.slot))
        self.data_plane = RecommenderDataPlane(registry)
        app = fastapi.FastAPI(openapi_url=None)
        self.app: ASGIApp = install_endpoints(app, self.data_plane, **limits)
        register_v1_endpoints(app, self.data_plane, ModelRepositoryExtension(registry))
        register_v2_endpoints(app, self.data_plane, ModelRepositoryExtension(registry))

    def ask(self, method: str, path: str, **body: Any) -> httpx.Response:
        async def one() -> httpx.Response:
            transport = httpx.ASGITransport(app=self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **body)

        return asyncio.run(one())


@pytest.fixture
def assembled() -> Assembled:
    return Assembled()


def test_nothing_but_the_process_is_ready_before_a_model_is_loaded(assembled: Assembled) -> None:
    assert assembled.ask("GET", "/v2/health/live").json() == {"live": True}
    for method, path, body in (
        ("GET", "/v2/health/ready", None),
        ("GET", "/v1/models/evergreen", None),
        ("GET", "/v2/models/evergreen", None),
        ("GET", "/v2/models/evergreen/ready", None),
        ("GET", "/v2/models/evergreen/versions/1/ready", None),
        ("POST", V1, {"instances": [{"user_id": "u1"}]}),
        ("POST", V2, INFER),
    ):
        response = assembled.ask(method, path, json=body)
        assert response.status_code == 503 and "not ready" in response.json()["error"], path
    document = assembled.ask("GET", "/openapi.json").json()
    assert "PredictRequest" in document["components"]["schemas"]


def test_draining_server_is_not_ready_and_still_answers(assembled: Assembled, parts: Callable[[str], Any]) -> None:
    assembled.slot.put(parts("impressions").recommender)
    version = parts("impressions").package.version
    ready = ("/v2/health/ready", "/v1/models/evergreen", "/v2/models/evergreen/ready")
    ready = (*ready, f"/v2/models/evergreen/versions/{version}/ready")
    assert [assembled.ask("GET", path).status_code for path in ready] == [200] * 4
    assembled.data_plane.draining = True
    assert [assembled.ask("GET", path).status_code for path in ready] == [503] * 4
    assert assembled.ask("GET", "/v2/health/live").status_code == 200
    assert assembled.ask("POST", V1, json={"instances": [{"user_id": "u1"}]}).status_code == 200
    assert assembled.ask("POST", V2, json=INFER).status_code == 200


def test_body_may_come_in_pieces_but_not_forever(
    assembled: Assembled, parts: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assembled.slot.put(parts("impressions").recommender)
    monkeypatch.setattr(endpoints, "BODY_SECONDS", 0.2)

    async def pieces(last: float) -> Any:
        yield b'{"instances": '
        await asyncio.sleep(last)
        yield b'[{"user_id": "u1"}]}'

    assert assembled.ask("POST", V1, content=pieces(0.0)).status_code == 200
    response = assembled.ask("POST", V1, content=pieces(1.0))
    assert response.status_code == 408 and response.json() == {"error": "the body did not arrive within 0.2 s"}


def test_body_is_not_read_beyond_its_limit() -> None:
    assembled = Assembled(max_body_bytes=1000)
    sent = 0

    async def endless() -> Any:
        nonlocal sent
        while sent < 10**6:
            sent += 600
            yield b" " * 600

    response = assembled.ask("POST", V1, content=endless())
    assert response.status_code == 413 and response.json()["error"].startswith("the body is larger than 1000 bytes")
    assert sent <= 1800


def test_more_calls_at_once_than_can_be_held_are_told_to_come_back() -> None:
    assembled = Assembled(max_calls_in_flight=2)
    release = asyncio.Event()

    class Waiting:
        rules = RequestRules(context={}, unused_context=frozenset(), has_users=True, has_items=True)
        value_name, model_version = "probability", "m"

        async def answer(self, requests: Any) -> list[Any]:
            await release.wait()
            return [make_answer("a")]

    waiting: Any = Waiting()

    async def ask_three() -> list[httpx.Response]:
        assembled.slot._current = LoadedModel(waiting)
        transport = httpx.ASGITransport(app=assembled.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            body = {"instances": [{"user_id": "u1"}]}
            held = [asyncio.create_task(client.post(V1, json=body)) for _ in range(2)]
            await asyncio.sleep(0.1)
            refused = [await client.post(V1, json=body), await client.get("/v2/health/live")]
            release.set()
            return [*refused, *await asyncio.gather(*held), await client.post(V1, json=body)]

    refused, *others = asyncio.run(ask_three())
    assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
    assert [response.status_code for response in others] == [200] * 4


def test_error_of_kserves_own_routes_is_told_as_ours_are(assembled: Assembled) -> None:
    for path in ("/v1/models/other", "/v2/models/other", "/v2/models/other/ready"):
        response = assembled.ask("GET", path)
        assert response.status_code == 404 and "other" in response.json()["error"]
    long_name = "x" * 5000
    response = assembled.ask("GET", f"/v2/models/{long_name}")
    assert response.status_code == 404 and len(response.json()["error"]) == 1000
