"""The canary against servers that answer as they are told to."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from evergreen.contracts.errors import EvergreenError
from evergreen.release.canary import CanaryConfig, run_canary

REQUESTS = [{"user_id": f"u{n}", "candidates": ["a", "b"]} for n in range(120)]


def server(version: str, *, probability: float = 0.1, degraded: bool = False, missing: int = 0) -> httpx.Client:
    def answer(request: httpx.Request) -> httpx.Response:
        (instance,) = json.loads(request.content)["instances"]
        ranked = instance["candidates"][missing:]
        items = [{"item_id": item, "rank": r, "probability": probability} for r, item in enumerate(ranked, 1)]
        prediction = {"model_version": version, "degraded": degraded, "items": items}
        return httpx.Response(200, json={"predictions": [prediction]})

    return client(answer)


def client(handler: Callable[[httpx.Request], httpx.Response]) -> httpx.Client:
    return httpx.Client(transport=httpx.MockTransport(handler), base_url="http://model")


def failed(**changes: Any) -> set[str]:
    report = run_canary(server("new", **changes), server("old"), REQUESTS)
    return {check.name for check in report.checks if not check.passed}


def test_challenger_that_does_as_well_passes() -> None:
    report = run_canary(server("new", probability=0.12), server("old"), REQUESTS)
    assert report.passed and (report.challenger, report.champion, report.num_requests) == ("new", "old", 120)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"probability": 0.3}, {"mean_prediction_ratio"}),
        ({"probability": 0.01}, {"mean_prediction_ratio"}),
        ({"degraded": True}, {"degraded_share"}),
        ({"missing": 1}, {"missing_items_share"}),
    ],
)
def test_challenger_that_does_worse_is_found_out(changes: dict[str, Any], names: set[str]) -> None:
    assert failed(**changes) == names


def test_challenger_that_fails_once_fails() -> None:
    healthy = server("new")
    calls = 0

    def sometimes(request: httpx.Request) -> httpx.Response:
        nonlocal calls
        calls += 1
        return httpx.Response(500) if calls == 50 else healthy.post("/", content=request.content)

    report = run_canary(client(sometimes), server("old"), REQUESTS)
    assert not report.passed and report.failures == "failed_share is 0.008333, at most 0 allowed"


def test_slow_challenger_is_found_out() -> None:
    report = run_canary(server("new"), server("old"), REQUESTS, config=CanaryConfig(latency_budget_ms=1e-6))
    assert [check.name for check in report.checks if not check.passed] == ["latency_p99_ms"]


def test_canary_that_saw_too_little_proves_nothing() -> None:
    report = run_canary(server("new"), server("old"), REQUESTS[:20])
    assert not report.passed and "requests is 20, at least 100 allowed" in report.failures


def test_first_release_has_nothing_to_be_compared_with() -> None:
    report = run_canary(server("new"), None, REQUESTS)
    assert report.passed and report.champion is None


def test_server_that_is_not_there_is_named() -> None:
    def away(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with pytest.raises(EvergreenError, match=r"http://model.*cannot be reached: refused"):
        run_canary(client(away), server("old"), REQUESTS)
