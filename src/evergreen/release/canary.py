"""The canary: a challenger answers real requests beside the champion before any user sees it.

Where the platform can split traffic, a share of it is the canary (KServe on a Gateway API). Here, and where it cannot,
the newest requests of the impression log are asked again of both: nobody is shown the challenger's answers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from pydantic import Field

from evergreen.contracts.artifact import JsonModel
from evergreen.contracts.errors import EvergreenError
from evergreen.contracts.release import CanaryCheck, CanaryReport

_TIMEOUT_SECONDS = 30.0
_UNREACHABLE_AFTER = 5  # failures in a row


class CanaryConfig(JsonModel):
    """What a challenger must hold."""

    min_requests: int = Field(default=100, ge=1)
    """With fewer it is not let out: a canary that saw nothing proves nothing."""
    max_failed_share: float = Field(default=0.0, ge=0, le=1)
    """Of requests without an answer."""
    latency_budget_ms: float = Field(default=50.0, gt=0)
    """p99 of a request over HTTP, as the champion's choice has it for scoring alone."""
    max_degraded_more: float = Field(default=0.01, ge=0, le=1)
    """How much larger the share of degraded answers may be than the champion's: it reads the same online store."""
    max_missing_items_more: float = Field(default=0.01, ge=0, le=1)
    """How much larger the share of candidates that it did not rank may be than the champion's."""
    max_prediction_ratio: float = Field(default=2.0, gt=1)
    """By which factor its mean prediction may lie above or below the champion's. Worlds change faster than that only
    when something is broken; better calibration moves a mean by tens of percent."""


@dataclass
class _Seen:
    """What one server did."""

    version: str = ""
    seconds: list[float] = field(default_factory=list)
    failed: int = 0
    degraded: int = 0
    asked_items: int = 0
    ranked_items: int = 0
    scores: list[float] = field(default_factory=list)


def run_canary(
    challenger: httpx.Client,
    champion: httpx.Client | None,
    requests: Sequence[Mapping[str, Any]],
    *,
    model_name: str = "evergreen",
    config: CanaryConfig | None = None,
) -> CanaryReport:
    """Ask both servers the same requests, in turns.

    Args:
        challenger: a client of the challenger's server (base URL and headers set).
        champion: of the champion's; None where nothing serves yet.
        requests: V1 instances, see `replay.logged_requests`.
        model_name: in the URL.
        config: what must hold.

    Raises:
        EvergreenError: one of the servers cannot be reached at all.
    """
    config = config or CanaryConfig()
    ours, theirs = _Seen(), _Seen()
    _ask(challenger, model_name, requests[:1], _Seen())  # connects
    for request in requests:
        _ask(challenger, model_name, [request], ours)
        if champion is not None:
            _ask(champion, model_name, [request], theirs)
    num_requests = len(requests)
    answered = max(num_requests - ours.failed, 1)
    checks = [
        _at_least("requests", num_requests, config.min_requests),
        _at_most("failed_share", ours.failed / max(num_requests, 1), config.max_failed_share),
        _at_most(
            "latency_p99_ms",
            float(np.quantile(ours.seconds, 0.99)) * 1000 if ours.seconds else None,
            config.latency_budget_ms,
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
        ratio = float(np.mean(ours.scores) / np.mean(theirs.scores)) if ours.scores and theirs.scores else None
        most = config.max_prediction_ratio
        checks.append(
            CanaryCheck(
                name="mean_prediction_ratio",
                value=ratio,
                limit=f"from {1 / most:g} to {most:g}",
                passed=ratio is not None and 1 / most <= ratio <= most,
            )
        )
    return CanaryReport(
        challenger=ours.version or "unknown",
        champion=theirs.version or None,
        num_requests=num_requests,
        checks=tuple(checks),
    )


def _ask(client: httpx.Client, model_name: str, requests: Sequence[Mapping[str, Any]], seen: _Seen) -> None:
    for request in requests:
        started = time.perf_counter()
        try:
            response = client.post(
                f"/v1/models/{model_name}:predict", json={"instances": [request]}, timeout=_TIMEOUT_SECONDS
            )
        except httpx.TransportError as error:
            seen.failed += 1
            if seen.failed >= _UNREACHABLE_AFTER and not seen.seconds:
                raise EvergreenError(
                    f"{client.base_url}: cannot be reached: {error}; is the server running?"
                ) from error
            continue
        elapsed = time.perf_counter() - started
        seen.asked_items += len(request.get("candidates") or ())
        if not response.is_success:
            seen.failed += 1
            continue
        seen.seconds.append(elapsed)
        (answer,) = response.json()["predictions"]
        seen.version = answer["model_version"]
        seen.degraded += answer["degraded"]
        ranked = answer.get("items", [answer])
        seen.ranked_items += len(ranked) if "items" in answer else 0
        seen.scores += [item.get("probability", item.get("rating")) for item in ranked]


def _at_most(name: str, value: float | None, limit: float) -> CanaryCheck:
    return CanaryCheck(name=name, value=value, limit=f"at most {limit:g}", passed=value is not None and value <= limit)


def _at_least(name: str, value: float, limit: float) -> CanaryCheck:
    return CanaryCheck(name=name, value=value, limit=f"at least {limit:g}", passed=value >= limit)
