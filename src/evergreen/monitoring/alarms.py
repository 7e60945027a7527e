"""Alarms on a series of click rates: is this hour unlike such hours, more than the series has been unlike itself?

    expected(t) = level + season      in logarithms, so that half and double are equally far
    level       = median of the last `level_hours`
    season      = median, over `baseline_days`, of what lay above or below its level in the same hour of the day, moved
                  towards that of the same hour of the week as weeks come in
    score(t)    = |log(value) - expected| / median absolute deviation of the residuals before

A score is an alarm when it is above what the series' own earlier scores let expect `max_false_alarms_per_week` times a
week. That is further out than scores were counted, so their upper tenth is continued by a generalised Pareto
distribution (peaks over threshold: Pickands 1975; fitted by probability-weighted moments, Hosking and Wallis 1987; for
streams Siffer et al. 2017). Nothing looks ahead: the scores of a longer series begin with those of a shorter one.

Scores above the threshold with less than `quiet_hours` between them are one alarm. So on a series that goes on as it
was the promise is at most, not just about, so many a week.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import duckdb
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from evergreen.contracts.artifact import JsonModel
from evergreen.contracts.errors import InputError
from evergreen.contracts.mapping import LogKind
from evergreen.contracts.snapshot import Snapshot

_HOUR, _WEEK = 3_600, 604_800
_ROBUST_SD = 1.4826
"""Standard deviation over median absolute deviation, for a normal distribution."""

_MIN_LEVEL_SHARE = 1 / 3
"""Share of the level's hours that must be there."""
_MIN_SAME_HOURS = 5
_MIN_RESIDUALS = 48
_MIN_WEEKS, _WEEK_PRIOR = 3, 3
"""Weeks before the hour of the week counts, and how many weeks it must outweigh."""
_TAIL_SHARE = 0.1
_MIN_TAIL = 8


class AlarmConfig(JsonModel):
    """What an alarm is."""

    max_false_alarms_per_week: float = Field(default=0.5, gt=0, le=10)
    """How often a series may raise the alarm while it goes on as it was."""
    baseline_days: int = Field(default=28, ge=7)
    level_hours: int = Field(default=24, ge=6)
    warm_up_hours: int = Field(default=168, ge=72)
    """Scores that must be known before the first alarm."""
    quiet_hours: int = Field(default=24, ge=0)


@dataclass(frozen=True)
class Alarm:
    """A stretch of time in which a series was unlike itself."""

    start: datetime
    end: datetime
    """Time of the last score above the threshold."""
    value: float
    """Where the score was highest …"""
    expected: float
    """… and what would have been usual there."""
    score: float
    threshold: float


@dataclass(frozen=True)
class Judgement:
    """A series with what was expected of it. Arrays of shape (n,), NaN: not known yet."""

    expected: NDArray[np.float64]
    scores: NDArray[np.float64]
    thresholds: NDArray[np.float64]
    alarms: tuple[Alarm, ...]

    @property
    def above(self) -> NDArray[np.bool_]:
        """(n,) scores above their thresholds; each belongs to an alarm."""
        above: NDArray[np.bool_] = self.scores > self.thresholds
        return above


def find_alarms(
    seconds: NDArray[np.int64], values: NDArray[np.float64], config: AlarmConfig | None = None
) -> Judgement:
    """Judge a series, each value by those before it.

    Args:
        seconds: (n,) since 1970, in order; steps of an hour or less, gaps are allowed.
        values: (n,) positive, e.g. `ClickRates.rates`.
        config: what an alarm is.

    Raises:
        InputError: a value is not positive, or times are not in order; names the first one.
    """
    config = config or AlarmConfig()
    _check(seconds, values)
    logs = np.log(values)
    expected = _expected(seconds, logs, config)
    scores = _scores(seconds, logs - expected, config)
    thresholds = _thresholds(seconds, scores, config)
    return Judgement(
        expected=np.exp(expected),
        scores=scores,
        thresholds=thresholds,
        alarms=_alarms(seconds, values, np.exp(expected), scores, thresholds, config),
    )


@dataclass(frozen=True)
class ClickRates:
    """Clicks by the hour. Arrays of shape (n,); hours without an impression are left out."""

    seconds: NDArray[np.int64]
    """Starts of the hours, since 1970."""
    impressions: NDArray[np.int64]
    clicks: NDArray[np.int64]

    @property
    def rates(self) -> NDArray[np.float64]:
        """(n,) positive: half a click is added to the clicks, and one impression to the impressions."""
        rates: NDArray[np.float64] = (self.clicks + 0.5) / (self.impressions + 1.0)
        return rates


def click_rates(snapshot: Snapshot) -> ClickRates:
    """Count a snapshot's impressions and clicks by the hour.

    Raises:
        InputError: the log has no impressions, so it has no click rate.
    """
    if snapshot.kind is not LogKind.IMPRESSIONS:
        raise InputError(f"{snapshot.path}: a log of {snapshot.kind.value} has no click rate; impressions have one")
    with duckdb.connect() as db:
        db.execute("SET TimeZone = 'UTC'")
        db.execute("SET enable_progress_bar = false")
        hours = db.sql(
            f"""SELECT epoch_us(event_timestamp) // {_HOUR * 1_000_000} * {_HOUR} AS seconds,
                       count(*) AS impressions, count(*) FILTER (clicked) AS clicks
            FROM read_parquet($files, hive_partitioning = false) GROUP BY seconds ORDER BY seconds""",
            params={"files": snapshot.files},
        ).to_arrow_table()
    return ClickRates(*(hours[name].to_numpy() for name in ("seconds", "impressions", "clicks")))


