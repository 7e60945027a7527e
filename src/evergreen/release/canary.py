"""The canary: a challenger answers real requests beside the champion before any user sees it.

Where the platform can split traffic, a share of it goes there, too (`inference_service`). In any case the newest
requests of the impression log are asked again of both: nobody is shown the challenger's answers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from pydantic import Field

from evergreen.contracts.artifact import JsonModel
from evergreen.contracts.errors import EvergreenError
from evergreen.contracts.release import CanaryCheck, CanaryReport

_TIMEOUT_SECONDS = 10.0
_GONE_AFTER = 5  # requests in a row without any answer
_TRIES = 3  # of an answer that is over the latency budget


class CanaryConfig(JsonModel):
    """What a challenger must hold."""

    min_requests: int = Field(default=100, ge=1)
    """With fewer it is not let out: a canary that saw nothing proves nothing."""
    max_failed_share: float = Field(default=0.0, ge=0, le=1)
    """Of requests without an answer."""
    latency_budget_ms: float = Field(default=50.0, gt=0)
    """p99 of a request over HTTP, as the champion's choice has it for scoring alone. What else runs on the machine
    only ever adds time: what is over it is asked again, up to twice, and the quickest answer counts. Where the p99 of
    the champion is over it even so, that is the limit."""
    max_latency_ratio: float = Field(default=5.0, gt=1)
    """How many times the champion's median it may take: there are as many servers as the champion needs."""
    max_degraded_more: float = Field(default=0.01, ge=0, le=1)
    """How much larger the share of degraded answers may be than the champion's: it reads the same online store."""
    max_missing_items_more: float = Field(default=0.01, ge=0, le=1)
    """How much larger the share of candidates that it did not rank may be than the champion's."""
    max_prediction_ratio: float = Field(default=2.0, gt=1)
    """By which factor the ratio of its mean prediction to the champion's may lie above or below what is expected: what
    the gate saw on test rows is to be seen on real requests, or the features that it is served are others."""


@dataclass
class _Seen:
    """What one server did."""

    version: str = ""
    seconds: list[float] = field(default_factory=list)
    failed: int = 0
    unanswered: int = 0
    """In a row, up to now."""
    last_error: str = ""
    degraded: int = 0
    asked_items: int = 0
    ranked_items: int = 0
    scores: list[float] = field(default_factory=list)

    @property
    def is_gone(self) -> bool:
        """Whether nobody is there any more."""
        return self.unanswered >= _GONE_AFTER

    def latency_ms(self, quantile: float) -> float | None:
        """Of the requests that were answered."""
        return float(np.quantile(self.seconds, quantile)) * 1000 if self.seconds else None


def run_canary(
    challenger: httpx.Client,
    champion: httpx.Client | None,
    requests: Sequence[Mapping[str, Any]],
    *,
    model_name: str = "evergreen",
    expected_ratio: float = 1.0,
    config: CanaryConfig | None = None,
) -> CanaryReport:
    """Ask both servers the same requests, in turns.

    Args:
        challenger: a client of the challenger's server (base URL and headers set).
        champion: of the champion's; None where nothing serves yet.
        requests: V1 instances, see `replay.logged_requests`.
        model_name: in the URL.
        expected_ratio: of its mean prediction to the champion's, see `GateReport.mean_prediction_ratio`.
        config: what must hold.

    Returns:
        What was seen; of a challenger that is not there, or no longer, that it is gone.

    Raises:
        EvergreenError: the champion cannot be reached: there is nothing to compare with.
    """
    config = config or CanaryConfig()
    ours, theirs = _Seen(), _Seen()
    for request in requests[:1]:
        _ask(challenger, model_name, request, _Seen(), config)  # connects
    for request in requests:
        _ask(challenger, model_name, request, ours, config)
        if champion is not None:
            _ask(champion, model_name, request, theirs, config)
            if theirs.is_gone:
                raise EvergreenError(
                    f"{champion.base_url}: the champion cannot be reached: {theirs.last_error}; is the server running?"
                )
        if ours.is_gone:
            break
    num_requests = len(requests)
    answered = max(num_requests - ours.failed, 1)
    checks = [
        _at_least("requests", num_requests, config.min_requests),
        _at_most("failed_share", ours.failed / max(num_requests, 1), config.max_failed_share),
        _at_most(
            "latency_p99_ms",
            ours.latency_ms(0.99),
            max(config.latency_budget_ms, theirs.latency_ms(0.99) or 0.0),
        ),
        _at_most(
            "degraded_share",
            ours.degraded / answered,
            theirs.degraded / max(num_requests - theirs.failed, 1) + config.max_degraded_more,
        ),
    ]
    if champion is not None:
        if ours.asked_items:
            missing = [1 - seen.ranked_items / max(seen.asked_items, 1) for seen in (ours, theirs)]
            checks.append(_at_most("missing_items_share", missing[0], missing[1] + config.max_missing_items_more))
        median, its_median = ours.latency_ms(0.5), theirs.latency_ms(0.5)
        slower = median / its_median if median and its_median else None
        checks.append(_at_most("latency_p50_ratio", slower, config.max_latency_ratio))
        ratio = float(np.mean(ours.scores) / np.mean(theirs.scores)) if ours.scores and theirs.scores else None
        least, most = expected_ratio / config.max_prediction_ratio, expected_ratio * config.max_prediction_ratio
        checks.append(
            CanaryCheck(
                name="mean_prediction_ratio",
                value=ratio,
                limit=f"from {least:.3g} to {most:.3g}",
                passed=ratio is not None and least <= ratio <= most,
            )
        )
    return CanaryReport(
        challenger=ours.version or "unknown",
        champion=theirs.version or None,
        num_requests=num_requests,
        checks=tuple(checks),
        error=f"{challenger.base_url}: cannot be reached: {ours.last_error}" if ours.is_gone else None,
    )


