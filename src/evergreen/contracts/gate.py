"""What the gate says of a challenger: may it go out as a canary?"""

from __future__ import annotations

from pydantic import AwareDatetime

from evergreen.contracts.artifact import JsonModel
from evergreen.contracts.evaluation import Estimate, Latency, Verdict


class ServedComparison(JsonModel):
    """Test rows that a server has shown, each once with the features it was trained on and once with those of the log.

    A feature that knows the future is as good on test rows as on training rows; only the server cannot have it.
    """

    rows: int
    positives: int
    left_out: dict[str, int]
    """Test rows that are not compared, by reason."""
    never_served: tuple[str, ...]
    """Features of the challenger that no server has logged: unknown here, as nobody knows what would be served."""
    never_served_gain: Estimate | None = None
    """How much lower the challenger's value is with these as trained; None: there are none."""
    challenger_value: Estimate
    """With the features as served, as all that follow."""
    incumbent_value: Estimate | None
    difference: Estimate | None
    """Challenger less incumbent, paired."""
    verdict: Verdict | None
    click_rate_ratio: Estimate | None
    """Predicted over observed clicks of the challenger; None for ratings."""
    skew: Estimate
    """The challenger's value with the features as served less that with the features as trained, paired."""
    incumbent_skew: Estimate | None
    skew_difference: Estimate
    """The challenger's skew less the incumbent's: both read a store that is a little behind."""
    skew_by_feature: dict[str, float]
    """By how much the challenger gets better with one feature as trained, the largest first; only of one that is held
    back for its skew."""


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
    mean_prediction_ratio: float | None = None
    """Challenger over incumbent, on the test rows: what a canary should see as well; None without an incumbent. When
    the world has changed, what serves promises clicks that no longer come, and a good challenger promises less."""
    served: ServedComparison | None = None
    """None where no log of what was served was given."""
    latency: Latency
    passed: bool
    reason: str