def _check(seconds: NDArray[np.int64], values: NDArray[np.float64]) -> None:
    if len(bad := np.flatnonzero(~(values > 0) | ~np.isfinite(values))):
        raise InputError(
            f"value {values[bad[0]]} at {_moment(seconds[bad[0]])}: must be positive; leave out hours without "
            "impressions, and add half a click to counts"
        )
    if len(bad := np.flatnonzero(np.diff(seconds) < 0)):
        raise InputError(f"{_moment(seconds[bad[0] + 1])} comes after {_moment(seconds[bad[0]])}: sort by time")


def _expected(seconds: NDArray[np.int64], logs: NDArray[np.float64], config: AlarmConfig) -> NDArray[np.float64]:
    """Level + season, from the past alone."""
    num = len(logs)
    of_day, of_week = seconds // _HOUR % 24, seconds // _HOUR % 168
    step = _step(seconds)
    first = np.searchsorted(seconds, seconds - config.baseline_days * 86_400)
    level_first = np.searchsorted(seconds, seconds - config.level_hours * _HOUR)
    wanted = _MIN_LEVEL_SHARE * config.level_hours * _HOUR / step
    above = np.full(num, np.nan)
    expected = np.full(num, np.nan)
    for i in range(num):
        if i - level_first[i] < wanted:
            continue
        level = np.median(logs[level_first[i] : i])
        above[i] = logs[i] - level
        past = np.arange(first[i], i)[np.isfinite(above[first[i] : i])]
        same_hour = past[of_day[past] == of_day[i]]
        if len(same_hour) < _MIN_SAME_HOURS:
            continue
        season = np.median(above[same_hour])
        same_week = same_hour[of_week[same_hour] == of_week[i]]
        weeks = len(same_week) * step / _HOUR
        if weeks >= _MIN_WEEKS:
            season += weeks / (weeks + _WEEK_PRIOR) * np.median(above[same_week] - season)
        expected[i] = level + season
    return expected


def _scores(seconds: NDArray[np.int64], residuals: NDArray[np.float64], config: AlarmConfig) -> NDArray[np.float64]:
    """Residuals in units of their spread before."""
    first = np.searchsorted(seconds, seconds - config.baseline_days * 86_400)
    scores = np.full(len(residuals), np.nan)
    for i in np.flatnonzero(np.isfinite(residuals)):
        past = residuals[first[i] : i]
        past = past[np.isfinite(past)]
        if len(past) >= _MIN_RESIDUALS:
            spread = _ROBUST_SD * np.median(np.abs(past - np.median(past)))
            scores[i] = abs(residuals[i]) / max(spread, 1e-9)
    return scores


def _thresholds(seconds: NDArray[np.int64], scores: NDArray[np.float64], config: AlarmConfig) -> NDArray[np.float64]:
    """The scores that are passed as often as alarms are allowed, by the scores before."""
    step = _step(seconds)
    share = min(config.max_false_alarms_per_week * step / _WEEK, 0.5)
    known = np.flatnonzero(np.isfinite(scores))
    thresholds = np.full(len(scores), np.nan)
    for place in range(int(np.ceil(config.warm_up_hours * _HOUR / step)), len(known)):
        thresholds[known[place]] = _tail_quantile(scores[known[:place]], share)
    return thresholds


def _tail_quantile(scores: NDArray[np.float64], share: float) -> float:
    """What a score is above with probability `share`: a generalised Pareto distribution over the upper tenth."""
    base = float(np.quantile(scores, 1 - _TAIL_SHARE))
    excess = np.sort(scores[scores > base] - base)
    tail = len(excess) / len(scores)
    if len(excess) < _MIN_TAIL or share >= tail:
        return float(np.quantile(scores, 1 - share))
    mean = excess.mean()
    weights = 1 - (np.arange(1, len(excess) + 1) - 0.35) / len(excess)
    weighted = (weights * excess).mean()
    shape = 2 - mean / (mean - 2 * weighted)
    scale = 2 * mean * weighted / (mean - 2 * weighted)
    share_of_tail = share / tail
    beyond = -np.log(share_of_tail) if abs(shape) < 1e-9 else (share_of_tail**-shape - 1) / shape
    return float(base + scale * beyond)


def _alarms(
    seconds: NDArray[np.int64],
    values: NDArray[np.float64],
    expected: NDArray[np.float64],
    scores: NDArray[np.float64],
    thresholds: NDArray[np.float64],
    config: AlarmConfig,
) -> tuple[Alarm, ...]:
    """Scores above their thresholds, those that lie close together as one."""
    above = np.flatnonzero(scores > thresholds)
    if not len(above):
        return ()
    breaks = np.flatnonzero(np.diff(seconds[above]) > config.quiet_hours * _HOUR) + 1
    alarms = []
    for group in np.split(above, breaks):
        worst = group[np.argmax(scores[group])]
        alarms.append(
            Alarm(
                start=_moment(seconds[group[0]]),
                end=_moment(seconds[group[-1]]),
                value=float(values[worst]),
                expected=float(expected[worst]),
                score=float(scores[worst]),
                threshold=float(thresholds[worst]),
            )
        )
    return tuple(alarms)


def _step(seconds: NDArray[np.int64]) -> float:
    """Seconds between two values, as a rule."""
    return max(float(np.median(np.diff(seconds))), 1.0) if len(seconds) > 1 else float(_HOUR)


def _moment(seconds: np.int64) -> datetime:
    return datetime.fromtimestamp(int(seconds), tz=UTC)