def try_out(
    challenger: tuple[str, AbstractContextManager[str]],
    champion: tuple[str, AbstractContextManager[str]],
    requests: Sequence[Mapping[str, Any]],
    *,
    expected_ratio: float = 1.0,
    config: CanaryConfig | None = None,
) -> CanaryReport:
    """Start a server for each, and ask both.

    Args:
        challenger: its version, and what starts its server and gives the URL.
        champion: likewise.
        requests: see `run_canary`, like all that follow.

    Returns:
        What was seen; of a challenger whose server does not come up, that it does not pass.

    Raises:
        EvergreenError: the champion's server does not come up, or cannot be reached.
    """
    with ExitStack() as stack:
        theirs = stack.enter_context(champion[1])
        try:
            ours = stack.enter_context(challenger[1])
        except EvergreenError as error:
            return not_started(challenger[0], champion[0], str(error))
        ask_ours, ask_theirs = (
            stack.enter_context(httpx.Client(base_url=url, trust_env=False)) for url in (ours, theirs)
        )
        return run_canary(ask_ours, ask_theirs, requests, expected_ratio=expected_ratio, config=config)


def not_started(challenger: str, champion: str | None, error: str) -> CanaryReport:
    """What is to be said of a challenger whose server does not come up: it does not pass.

    Args:
        challenger: version of it.
        champion: version of what serves; None where nothing does yet.
        error: what the server said.
    """
    return CanaryReport(challenger=challenger, champion=champion, num_requests=0, checks=(), error=error)


def _ask(client: httpx.Client, model_name: str, request: Mapping[str, Any], seen: _Seen, config: CanaryConfig) -> None:
    elapsed = float("inf")
    try:
        for _ in range(_TRIES):
            started = time.perf_counter()
            response = client.post(
                f"/v1/models/{model_name}:predict", json={"instances": [request]}, timeout=_TIMEOUT_SECONDS
            )
            elapsed = min(elapsed, time.perf_counter() - started)
            if not response.is_success or elapsed * 1000 <= config.latency_budget_ms:
                break
    except httpx.TransportError as error:
        seen.failed += 1
        seen.unanswered += 1
        seen.last_error = str(error) or type(error).__name__
        return
    seen.unanswered = 0
    try:
        (answer,) = response.raise_for_status().json()["predictions"]
        version, degraded = answer["model_version"], bool(answer["degraded"])
        ranked = answer.get("items", [answer])
        scores = [float(item["probability"] if "probability" in item else item["rating"]) for item in ranked]
    except (httpx.HTTPStatusError, ValueError, KeyError, TypeError, AttributeError):
        seen.failed += 1  # whatever a server says that is no answer
        return
    seen.seconds.append(elapsed)
    seen.asked_items += len(request.get("candidates") or ())
    seen.version = version
    seen.degraded += degraded
    seen.ranked_items += len(ranked) if "items" in answer else 0
    seen.scores += scores


def _at_most(name: str, value: float | None, limit: float) -> CanaryCheck:
    return CanaryCheck(name=name, value=value, limit=f"at most {limit:g}", passed=value is not None and value <= limit)


def _at_least(name: str, value: float, limit: float) -> CanaryCheck:
    return CanaryCheck(name=name, value=value, limit=f"at least {limit:g}", passed=value >= limit)
