"""The quality report: how well each model that served was right, measured on matured outcomes, and what is unknown.

Every figure is an `Estimate`: a value with its 95 % interval, resampled by user, or no value and the reason why. What
rests on too few rows has no value; nothing that reads a report can mistake it for a measurement.
"""

from __future__ import annotations

from datetime import date

from pydantic import AwareDatetime

from evergreen.contracts.artifact import JsonModel
from evergreen.contracts.evaluation import Estimate


class QualityFigures(JsonModel):
    """Metrics of some impressions of one model."""

    rows: int
    clicks: int
    users: int
    """What the bootstrap draws; a request without a user stands for itself."""
    click_rate: Estimate
    normalized_entropy: Estimate
    calibration_ratio: Estimate
    """Predicted clicks over actual ones; 1 is calibrated, above 1 promises too much."""
    calibration_error: Estimate
    auc: Estimate


class DayQuality(JsonModel):
    """One model on one day, by event_timestamp in UTC."""

    date: date
    figures: QualityFigures


class Reference(JsonModel):
    """What a model is expected to reach: that of its evaluation, or of its first days in service."""

    source: str
    """Where the figures come from, for people."""
    normalized_entropy: Estimate
    calibration_ratio: Estimate
    auc: Estimate


class ModelQuality(JsonModel):
    """One model on its matured impressions of the window."""

    model_version: str
    figures: QualityFigures
    days: tuple[DayQuality, ...]
    reference: Reference | None
    """None: nobody gave one."""
    entropy_change: Estimate
    """Normalized entropy relative to the reference's: +0.02 is 2 % worse."""
    calibration_change: Estimate
    """Calibration ratio relative to the reference's: +0.1 promises 10 % more clicks for each that comes."""


class Comparison(JsonModel):
    """A model against the one that it replaced."""

    model_version: str
    against: str
    side_by_side: bool
    """Both served in the hours that are compared. Otherwise each has its own, and the world may have changed."""
    rows: int
    against_rows: int
    click_rate_change: Estimate
    """Click rate relative to that of `against`: -0.1 is a tenth fewer clicks."""
    replayed_change: Estimate | None = None
    """Normalized entropy of `against` relative to this model's, on what this one has shown and at the level of clicks
    there: -0.1 says that `against` would have ordered it a tenth better. None: not asked for."""

    def turned_around(self) -> Comparison:
        """The same from the other's side."""
        change = self.click_rate_change
        if change.value is not None and change.low is not None and change.high is not None:
            if change.low > -1:
                change = Estimate(
                    value=1 / (1 + change.value) - 1, low=1 / (1 + change.high) - 1, high=1 / (1 + change.low) - 1
                )
            else:
                change = Estimate(value=None, reason=f"{self.model_version} has hardly a click, so there is no ratio")
        return Comparison(
            model_version=self.against,
            against=self.model_version,
            side_by_side=self.side_by_side,
            rows=self.against_rows,
            against_rows=self.rows,
            click_rate_change=change,
        )


class EstimatedQuality(JsonModel):
    """What to expect of impressions whose labels are not mature, from their scores; no label of theirs is read.

    It sees that the model is asked about other users and items, for whom its scores say less. It cannot see that people
    click otherwise than they did at the same score: only matured labels show that.
    """

    model_version: str
    rows: int
    normalized_entropy: Estimate
    """Expected, if scores mean what they meant on the matured rows."""
    click_rate: Estimate
    entropy_change: Estimate
    """Relative to what the same formula expects of the matured rows; +0.02 is 2 % worse."""


class QualityReport(JsonModel):
    """quality.json: what was measured as of a moment."""

    as_of: AwareDatetime
    start: AwareDatetime
    end: AwareDatetime
    """Half-open range of event_timestamp."""
    window_seconds: float
    """Attribution window: a label is mature when it is over."""
    matured_rows: int
    immature_rows: int
    degraded_rows: int
    """Of the matured; they are measured like the others, as people saw them."""
    new_matured_rows: int | None
    """Of all matured rows, also before the range, those that are younger than what the last model was trained on; null:
    nobody said up to when it knows the world."""
    left_out: dict[str, int]
    """Matured rows that were not measured, by reason."""
    models: tuple[ModelQuality, ...]
    """The one with the most recent impression last."""
    comparisons: tuple[Comparison, ...]
    """Of every two models."""
    estimated: EstimatedQuality | None
    """Of the last model; None: no immature impressions of it."""

    def model(self, version: str) -> ModelQuality | None:
        """The figures of one model; None where it had no matured impression."""
        return next((model for model in self.models if model.model_version == version), None)

    def comparison(self, version: str, against: str) -> Comparison | None:
        """The comparison of two models, whichever way round it was made; None where one had no matured impression."""
        for found in self.comparisons:
            if (found.model_version, found.against) == (version, against):
                return found
            if (found.model_version, found.against) == (against, version):
                return found.turned_around()
        return None
