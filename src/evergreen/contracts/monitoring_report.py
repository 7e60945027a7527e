"""What the monitors found in a window of impressions. They measure; what follows from it is decided elsewhere.

    report.json   MonitoringReport

Data drift (features), prediction drift and label drift are three findings, never one. Whether the data itself is whole
is said by signals: a share, an age or a ratio beside what is usual, without a verdict.
"""

from __future__ import annotations

from enum import StrEnum

from pydantic import AwareDatetime, Field

from evergreen.contracts.artifact import JsonModel
from evergreen.contracts.quality import QualityReport


class DriftStatus(StrEnum):
    """What is said of a column, or of all of them."""

    UNKNOWN = "unknown"  # too few rows or users to tell
    STABLE = "stable"
    DRIFTED = "drifted"  # unlike the training data, and unlike the same weekday and the first days in service if known
    SEASONAL = "seasonal"  # unlike the training data as a whole, but as the same weekday was in it


class Aspect(StrEnum):
    """In which way a column may differ."""

    LOCATION = "location"  # its mean
    SHAPE = "shape"  # how its known values are spread over the cells of the reference
    MISSING = "missing"  # how often it is missing


class AspectTest(JsonModel):
    """One aspect of a column against one reference. It drifted when the effect is large and not by chance."""

    effect: float
    """Location: difference of means in standard deviations of the reference; of probabilities, in its mean. Shape: how
    far values moved on average, in the same unit; of categories, the Jensen-Shannon distance in [0, 1]. Missing:
    difference of shares."""
    threshold: float
    """Size from which an effect counts."""
    p_value: float
    """Chance of such a difference between windows of an unchanged world, rows of a user not being independent."""
    adjusted_p_value: float
    """By Benjamini-Hochberg over all aspects of all columns of the window against this reference."""
    drifted: bool


class Comparison(JsonModel):
    """A column against one reference."""

    drifted: bool | None
    """Null: too little to tell."""
    reason: str | None = None
    """Why it cannot be told."""
    aspects: dict[Aspect, AspectTest] = Field(default_factory=dict)


class ColumnDrift(JsonModel):
    """A column of the window."""

    status: DriftStatus
    weight: float
    """Share of the model's importance in [0, 1]; 1 for a finding of one column."""
    mean: float | None
    """Of the known numbers; null for categories."""
    missing_share: float
    against: dict[str, Comparison]
    """By reference: "training" and, where there are such, "same_weekday" and "in_service"."""

    @property
    def main(self) -> Comparison:
        """With the model's first days in service where they can tell, or else with the training data."""
        in_service = self.against.get("in_service")
        return in_service if in_service is not None and in_service.aspects else self.against["training"]

    @property
    def effect(self) -> float:
        """Largest effect of `main` in units of its threshold; 0 where nothing was compared."""
        tests = self.main.aspects.values()
        return max((abs(test.effect) / test.threshold for test in tests), default=0.0)


class DriftFinding(JsonModel):
    """Drift of the features, of the predictions or of the labels."""

    status: DriftStatus
    score: float | None
    """Features: importance of the columns that drifted, in [0, 1]. One column: its effect in units of the threshold.
    Null: unknown."""
    columns: tuple[str, ...] = ()
    """Those that drifted, or are seasonal where the status is; the most important first."""
    reason: str
    threshold: float | None = None
    """Score from which the status is no longer stable."""
    rows: int = 0
    effective_users: float = 0.0
    """How many users with equally many rows would tell as much: (sum n)^2 / sum n^2."""
    details: dict[str, ColumnDrift] = Field(default_factory=dict)
    left_out: dict[str, str] = Field(default_factory=dict)
    """Columns that are not compared, with the reason."""


class SignalKind(StrEnum):
    """What a signal measures."""

    NULLS = "nulls"  # share of rows
    CONSTANT = "constant"  # share of the rows that have the most frequent value of all
    FRESHNESS = "freshness"  # median age in seconds
    VOLUME = "volume"  # requests observed / expected
    SCHEMA = "schema"  # number of changes
    SKEW = "skew"  # share of rows
    DEGRADED = "degraded"  # share of rows
    UNKNOWN_USERS = "unknown_users"  # share of rows
    UNKNOWN_ITEMS = "unknown_items"  # share of rows
    SUSPICIOUS = "suspicious"  # share of rows


class Signal(JsonModel):
    """A measurement of the data's health."""

    kind: SignalKind
    subject: str = ""
    """A feature's name, or empty for the whole log."""
    value: float | None
    """In the unit of its kind; null: unknown."""
    reference: float | None = None
    """The same in the reference, where there is one."""
    rows: int
    """That the value was measured on; volume: expected requests."""
    reason: str
    """For people."""


class MonitoringReport(JsonModel):
    """A window of impressions, [start, end) by event_timestamp."""

    as_of: AwareDatetime
    start: AwareDatetime
    end: AwareDatetime
    model_version: str
    """That served the window's last request."""
    model_versions: dict[str, int]
    """Rows by version."""
    trained_as_of: AwareDatetime | None
    """Moment up to which that model knows the world; null: not known."""
    requests: int
    estimated_requests: float
    """Those that were answered: each logged one stands for 1 / sampling_rate."""
    hourly_requests: tuple[float, ...]
    """The same in each hour from the start on; the last may be shorter."""
    rows: int
    users: int
    feature_drift: DriftFinding
    prediction_drift: DriftFinding
    label_drift: DriftFinding
    signals: tuple[Signal, ...]
    quality: QualityReport | None
    """Null: no outcomes were given."""
    notes: tuple[str, ...] = ()
    """What a reader should know of how this was measured."""

    def signals_of(self, kind: SignalKind) -> tuple[Signal, ...]:
        """The signals of one kind."""
        return tuple(signal for signal in self.signals if signal.kind is kind)
