from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from evergreen.contracts.decision import ReleaseRecord, RunRecord, Verdict
from evergreen.contracts.errors import InputError
from evergreen.contracts.monitoring_report import DriftFinding, DriftStatus, MonitoringReport
from evergreen.laboratory.policies import POLICY_NAMES, policy_of
from evergreen.monitoring.decision import decide

DAY = timedelta(days=1)
START = datetime(2026, 3, 2, tzinfo=UTC)
RELEASED = ReleaseRecord(model_version="m-1", released_at=START)


def run(days: float) -> RunRecord:
    moment = START + days * DAY
    return RunRecord(run_id=f"{moment}", started_at=moment, finished_at=moment)


def report(days: float, **changes: Any) -> MonitoringReport:
    stable = DriftFinding(status=DriftStatus.STABLE, score=0.0, reason="as it was")
    values: dict[str, Any] = {
        "as_of": START + days * DAY,
        "start": START + (days - 1) * DAY,
        "end": START + days * DAY,
        "model_version": "m-1",
        "model_versions": {"m-1": 1000},
        "trained_as_of": START,
        "requests": 1000,
        "estimated_requests": 1000.0,
        "hourly_requests": (41.0,) * 24,
        "rows": 10_000,
        "users": 500,
        "feature_drift": stable,
        "prediction_drift": stable,
        "label_drift": stable,
        "signals": (),
        "quality": None,
    }
    return MonitoringReport.model_validate(values | changes)


DRIFTED = DriftFinding(status=DriftStatus.DRIFTED, score=0.4, reason="prices have doubled")


@pytest.mark.parametrize(("name", "days"), [("daily", 1), ("weekly", 7), ("every-3-days", 3), ("every-1-day", 1)])
def test_schedule_counts_from_the_last_run_or_release(name: str, days: int) -> None:
    policy = policy_of(name)
    for number in range(1, 2 * days + 1):
        history = [RELEASED, *(run(days) for _ in range(number > days))]
        choice = policy.decide(None, history, as_of=START + number * DAY)
        assert choice.verdict is (Verdict.RETRAIN if number % days == 0 else Verdict.KEEP), choice.reason


def test_schedule_is_not_put_off_by_runs_that_begin_late() -> None:
    late = RunRecord(run_id="late", started_at=START + timedelta(seconds=40))
    assert policy_of("daily").decide(None, [late], as_of=START + DAY).verdict is Verdict.RETRAIN


def test_schedule_does_not_look_into_the_future() -> None:
    known = policy_of("weekly").decide(None, [RELEASED, run(9)], as_of=START + 7 * DAY)
    assert known.verdict is Verdict.RETRAIN
    assert policy_of("weekly").decide(None, [], as_of=START).verdict is Verdict.RETRAIN, "nothing was trained yet"


def test_never_keeps_whatever_has_drifted() -> None:
    choice = policy_of("never").decide(report(1, feature_drift=DRIFTED), [RELEASED], as_of=START + DAY)
    assert choice.verdict is Verdict.KEEP


def test_drift_alone_retrains_every_time_features_have_drifted() -> None:
    policy = policy_of("drift")
    drifted = report(2, feature_drift=DRIFTED)
    choice = policy.decide(drifted, [RELEASED, run(1)], as_of=START + 2 * DAY)
    assert (choice.verdict, choice.reason) == (Verdict.RETRAIN, "prices have doubled")
    assert policy.decide(report(2), [RELEASED], as_of=START + 2 * DAY).verdict is Verdict.KEEP


def test_ours_is_the_decision_of_the_pipeline() -> None:
    for days in (1, 8):
        given = report(days, feature_drift=DRIFTED)
        choice = policy_of("ours").decide(given, [RELEASED], as_of=START + days * DAY)
        assert choice.decision == decide(given, [RELEASED], as_of=START + days * DAY)
        assert choice.verdict is choice.decision.verdict is (Verdict.RETRAIN if days == 8 else Verdict.KEEP)


@pytest.mark.parametrize("name", ["drift", "ours"])
def test_policy_that_reads_reports_needs_one(name: str) -> None:
    assert policy_of(name).reads_reports
    with pytest.raises(ValueError, match=f"policy {name}.*given none"):
        policy_of(name).decide(None, [RELEASED], as_of=START + DAY)


@pytest.mark.parametrize("name", ["every-0-days", "every-N-days", "monthly", "Daily", "every-2.5-days"])
def test_unknown_policy_names_those_that_there_are(name: str) -> None:
    with pytest.raises(InputError, match="must be one of never, daily, weekly, every-N-days, drift, ours"):
        policy_of(name)


def test_each_policy_has_the_name_that_it_is_asked_for_by() -> None:
    for name in (name.replace("N", "2") for name in POLICY_NAMES):
        assert policy_of(name).name == name
