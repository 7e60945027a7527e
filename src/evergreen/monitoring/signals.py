"""Signals: is the data whole? Shares, ages and ratios beside what is usual, without a verdict."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta

import numpy as np
from pydantic import Field

from evergreen.contracts.artifact import JsonModel
from evergreen.contracts.monitoring_report import MonitoringReport, Signal, SignalKind
from evergreen.monitoring.profile import Profile
from evergreen.monitoring.skew import SkewReport
from evergreen.monitoring.statistics import FloatArray

HOUR = timedelta(hours=1)
_STRETCH_HOURS = 3


class VolumeConfig(JsonModel):
    """Which hours tell what is usual."""

    days: int = Field(default=28, ge=1)
    """Earlier days whose hours are read."""
    min_same_hours: int = Field(default=3, ge=1)
    """Hours that it takes to know: of the same weekday where there are so many, else of any day."""


def volume_of_requests(
    hours: FloatArray, start: datetime, earlier: Sequence[MonitoringReport], config: VolumeConfig
) -> list[Signal]:
    """Requests against the same hours before: the whole window, and its emptiest and fullest three hours.

    Args:
        hours: (num_hours,) requests in each hour of the window.
        start: of the window.
        earlier: reports of windows before it, in any order.
        config: which of their hours are read.
    """
    before = _requests_before(start, earlier, config)
    usual = np.array([_usual(start + hour * HOUR, before, config) for hour in range(len(hours))])
    known = np.isfinite(usual)
    if not usual[known].sum() > 0:
        reason = f"{hours.sum():,.0f} requests; too few hours before the window to know what is usual"
        return [Signal(kind=SignalKind.VOLUME, value=None, rows=0, reason=reason)]
    signals = [_volume("", hours[known].sum(), usual[known].sum())]
    stretches = []
    for first in range(0, len(hours) - _STRETCH_HOURS + 1, _STRETCH_HOURS):
        part = slice(first, first + _STRETCH_HOURS)
        if known[part].all() and usual[part].sum() > 0:
            subject = f"{_STRETCH_HOURS} hours from {start + first * HOUR:%Y-%m-%dT%H:%M}"
            stretches.append(_volume(subject, hours[part].sum(), usual[part].sum()))
    if len(stretches) > 1:
        stretches.sort(key=lambda signal: signal.value or 0.0)
        signals += [stretches[0], stretches[-1]]
    return signals


def _volume(subject: str, seen: float, expected: float) -> Signal:
    return Signal(
        kind=SignalKind.VOLUME,
        subject=subject,
        value=float(seen / expected),
        reference=1.0,
        rows=round(expected),
        reason=f"{subject or 'the window'}: {seen:,.0f} requests, {expected:,.0f} are usual",
    )


def _requests_before(
    start: datetime, earlier: Sequence[MonitoringReport], config: VolumeConfig
) -> dict[datetime, float]:
    """Requests by the start of the hour; of windows that overlap, the last report's."""
    reports = sorted((r for r in earlier if r.end <= start), key=lambda report: report.as_of)
    hours = {r.start + number * HOUR: value for r in reports for number, value in enumerate(r.hourly_requests)}
    oldest = start - timedelta(days=config.days)
    return {hour: requests for hour, requests in hours.items() if hour >= oldest}


def _usual(hour: datetime, before: Mapping[datetime, float], config: VolumeConfig) -> float:
    """Median of the same hours before; NaN: too few."""
    moments = {days: hour - timedelta(days=days) for days in range(1, config.days + 1)}
    same = {days: before[moment] for days, moment in moments.items() if moment in before}
    of_week = [requests for days, requests in same.items() if days % 7 == 0]
    values = of_week if len(of_week) >= config.min_same_hours else list(same.values())
    return float(np.median(values)) if len(values) >= config.min_same_hours else math.nan


def schema_changes(changes: Collection[str], *, rows: int) -> Signal:
    """Features that came, went or are of another type.

    Args:
        changes: in words.
        rows: that were looked at.
    """
    reason = "; ".join(sorted(changes)) or "the features are those of the model"
    return Signal(kind=SignalKind.SCHEMA, value=float(len(changes)) if rows else None, rows=rows, reason=reason)


