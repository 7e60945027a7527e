"""The drift gate: which columns of a window are unlike their references, by much and not by chance?

Per column and reference three aspects are tested: the mean of a number, how known values are spread over the cells of
the reference, and the share that is missing. An aspect drifted when

  - its effect is large: significance alone finds a shift of 0.02 standard deviations in 100,000 rows, which no model
    cares about, and
  - it is significant with rows of one user taken together (`monitoring.statistics`), after Benjamini-Hochberg over all
    aspects of all columns against that reference: 30 columns are 70 chances to be unlucky.

A column that differs from the training data as a whole, but not from the same weekdays in it, is seasonal: the model
has seen such days. `same_weekday` is therefore of days that it was trained on. Were it of last week, every lasting
change would clear itself after seven days.

What is shown depends on who chooses it: a model's own choices differ from the rows that it learned from, without any
change in the world. So a column that is as it was in the model's first days in service is stable.

What carries little of the model's importance does not raise the alarm: the score of a window is the importance of the
columns that drifted.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from pydantic import Field
from scipy import stats

from evergreen.contracts.artifact import JsonModel
from evergreen.contracts.monitoring_report import (
    Aspect,
    AspectTest,
    ColumnDrift,
    Comparison,
    DriftFinding,
    DriftStatus,
)
from evergreen.monitoring.profile import CategoryCells, Cells, NumberCells, Profile
from evergreen.monitoring.statistics import (
    benjamini_hochberg,
    jensen_shannon,
    mean_p_value,
    normal_scores,
    shape_p_value,
)

TRAINING = "training"
SAME_WEEKDAY = "same_weekday"
IN_SERVICE = "in_service"


class GateConfig(JsonModel):
    """When a column drifted."""

    max_false_discoveries: float = Field(default=0.002, gt=0, lt=1)
    """Share of the columns called significant that may be so by chance; in a world without drift, the share of windows
    with such a column. The promise is one false alarm in 100 windows, of which features, predictions and labels each
    take a part, against two references."""
    min_location: float = Field(default=0.1, gt=0)
    """Standard deviations of the reference. A normal distribution that moved so far still has 96 % in common with what
    it was."""
    min_shape: float = Field(default=0.1, gt=0)
    """Numbers: how far values moved on average, in standard deviations. It is not asked how many changed their
    cell: a smoothed rate is nearly constant, and would change all its cells each day for nothing. Categories:
    Jensen-Shannon distance; 0.1 is a category that grew from 10 % to 18 %."""
    min_relative: float = Field(default=0.2, gt=0)
    """Of the mean, for predictions and labels that are probabilities: mean and shape. Click rates move by a tenth from
    day to day, for all users alike, which no test by user takes for chance."""
    min_missing: float = Field(default=0.05, gt=0, le=1)
    """Share of the rows that lost or gained the value."""
    min_effective_users: float = Field(default=50.0, ge=10)
    """Below, nothing is decided: the spread from user to user is not known well enough for small p-values."""
    min_score: float = Field(default=0.05, gt=0, le=1)
    """Importance that must have drifted. Of 30 columns alike it takes two; one that matters is enough."""


def drift_gate(
    current: Profile,
    references: Mapping[str, Profile],
    *,
    weights: Mapping[str, float] | None = None,
    config: GateConfig | None = None,
) -> DriftFinding:
    """Judge a window.

    Args:
        current: the window, counted in the cells of the training reference.
        references: TRAINING, and SAME_WEEKDAY and IN_SERVICE where there are such, counted in the same cells.
        weights: importance of columns, not negative; of those compared they are scaled to add up to 1. A column that is
            not named has none. None: all are alike.
        config: when a column drifted.

    Raises:
        ValueError: the training reference is absent, a reference was counted in other cells, or a weight is negative.
    """
    config = config or GateConfig()
    _check(current, references, weights)
    names = list(current.columns)
    compared = {label: _compare_all(current, reference, config) for label, reference in references.items()}
    shares = _shares_of_importance(names, weights)
    details = {
        name: ColumnDrift(
            status=_status({label: columns[name] for label, columns in compared.items()}),
            weight=shares[name],
            mean=current.columns[name].mean,
            missing_share=current.columns[name].missing_share,
            against={label: columns[name] for label, columns in compared.items()},
        )
        for name in names
    }
    left_out = dict.fromkeys(current.unseen, "ids: only the share of unseen ones is told")
    return _finding(current, details, left_out, config)


def drift_of_column(
    name: str, current: Profile, references: Mapping[str, Profile], *, config: GateConfig | None = None
) -> DriftFinding:
    """Judge one column alone: predictions, or labels.

    Args:
        name: of the column.
        current: the window, as in `drift_gate`.
        references: as in `drift_gate`.
        config: when it drifted; its `min_score` is not used.

    Raises:
        ValueError: as `drift_gate`, or there is no such column.
    """
    finding = drift_gate(
        _only(name, current), {label: _only(name, p) for label, p in references.items()}, config=config
    )
    column = finding.details[name]
    return finding.model_copy(
        update={
            "score": None if column.main.drifted is None else column.effect,
            "threshold": 1.0,
            "reason": f"{name}: {describe(column)}",
        }
    )


def unknown(reason: str) -> DriftFinding:
    """The finding where there was nothing to compare."""
    return DriftFinding(status=DriftStatus.UNKNOWN, score=None, reason=reason)


def _check(current: Profile, references: Mapping[str, Profile], weights: Mapping[str, float] | None) -> None:
    if TRAINING not in references:
        raise ValueError(f"references {sorted(references)}: {TRAINING!r} is needed")
    for label, reference in references.items():
        if reference.cells != current.cells:
            raise ValueError(
                f"the window was not counted in the cells of {label!r}: pass the reference's to make_profile"
            )
    if negative := [name for name, weight in (weights or {}).items() if not weight >= 0]:
        raise ValueError(f"weight of {negative[0]!r}: {(weights or {})[negative[0]]}, must be at least 0")


def _shares_of_importance(names: list[str], weights: Mapping[str, float] | None) -> dict[str, float]:
    given = {name: 1.0 if weights is None else weights.get(name, 0.0) for name in names}
    total = sum(given.values())
    return {name: weight / total if total > 0 else 1 / len(names) for name, weight in given.items()}


def _compare_all(current: Profile, reference: Profile, config: GateConfig) -> dict[str, Comparison]:
    """Every column against one reference; multiple testing is controlled over all of them."""
    for label, users in (("the window", current.effective_users), ("the reference", reference.effective_users)):
        if users < config.min_effective_users:
            reason = f"{label} has {users:.1f} effective users, at least {config.min_effective_users:g} are needed"
            return {name: Comparison(drifted=None, reason=reason) for name in current.columns}
    tests = {name: _test(name, current, reference) for name in current.columns}
    keys = [(name, aspect) for name, aspects in tests.items() for aspect in aspects]
    adjusted = benjamini_hochberg([tests[name][aspect][1] for name, aspect in keys])
    results: dict[str, dict[Aspect, AspectTest]] = {name: {} for name in tests}
    for (name, aspect), q in zip(keys, adjusted, strict=True):
        effect, p_value = tests[name][aspect]
        threshold = _threshold(current.cells[name], aspect, config)
        results[name][aspect] = AspectTest(
            effect=effect,
            threshold=threshold,
            p_value=p_value,
            adjusted_p_value=float(q),
            drifted=abs(effect) >= threshold and bool(q <= config.max_false_discoveries),
        )
    return {
        name: Comparison(drifted=any(test.drifted for test in aspects.values()), aspects=aspects)
        for name, aspects in results.items()
    }


def _threshold(cells: Cells, aspect: Aspect, config: GateConfig) -> float:
    if aspect is Aspect.MISSING:
        return config.min_missing
    if isinstance(cells, NumberCells) and cells.is_relative:
        return config.min_relative
    return config.min_location if aspect is Aspect.LOCATION else config.min_shape


def _test(name: str, current: Profile, reference: Profile) -> dict[Aspect, tuple[float, float]]:
    """Effect and p-value of each aspect of a column that can differ at all."""
    ours, theirs = current.columns[name], reference.columns[name]
    one, other = ours.cell_shares(current.effective_users), theirs.cell_shares(reference.effective_users)
    tests: dict[Aspect, tuple[float, float]] = {}
    if ours.missing_share or theirs.missing_share:
        effect = ours.missing_share - theirs.missing_share
        is_missing = np.eye(len(ours.shares))[-1]
        tests[Aspect.MISSING] = (effect, mean_p_value(one, other, is_missing))
    if min(sum(ours.shares[:-1]), sum(theirs.shares[:-1])) == 0:
        return tests
    one, other = one.known(), other.known()
    cells, p_value = current.cells[name], shape_p_value(one, other)
    if isinstance(cells, CategoryCells):
        tests[Aspect.SHAPE] = (jensen_shannon(one.shares, other.shares), p_value)
    elif isinstance(cells, NumberCells) and cells.unit > 0 and ours.mean is not None and theirs.mean is not None:
        effect = (ours.mean - theirs.mean) / cells.unit
        tests[Aspect.LOCATION] = (effect, mean_p_value(one, other, normal_scores(other.shares)))
        distance = stats.wasserstein_distance(ours.places, theirs.places, ours.masses, theirs.masses) / cells.unit
        tests[Aspect.SHAPE] = (float(distance), p_value)
    elif not np.array_equal(one.shares, other.shares):
        tests[Aspect.SHAPE] = (jensen_shannon(one.shares, other.shares), p_value)
    return tests


def _status(against: Mapping[str, Comparison]) -> DriftStatus:
    training = against[TRAINING]
    if training.drifted is None:
        return DriftStatus.UNKNOWN
    if not training.drifted or _is_near(against.get(IN_SERVICE)):
        return DriftStatus.STABLE
    return DriftStatus.SEASONAL if _is_near(against.get(SAME_WEEKDAY)) else DriftStatus.DRIFTED


def _is_near(reference: Comparison | None) -> bool:
    """Only a difference that is small clears a column; one that cannot be told from chance may still be large."""
    if reference is None or not reference.aspects:
        return False
    return all(abs(test.effect) < test.threshold for test in reference.aspects.values())


def _finding(
    current: Profile, details: dict[str, ColumnDrift], left_out: dict[str, str], config: GateConfig
) -> DriftFinding:
    weight = {
        status: sum(column.weight for column in details.values() if column.status is status) for status in DriftStatus
    }
    if not details:
        status, reason = DriftStatus.UNKNOWN, "there is no column to compare"
    elif weight[DriftStatus.DRIFTED] >= config.min_score:
        status, reason = DriftStatus.DRIFTED, ""
    elif weight[DriftStatus.UNKNOWN] > 0.5:
        status, reason = DriftStatus.UNKNOWN, next(iter(details.values())).against[TRAINING].reason or ""
    elif weight[DriftStatus.SEASONAL] >= config.min_score:
        status, reason = DriftStatus.SEASONAL, ""
    else:
        status, reason = DriftStatus.STABLE, ""
    shown = DriftStatus.SEASONAL if status is DriftStatus.SEASONAL else DriftStatus.DRIFTED
    names = sorted((n for n, c in details.items() if c.status is shown), key=lambda n: (-details[n].weight, n))
    if not reason:
        words = ", ".join(f"{name} ({describe(details[name])})" for name in names[:5]) or "none"
        reason = f"{len(names)} of {len(details)} columns {shown.value}, {weight[shown]:.0%} of importance: {words}"
    return DriftFinding(
        status=status,
        score=None if status is DriftStatus.UNKNOWN else weight[DriftStatus.DRIFTED],
        columns=tuple(names),
        reason=reason,
        threshold=config.min_score,
        rows=current.rows,
        effective_users=current.effective_users,
        details=details,
        left_out=left_out,
    )


def describe(column: ColumnDrift) -> str:
    """A column against what it is compared with first, in words."""
    if column.main.reason is not None:
        return column.main.reason
    tests = column.main.aspects
    shown = {aspect: test for aspect, test in tests.items() if test.drifted} or tests
    return ", ".join(f"{aspect.value} {test.effect:+.2f}" for aspect, test in shown.items()) or "alike"


def _only(name: str, profile: Profile) -> Profile:
    if name not in profile.columns:
        raise ValueError(f"column {name!r}: not among {sorted(profile.columns)}")
    return profile.model_copy(
        update={"cells": {name: profile.cells[name]}, "columns": {name: profile.columns[name]}, "unseen": {}}
    )
