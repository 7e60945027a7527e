"""When to retrain: policies that see what the loop measured and did, and say what follows. Fixed schedules are the
yardstick, drift alone is what many deployments do, and `ours` is the decision of the monitoring pipeline itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Protocol

from evergreen.contracts.decision import (
    DecisionConfig,
    HistoryRecord,
    ReleaseRecord,
    RetrainDecision,
    RunRecord,
    Verdict,
    happened_at,
)
from evergreen.contracts.errors import InputError
from evergreen.contracts.monitoring_report import DriftStatus, MonitoringReport
from evergreen.monitoring.decision import decide

POLICY_NAMES = ("never", "daily", "weekly", "every-N-days", "drift", "ours")

_DAY = timedelta(days=1)
_MINUTE = timedelta(minutes=1)


@dataclass(frozen=True)
class Choice:
    """What a policy makes of an evening."""

    verdict: Verdict
    reason: str
    decision: RetrainDecision | None = None
    """With all its inputs; None: the policy makes none."""


class Policy(Protocol):
    """Says what to do, and keeps no state: what it did before is in the history."""

    @property
    def name(self) -> str:
        """As in `policy_of`."""
        ...

    @property
    def reads_reports(self) -> bool:
        """Whether it wants a report; without one nothing needs to be monitored."""
        ...

    def decide(
        self,
        report: MonitoringReport | None,
        history: Sequence[RetrainDecision | HistoryRecord],
        *,
        as_of: datetime,
    ) -> Choice:
        """Decide.

        Args:
            report: of the window that has just ended; None if it reads none.
            history: earlier decisions, runs and releases, in any order; what is not before `as_of` is not looked at.
            as_of: the moment of the decision.

        Raises:
            ValueError: it reads reports and was given none.
        """
        ...


@dataclass(frozen=True)
class Never:
    """The first model for ever."""

    name: str = "never"
    reads_reports: bool = False

    def decide(
        self,
        report: MonitoringReport | None,
        history: Sequence[RetrainDecision | HistoryRecord],
        *,
        as_of: datetime,
    ) -> Choice:
        """Keep."""
        return Choice(Verdict.KEEP, "It never retrains.")


@dataclass(frozen=True)
class Schedule:
    """Retrains when so much time has passed since the last run or release, whatever the world does."""

    name: str
    interval: timedelta
    reads_reports: bool = False

    def decide(
        self,
        report: MonitoringReport | None,
        history: Sequence[RetrainDecision | HistoryRecord],
        *,
        as_of: datetime,
    ) -> Choice:
        """Retrain if it is time; without any run or release it is."""
        moments = [happened_at(record) for record in history if isinstance(record, RunRecord | ReleaseRecord)]
        last = max((moment for moment in moments if moment < as_of), default=None)
        if last is None:
            return Choice(Verdict.RETRAIN, "Nothing was trained before.")
        # A run begins some seconds late, and must not push the next one to another day.
        is_due = as_of - last >= self.interval - _MINUTE
        words = f"{(as_of - last) / _DAY:.1f} days since the last training, {self.interval / _DAY:g} is the schedule."
        return Choice(Verdict.RETRAIN if is_due else Verdict.KEEP, words)


@dataclass(frozen=True)
class DriftOnly:
    """Retrains whenever features have drifted; it looks at no label, and knows no cooldown."""

    name: str = "drift"
    reads_reports: bool = True

    def decide(
        self,
        report: MonitoringReport | None,
        history: Sequence[RetrainDecision | HistoryRecord],
        *,
        as_of: datetime,
    ) -> Choice:
        """Retrain on drift."""
        drift = _given(report, self.name).feature_drift
        return Choice(Verdict.RETRAIN if drift.status is DriftStatus.DRIFTED else Verdict.KEEP, drift.reason)


@dataclass(frozen=True)
class Ours:
    """`monitoring.decision.decide`: matured labels, age and new items decide, and broken data only alarms."""

    config: DecisionConfig = field(default_factory=DecisionConfig)
    name: str = "ours"
    reads_reports: bool = True

    def decide(
        self,
        report: MonitoringReport | None,
        history: Sequence[RetrainDecision | HistoryRecord],
        *,
        as_of: datetime,
    ) -> Choice:
        """Decide as the monitoring pipeline does."""
        decision = decide(_given(report, self.name), history, as_of=as_of, config=self.config)
        return Choice(decision.verdict, decision.reason, decision)


def policy_of(name: str, config: DecisionConfig | None = None) -> Policy:
    """The policy of a name: one of `POLICY_NAMES`, with a number of days for N; `config` is for `ours`.

    Raises:
        InputError: there is none.
    """
    if name == "never":
        return Never()
    if name == "drift":
        return DriftOnly()
    if name == "ours":
        return Ours(config or DecisionConfig())
    days = {"daily": "1", "weekly": "7"}.get(name)
    if days is None and (found := re.fullmatch(r"every-([1-9]\d{0,3})-days?", name)):
        days = found[1]
    if days is None:
        raise InputError(f"policy {name!r}: must be one of {', '.join(POLICY_NAMES)}, with a number of days for N")
    return Schedule(name, int(days) * _DAY)


def _given(report: MonitoringReport | None, name: str) -> MonitoringReport:
    if report is None:
        raise ValueError(f"policy {name}: decides by a report, and was given none")
    return report