def degraded_answers(degraded: int, *, rows: int) -> Signal:
    """Rows that defaults stand in."""
    share = degraded / rows if rows else None
    words = "no rows" if share is None else f"{share:.1%} of the rows were answered without all features"
    return Signal(kind=SignalKind.DEGRADED, value=share, rows=rows, reason=words)


def suspicious_rows(share: float | None, *, rows: int) -> Signal:
    """Rows that look like those of bots; None: nobody looked."""
    words = "not looked for" if share is None else f"{share:.1%} of the rows look like those of bots"
    return Signal(kind=SignalKind.SUSPICIOUS, value=share, rows=rows, reason=words)


def health_of_features(current: Profile, usual: Profile) -> list[Signal]:
    """How much of each feature is missing, and how much is one value: zeros that a broken pipeline writes.

    Args:
        current: of the window.
        usual: of the reference.
    """
    signals = []
    for name, column in current.columns.items():
        before = usual.columns[name]
        value = f" ({column.top_value})" if column.top_value is not None else ""
        missing = f"{column.missing_share:.1%} missing, {before.missing_share:.1%} in the reference"
        alike = f"{column.top_share:.1%} are one value{value}, {before.top_share:.1%} in the reference"
        for kind, share, usual_share, words in (
            (SignalKind.NULLS, column.missing_share, before.missing_share, missing),
            (SignalKind.CONSTANT, column.top_share, before.top_share, alike),
        ):
            signals.append(
                Signal(
                    kind=kind,
                    subject=name,
                    value=share,
                    reference=usual_share,
                    rows=current.rows,
                    reason=f"{name}: {words}",
                )
            )
    return signals


def unseen_ids(current: Profile, usual: Profile) -> list[Signal]:
    """Rows with a user or an item that the model did not learn from; arguments as in `health_of_features`."""
    return [
        Signal(
            kind=kind,
            value=current.unseen[name],
            reference=usual.unseen[name],
            rows=current.rows,
            reason=f"{current.unseen[name]:.1%} of the rows have a {name} that the model did not learn from, "
            f"{usual.unseen[name]:.1%} in the reference",
        )
        for kind, name in ((SignalKind.UNKNOWN_USERS, "user_id"), (SignalKind.UNKNOWN_ITEMS, "item_id"))
    ]


def ages_of_events(ages: Mapping[str, Sequence[FloatArray]], usual: Mapping[str, float]) -> list[Signal]:
    """How long ago the store last heard of the users and items that were asked about.

    Args:
        ages: by feature, arrays of seconds.
        usual: by feature, the median in the reference.
    """
    signals = []
    for name, before in usual.items():
        known = np.concatenate([np.empty(0), *ages[name]])
        value = float(np.median(known)) if len(known) else None
        words = "no age is known" if value is None else f"{value:,.0f} s in the median"
        signals.append(
            Signal(
                kind=SignalKind.FRESHNESS,
                subject=name,
                value=value,
                reference=before,
                rows=len(known),
                reason=f"{name}: {words}, {before:,.0f} s in the reference",
            )
        )
    return signals


def skew_of_features(report: SkewReport | None) -> list[Signal]:
    """Training-serving skew: the worst feature for the whole log, and each feature that differs; None: not checked."""
    if report is None:
        return [Signal(kind=SignalKind.SKEW, value=None, rows=0, reason="not compared with the offline store")]
    words = f"{len(report.differing)} of {len(report.features)} features differ from the offline store"
    worst = report.features[report.differing[0]].share if report.differing else 0.0
    signals = [Signal(kind=SignalKind.SKEW, value=worst, reference=0.0, rows=report.rows, reason=words)]
    for name in report.differing:
        share, rows = report.features[name].share, report.features[name].rows
        reason = f"{name}: {share:.1%} of the rows differ from the offline store"
        signals.append(Signal(kind=SignalKind.SKEW, subject=name, value=share, reference=0.0, rows=rows, reason=reason))
    return signals
