"""How good are the models that serve? Measured on matured outcomes, and estimated before labels mature.

Measured: every figure with an interval that resamples users, by model and by day, beside what the model was expected to
reach. A row stands for as many as its `sampling_rate` says. Scores are for the average position, clicks happen at a
position: with the model's position effects, scores are first moved to where the item was shown, as its evaluation does.

Estimated: calibrated scores say themselves how much they know (confidence-based performance estimation: Garg et al.
2022; NannyML's CBPE). Scores are corrected by what they turned out to mean on the matured rows; then the expected log
loss of a row needs no label. This sees that the model is asked about users and items of whom it knows less. It cannot
see that people click otherwise at the same score: only matured labels show that.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from datetime import date, datetime, timedelta

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from evergreen.contracts.artifact import JsonModel
from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.evaluation import Estimate, Evaluation
from evergreen.contracts.outcomes import Outcomes
from evergreen.contracts.quality import (
    Comparison,
    DayQuality,
    EstimatedQuality,
    ModelQuality,
    QualityFigures,
    QualityReport,
    Reference,
)
from evergreen.metrics.binary import (
    PROBABILITY_FLOOR,
    Auc,
    CalibrationError,
    ClickRateRatio,
    NormalizedEntropy,
)
from evergreen.metrics.bootstrap import Bootstrap, cluster_bootstrap
from evergreen.metrics.statistic import FloatArray, Mean, Statistic
from evergreen.models.calibration import Calibration, fit_platt
from evergreen.monitoring.quality_rows import DRAWN, Reader, Rows, ServedModel, logits_of

_EPOCH = date(1970, 1, 1)


class QualityConfig(JsonModel):
    """What is measured, and on how much."""

    min_rows: int = Field(default=200, ge=1)
    """Below it a model or a day has counts and no figure …"""
    min_clicks: int = Field(default=10, ge=1)
    """… and so with fewer clicks …"""
    min_users: int = Field(default=20, ge=2)
    """… or users, which is what the bootstrap draws."""
    max_rows: int = Field(default=500_000, ge=1000)
    """Of the range; beyond it users are drawn, for time grows with rows times replicates."""
    num_replicates: int = Field(default=200, ge=20)
    calibration_bins: int = Field(default=10, ge=2)
    seed: int = 0


class Weighted:
    """A statistic of rows of which each stands for several."""

    def __init__(self, statistic: Statistic, weights: FloatArray) -> None:
        self._statistic, self._weights = statistic, weights

    @property
    def num_rows(self) -> int:
        """How many rows it is computed from."""
        return self._statistic.num_rows

    def __call__(self, weights: FloatArray) -> float:
        """The statistic, each row counted `weights` times what it stands for."""
        return self._statistic(weights * self._weights)


class ClickRateChange:
    """Click rate of some rows relative to that of the others, minus 1."""

    def __init__(self, labels: FloatArray, is_new: NDArray[np.bool_]) -> None:
        self._labels, self._is_new = labels, is_new.astype(np.float64)

    @property
    def num_rows(self) -> int:
        """How many rows it is computed from."""
        return len(self._labels)

    def __call__(self, weights: FloatArray) -> float:
        """The change; nan when one side has no weight, or the others no click."""
        new, old = weights * self._is_new, weights * (1 - self._is_new)
        clicks = old @ self._labels
        if new.sum() <= 0 or clicks <= 0:
            return float("nan")
        return float((new @ self._labels / new.sum()) / (clicks / old.sum()) - 1)


class ExpectedNormalizedEntropy:
    """Normalized entropy to be expected of probabilities, if clicks come as often as others say.

    Args:
        probabilities: (num_rows,) what the model says.
        believed: (num_rows,) what it turned out to mean.
    """

    def __init__(self, probabilities: FloatArray, believed: FloatArray) -> None:
        p = np.clip(probabilities, PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
        self._loss = -(believed * np.log(p) + (1 - believed) * np.log1p(-p))
        self._believed = believed

    @property
    def num_rows(self) -> int:
        """How many rows it is computed from."""
        return len(self._loss)

    def __call__(self, weights: FloatArray) -> float:
        """The ratio, at least 0; nan when all weights are 0."""
        total = weights.sum()
        if total <= 0:
            return float("nan")
        rate = weights @ self._believed / total
        entropy = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))
        return float(weights @ self._loss / total / entropy)


def measure_quality(
    outcomes: Outcomes,
    *,
    as_of: datetime,
    start: datetime,
    end: datetime,
    models: Mapping[str, ServedModel] | None = None,
    references: Mapping[str, Reference] | None = None,
    trained_as_of: datetime | None = None,
    config: QualityConfig | None = None,
) -> QualityReport:
    """Measure every model that served in a range of time, and estimate the last one's quality on what is not mature.

    Args:
        outcomes: of a log with probabilities.
        as_of: what was known then.
        start: impressions from it on, by event_timestamp …
        end: … and before it.
        models: by version: their positions and calibrations. Without one, scores are measured as they were served.
        references: by version: what they are expected to reach.
        trained_as_of: the moment up to which the last model knows the world, to count what has matured since.
        config: how much is needed, and how often it is drawn.

    Raises:
        ArtifactError: a score is no probability: the log is one of ratings.
    """
    config = config or QualityConfig()
    reader = Reader(outcomes, models or {}, max_rows=config.max_rows, seed=config.seed)
    reader.read(as_of=as_of, start=start, end=end)
    mature, immature = reader.mature, reader.immature
    measured = [version for version in reader.versions if version in mature]
    references = references or {}
    return QualityReport(
        as_of=as_of,
        start=start,
        end=end,
        window_seconds=outcomes.manifest.window_seconds,
        matured_rows=reader.counts["mature"],
        immature_rows=reader.counts["immature"],
        degraded_rows=reader.counts["degraded"],
        new_matured_rows=_matured_since(outcomes, trained_as_of, as_of) if trained_as_of is not None else None,
        left_out={DRAWN: drawn} if (drawn := reader.counts[DRAWN]) else {},
        models=tuple(_model_quality(v, mature[v], references.get(v), config) for v in measured),
        comparisons=tuple(
            _compare(new, old, mature[new], mature[old], config) for old, new in itertools.combinations(measured, 2)
        ),
        estimated=_estimate(reader.versions[-1], mature, immature, config) if immature else None,
    )


def reference_of_evaluation(evaluation: Evaluation, version: str) -> Reference:
    """What a model reached on the test rows of its evaluation.

    Test rows were chosen by another model. One that shows what it takes for best has less left to tell apart, so in
    service its normalized entropy is higher, though nothing is wrong; `reference_in_service` compares like with like.

    Raises:
        ArtifactError: that version was not evaluated, or not by its probabilities.
    """
    found = next((m for m in evaluation.result.models if m.version == version), None)
    if found is None or "normalized_entropy" not in found.metrics:
        raise ArtifactError(f"{evaluation.path}: has no normalized entropy of {version}: is it of another run?")
    return Reference(
        source=f"test rows of its evaluation, {evaluation.result.test_start} to {evaluation.result.test_end}",
        normalized_entropy=found.metrics["normalized_entropy"],
        calibration_ratio=found.metrics["click_rate_ratio"],
        auc=found.metrics["auc"],
    )


def reference_in_service(
    outcomes: Outcomes,
    version: str,
    *,
    as_of: datetime,
    start: datetime,
    end: datetime,
    model: ServedModel | None = None,
    config: QualityConfig | None = None,
) -> Reference | None:
    """What a model reached in its first days in service; None: too little has matured of them.

    Args:
        outcomes: of a log with probabilities.
        version: of the model.
        as_of: what was known then.
        start: when it was released …
        end: … and the end of its first days.
        model: as in `measure_quality`.
        config: as in `measure_quality`.
    """
    models = {version: model} if model is not None else None
    report = measure_quality(outcomes, as_of=as_of, start=start, end=end, models=models, config=config)
    found = report.model(version)
    if found is None or found.figures.normalized_entropy.value is None:
        return None
    figures = found.figures
    return Reference(
        source=f"first days in service, {start} to {end}",
        normalized_entropy=figures.normalized_entropy,
        calibration_ratio=figures.calibration_ratio,
        auc=figures.auc,
    )


def _model_quality(version: str, rows: Rows, reference: Reference | None, config: QualityConfig) -> ModelQuality:
    figures = _figures(rows, config)
    days = rows.hours // 24
    none = Estimate(value=None, reason="no reference was given")
    return ModelQuality(
        model_version=version,
        figures=figures,
        days=tuple(
            DayQuality(date=_EPOCH + timedelta(days=int(day)), figures=_figures(rows.where(days == day), config))
            for day in np.unique(days)
        ),
        reference=reference,
        entropy_change=relative_change(figures.normalized_entropy, reference.normalized_entropy) if reference else none,
        calibration_change=relative_change(figures.calibration_ratio, reference.calibration_ratio)
        if reference
        else none,
    )


def _figures(rows: Rows, config: QualityConfig) -> QualityFigures:
    counts = _counts(rows)
    names = ("click_rate", "normalized_entropy", "calibration_ratio", "calibration_error", "auc")
    reason = _too_few(counts, config)
    if reason is not None:
        return QualityFigures.model_validate(counts | dict.fromkeys(names, Estimate(value=None, reason=reason)))
    y, p = rows.labels, rows.probabilities
    statistics: dict[str, Statistic] = {
        "click_rate": Mean(y),
        "normalized_entropy": NormalizedEntropy(y, p),
        "calibration_ratio": ClickRateRatio(y, p),
        "calibration_error": CalibrationError(y, p, num_bins=config.calibration_bins),
        "auc": Auc(y, p),
    }
    bootstrap = _bootstrap(statistics, rows, config)
    return QualityFigures.model_validate(counts | {name: _estimate_of(bootstrap, name) for name in names})


def _too_few(counts: Mapping[str, int], config: QualityConfig) -> str | None:
    """Why rows say nothing; None: they do."""
    for what, need in (("rows", config.min_rows), ("clicks", config.min_clicks), ("users", config.min_users)):
        if what in counts and counts[what] < need:
            return f"{counts[what]} {what}, at least {need} are needed"
    return None


def _bootstrap(statistics: Mapping[str, Statistic], rows: Rows, config: QualityConfig) -> Bootstrap:
    weighted = {name: Weighted(statistic, rows.weights) for name, statistic in statistics.items()}
    return cluster_bootstrap(weighted, rows.users, num_replicates=config.num_replicates, seed=config.seed)


def _estimate_of(bootstrap: Bootstrap, name: str) -> Estimate:
    interval = bootstrap.interval(name)
    if not np.isfinite([interval.value, interval.low, interval.high]).all():
        return Estimate(value=None, reason="undefined on these rows: all are clicks, or none is")
    return Estimate(value=interval.value, low=interval.low, high=interval.high)


def relative_change(new: Estimate, old: Estimate) -> Estimate:
    """How much larger a positive figure is than another that was measured on other rows, e.g. +0.02.

    The intervals are put together in logarithms as those of independent figures are: by the root of the sum of squares.
    A figure without an interval counts as exact.
    """
    for estimate, whose in ((new, "this window"), (old, "the reference")):
        if estimate.value is None:
            return Estimate(value=None, reason=f"{whose}: {estimate.reason}")
        if estimate.value <= 0 or (estimate.low is not None and estimate.low <= 0):
            return Estimate(value=None, reason=f"{whose}: {estimate.value:g} has no ratio")
    assert new.value is not None and old.value is not None
    change = np.log(new.value / old.value)
    down = np.hypot(np.log(new.value / (new.low or new.value)), np.log((old.high or old.value) / old.value))
    up = np.hypot(np.log((new.high or new.value) / new.value), np.log(old.value / (old.low or old.value)))
    return Estimate(
        value=float(np.expm1(change)), low=float(np.expm1(change - down)), high=float(np.expm1(change + up))
    )


def _compare(new: str, old: str, of_new: Rows, of_old: Rows, config: QualityConfig) -> Comparison:
    """A model with the one before it, in the hours in which both served if these are enough."""
    shared = np.intersect1d(of_new.hours, of_old.hours)
    beside = [rows.where(np.isin(rows.hours, shared)) for rows in (of_new, of_old)]
    side_by_side = all(_too_few(_counts(rows), config) is None for rows in beside)
    one, other = beside if side_by_side else (of_new, of_old)
    # The new one may have no click at all; that is what is to be found.
    reason = _too_few({name: n for name, n in _counts(one).items() if name != "clicks"}, config)
    reason = reason or _too_few(_counts(other), config)
    change = Estimate(value=None, reason=reason)
    if reason is None:
        rows = Rows.together([one, other])
        statistic = ClickRateChange(rows.labels, np.arange(len(rows)) < len(one))
        change = _estimate_of(_bootstrap({"change": statistic}, rows, config), "change")
    return Comparison(
        model_version=new,
        against=old,
        side_by_side=side_by_side,
        rows=len(one),
        against_rows=len(other),
        click_rate_change=change,
    )


def _estimate(
    version: str, mature: Mapping[str, Rows], immature: Mapping[str, Rows], config: QualityConfig
) -> EstimatedQuality | None:
    """What to expect of a model's impressions that are not mature, by what its scores meant on those that are."""
    if version not in immature:
        return None
    rows, seen = immature[version], mature.get(version)
    reason = "nothing of this model is mature" if seen is None else _too_few(_counts(seen), config)
    reason = reason or _too_few({n: c for n, c in _counts(rows).items() if n != "clicks"}, config)
    if seen is None or reason is not None:
        none = Estimate(value=None, reason=reason)
        return EstimatedQuality(
            model_version=version, rows=len(rows), normalized_entropy=none, click_rate=none, entropy_change=none
        )
    meaning = fit_platt(logits_of(seen.probabilities), seen.labels)
    expected, known = (_expected(part, meaning, config) for part in (rows, seen))
    entropy = _estimate_of(expected, "normalized_entropy")
    return EstimatedQuality(
        model_version=version,
        rows=len(rows),
        normalized_entropy=entropy,
        click_rate=_estimate_of(expected, "click_rate"),
        entropy_change=relative_change(entropy, _estimate_of(known, "normalized_entropy")),
    )


def _expected(rows: Rows, meaning: Calibration, config: QualityConfig) -> Bootstrap:
    believed = meaning.apply(logits_of(rows.probabilities))
    statistics: dict[str, Statistic] = {
        "normalized_entropy": ExpectedNormalizedEntropy(rows.probabilities, believed),
        "click_rate": Mean(believed),
    }
    return _bootstrap(statistics, rows, config)


def _counts(rows: Rows) -> dict[str, int]:
    return {"rows": len(rows), "clicks": int(rows.labels.sum()), "users": len(np.unique(rows.users))}


def _matured_since(outcomes: Outcomes, moment: datetime, as_of: datetime) -> int:
    """Matured rows of impressions from a moment on."""
    tables = outcomes.rows(as_of=as_of, start=moment, mature=True, columns=("event_timestamp",))
    return sum(table.num_rows for table in tables)
