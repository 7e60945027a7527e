"""The canary against servers that answer as they are told to."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from evergreen.contracts.errors import EvergreenError
from evergreen.release import canary
from evergreen.release.canary import not_started, run_canary

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


def test_challenger_of_a_changed_world_promises_what_the_gate_has_seen_of_it() -> None:
    """What serves overrates fourfold, so half of its clicks are too many as well."""
    found = [
        run_canary(server("new", probability=p), server("old", probability=0.4), REQUESTS, expected_ratio=0.25).passed
        for p in (0.1, 0.21, 0.4, 0.04)
    ]
    assert found == [True, False, False, False]


def test_challenger_that_fails_once_fails() -> None:
    healthy = server("new")
    calls = 0

    def sometimes(request: httpx.Request) -> httpx.Response:
        nonlocal calls
        calls += 1
        return httpx.Response(500) if calls == 50 else healthy.post("/", content=request.content)

    report = run_canary(client(sometimes), server("old"), REQUESTS)
    assert not report.passed and report.failures == "failed_share is 0.008333, at most 0 allowed"


class Clock:
    """Time that passes only while a server thinks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(canary.time, "perf_counter", lambda: self.now)

    def server(self, version: str, *milliseconds: float) -> httpx.Client:
        """One that takes so long for its first answer, so long for its second … and begins anew."""
        quick, times = server(version), itertools.cycle(milliseconds)

        def answer(request: httpx.Request) -> httpx.Response:
            self.now += next(times) / 1000
            return quick.post("/", content=request.content)

        return client(answer)


@pytest.mark.parametrize(
    ("milliseconds", "of_champion", "names"),
    [
        (60, 20, {"latency_p99_ms"}),
        (60, 60, set()),  # the machine is slow for both
        (40, 4, {"latency_p50_ratio"}),
        (40, 10, set()),
    ],
)
def test_slow_challenger_is_found_out(
    monkeypatch: pytest.MonkeyPatch, milliseconds: float, of_champion: float, names: set[str]
) -> None:
    clock = Clock(monkeypatch)
    report = run_canary(clock.server("new", milliseconds), clock.server("old", of_champion), REQUESTS)
    assert {check.name for check in report.checks if not check.passed} == names


def test_what_a_busy_machine_adds_is_not_the_challengers(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert run_canary(clock.server("new", 5, 5, 200, 90), clock.server("old", 5), REQUESTS).passed


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"predictions": []}', b'{"predictions": [{"model_version": "new", "degraded": false}]}']
)
def test_what_is_no_answer_counts_as_failed(content: bytes) -> None:
    report = run_canary(client(lambda request: httpx.Response(200, content=content)), server("old"), REQUESTS)
    assert not report.passed and "failed_share is 1, at most 0 allowed" in report.failures


def test_score_that_is_no_number_counts_as_failed() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        prediction = {"model_version": "new", "degraded": False, "items": [{"item_id": "a", "probability": None}]}
        return httpx.Response(200, json={"predictions": [prediction]})

    assert "failed_share is 1" in run_canary(client(answer), server("old"), REQUESTS).failures


def test_canary_that_saw_too_little_proves_nothing() -> None:
    report = run_canary(server("new"), server("old"), REQUESTS[:20])
    assert not report.passed and "requests is 20, at least 100 allowed" in report.failures


def test_first_release_has_nothing_to_be_compared_with() -> None:
    report = run_canary(server("new"), None, REQUESTS)
    assert report.passed and report.champion is None


def dies(after: int) -> httpx.Client:
    healthy, calls = server("new"), 0

    def answer(request: httpx.Request) -> httpx.Response:
        nonlocal calls
        calls += 1
        if calls > after:
            raise httpx.ConnectError("refused")
        return healthy.post("/", content=request.content)

    return client(answer)


@pytest.mark.parametrize("after", [0, 50])
def test_challenger_that_is_gone_is_not_waited_for(after: int) -> None:
    report = run_canary(dies(after), server("old"), REQUESTS)
    assert not report.passed and report.error == "http://model: cannot be reached: refused"
    assert report.failures.startswith("http://model: cannot be reached: refused; failed_share is 0.04")


def test_champion_that_is_gone_is_no_verdict_on_the_challenger() -> None:
    with pytest.raises(EvergreenError, match=r"http://model.*champion cannot be reached: refused"):
        run_canary(server("new"), dies(50), REQUESTS)


def test_challenger_whose_server_does_not_start_never_passes() -> None:
    report = not_started("new", "old", "no feature x")
    assert not report.passed and report.failures == "no feature x"
