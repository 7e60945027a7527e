"""What the gate says of a challenger: may it go out as a canary?"""

from __future__ import annotations

from pydantic import AwareDatetime

from evergreen.contracts.artifact import JsonModel
from evergreen.contracts.evaluation import Estimate, Latency, Verdict


class GateReport(JsonModel):
    """A challenger and the model that serves, on the same rows, which neither has seen."""

    challenger: str
    """Version of it."""
    incumbent: str | None
    """Version of what serves; None where nothing does yet."""
    test_start: AwareDatetime
    test_end: AwareDatetime
    rows: int
    positives: int
    metric: str
    """Lower is better."""
    challenger_value: Estimate
    incumbent_value: Estimate | None
    difference: Estimate | None
    """Challenger less incumbent, paired."""
    verdict: Verdict | None
    click_rate_ratio: Estimate | None
    """Predicted over observed clicks of the challenger; None for ratings."""
    latency: Latency
    passed: bool
    reason: str
