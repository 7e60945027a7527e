"""The history of the loop as its next decision asks for it: earlier decisions, training runs and releases."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from evergreen.contracts.decision import (
    OF_QUALITY,
    DecisionConfig,
    HistoryRecord,
    PastDecision,
    ReleaseRecord,
    RetrainDecision,
    RunRecord,
    TriggerName,
    Verdict,
    happened_at,
)
from evergreen.contracts.monitoring_report import MonitoringReport

_NOT_OF_THE_WORLD = {Verdict.ALARM, Verdict.ROLLBACK}
_WEEK = timedelta(days=7)
_DAY = timedelta(days=1)
_SEASON_TOLERANCE = timedelta(hours=12)


def relevant_history(
    report: MonitoringReport,
    history: Sequence[RetrainDecision | HistoryRecord],
    *,
    as_of: datetime,
    config: DecisionConfig,
) -> tuple[HistoryRecord, ...]:
    """What of a history a decision rests on, oldest first, each record once; deciding on it alone gives the same."""
    records = {record.record() if isinstance(record, RetrainDecision) else record for record in history}
    earlier = sorted((r for r in records if happened_at(r) < as_of), key=_order)
    windows = max(config.quality_windows, config.drift_windows, config.new_items_windows)
    since = as_of - max(config.season + _DAY, 2 * (windows + 1) * (report.end - report.start))
    decisions = [
        r
        for r in earlier
        if isinstance(r, PastDecision)
        and (
            r.as_of >= since
            or (r.verdict is Verdict.ALARM and (report.trained_as_of is None or r.end > report.trained_as_of))
        )
    ]
    runs: dict[str, RunRecord] = {}
    for run in (r for r in earlier if isinstance(r, RunRecord)):
        if run.started_at > as_of - max(_WEEK, config.cooldown, config.max_run_time):
            if run.finished_at is not None and run.finished_at > as_of:
                run = run.model_copy(update={"finished_at": None})
            # A run may be in the history twice: when it began, and when it had ended.
            if run.run_id not in runs or runs[run.run_id].finished_at is None:
                runs[run.run_id] = run
    releases = [r for r in earlier if isinstance(r, ReleaseRecord)]
    of_model = [r for r in releases if r.model_version == report.model_version]
    kept: list[HistoryRecord] = [*decisions, *runs.values(), *dict.fromkeys([*of_model[-1:], *releases[-1:]])]
    return tuple(sorted(kept, key=_order))


def collapsed_at(windows: Sequence[PastDecision]) -> datetime | None:
    """Start of the last window in which quality was severely worse, of several in a row the first; None: it never was.

    What was broken data or a bad release does not count.

    Args:
        windows: oldest first.
    """
    found, before = None, False
    for window in windows:
        is_severe = window.verdict not in _NOT_OF_THE_WORLD and not OF_QUALITY.isdisjoint(window.severe)
        if is_severe and not before:
            found = window.start
        before = is_severe
    return found


def _order(record: HistoryRecord) -> tuple[datetime, str]:
    """By time; records of one moment in an order of their own, whatever the history's is."""
    return happened_at(record), record.model_dump_json()


class Past:
    """The history as the rules ask for it."""

    def __init__(
        self, history: Sequence[HistoryRecord], report: MonitoringReport, as_of: datetime, config: DecisionConfig
    ) -> None:
        self.as_of, self._report = as_of, report
        self.decisions = [r for r in history if isinstance(r, PastDecision)]
        runs = [r for r in history if isinstance(r, RunRecord)]
        releases = [r for r in history if isinstance(r, ReleaseRecord)]
        self.collapsed = collapsed_at(self.decisions)
        self.release = releases[-1] if releases else None
        self.model = next((r for r in reversed(releases) if r.model_version == report.model_version), None)
        self.recent_runs = [r for r in runs if r.started_at > as_of - _WEEK]
        unfinished = [r for r in runs if r.finished_at is None]
        self.running = [r for r in unfinished if r.started_at > as_of - config.max_run_time]
        self.dead = [r for r in unfinished if r.started_at <= as_of - config.max_run_time]
        changes = [r.started_at for r in runs] + ([self.release.released_at] if self.release else [])
        self.last_change = max(changes, default=None)

    def windows_raised(self, name: TriggerName) -> int:
        """Windows in a row, up to this one, in which a trigger was raised on this model and the data was whole."""
        count, start, length = 1, self._report.start, self._report.end - self._report.start
        for past in reversed(self.decisions):
            same = past.model_version == self._report.model_version and past.verdict is not Verdict.ALARM
            if not same or name not in past.raised or past.end < start - length:
                break
            if past.end <= start:  # one that overlaps saw the same rows
                count, start = count + 1, past.start
        return count

    def came_and_went(self, name: TriggerName, season: timedelta) -> PastDecision | None:
        """The decision a season ago that raised the trigger too, if it was gone in between."""
        for past in self.decisions:
            near = abs(self.as_of - season - past.as_of) <= _SEASON_TOLERANCE
            since = (between.raised for between in self.decisions if between.as_of > past.as_of)
            if near and name in past.raised and any(name not in raised for raised in since):
                return past
        return None
