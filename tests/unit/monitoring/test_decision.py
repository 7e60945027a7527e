"""The decision: broken data is an alarm, one bad day is nothing, and what was decided once is decided again."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evergreen.contracts.decision import (
    DecisionConfig,
    GuardName,
    HistoryRecord,
    PastDecision,
    ReleaseRecord,
    RetrainDecision,
    RunRecord,
    TriggerName,
    Verdict,
)
from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.evaluation import Estimate
from evergreen.contracts.monitoring_report import DriftFinding, DriftStatus, MonitoringReport, Signal, SignalKind
from evergreen.contracts.quality import Comparison, EstimatedQuality, ModelQuality, QualityFigures, QualityReport
from evergreen.monitoring.decision import changed_at, decide, replay

NOW = datetime(2026, 3, 9, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
CONFIG = DecisionConfig()


def estimate(value: float | None, half: float = 0.005) -> Estimate:
    if value is None:
        return Estimate(value=None, reason="too few")
    return Estimate(value=value, low=value - half, high=value + half)


def quality(
    *,
    change: float | None = 0.0,
    calibration: float | None = 0.0,
    half: float = 0.005,
    rows: int = 10_000,
    clicks: int = 500,
    users: int = 300,
    version: str = "m2",
    new_rows: int | None = 50_000,
    estimated: float | None = None,
    comparison: Comparison | None = None,
) -> QualityReport:
    fine = estimate(0.9)
    figures = QualityFigures(
        rows=rows,
        clicks=clicks,
        users=users,
        click_rate=fine,
        normalized_entropy=fine,
        calibration_ratio=fine,
        calibration_error=fine,
        auc=fine,
    )
    return QualityReport(
        as_of=NOW,
        start=NOW - DAY,
        end=NOW,
        window_seconds=600,
        matured_rows=rows,
        immature_rows=0,
        degraded_rows=0,
        new_matured_rows=new_rows,
        left_out={},
        models=(
            ModelQuality(
                model_version=version,
                figures=figures,
                days=(),
                reference=None,
                entropy_change=estimate(change, half),
                calibration_change=estimate(calibration, half),
            ),
        ),
        comparisons=(comparison,) if comparison else (),
        estimated=EstimatedQuality(
            model_version=version,
            rows=1000,
            normalized_entropy=fine,
            click_rate=fine,
            entropy_change=estimate(estimated, half),
        ),
    )


def finding(status: DriftStatus = DriftStatus.STABLE, score: float | None = 0.0) -> DriftFinding:
    return DriftFinding(status=status, score=score, columns=("price",), reason=f"{status} at {score}")


def signal(kind: SignalKind, value: float | None, reference: float | None = 0.0, rows: int = 1000) -> Signal:
    subject = "price" if kind in (SignalKind.NULLS, SignalKind.CONSTANT, SignalKind.FRESHNESS) else ""
    return Signal(kind=kind, subject=subject, value=value, reference=reference, rows=rows, reason=f"{kind}: {value}")


def report(
    *signals: Signal,
    drift: DriftFinding | None = None,
    quality: QualityReport | None = None,
    age: timedelta = 2 * DAY,
    at: datetime = NOW,
    version: str = "m2",
    **changes: Any,
) -> MonitoringReport:
    return MonitoringReport(
        **{
            "as_of": at,
            "start": at - DAY,
            "end": at,
            "model_version": version,
            "model_versions": {version: 10_000},
            "trained_as_of": at - age,
            "requests": 1000,
            "estimated_requests": 1000.0,
            "hourly_requests": (),
            "rows": 10_000,
            "users": 300,
            "feature_drift": drift or finding(),
            "prediction_drift": finding(),
            "label_drift": finding(),
            "signals": signals,
            "quality": quality,
            **changes,
        }
    )


def past(
    days: float,
    *raised: TriggerName,
    verdict: Verdict = Verdict.KEEP,
    version: str = "m2",
    severe: tuple[TriggerName, ...] = (),
) -> PastDecision:
    """A decision on the day that ended so many days ago."""
    at = NOW - days * DAY
    return PastDecision(
        as_of=at, start=at - DAY, end=at, model_version=version, verdict=verdict, raised=raised, severe=severe
    )


def guard(decision: RetrainDecision, name: GuardName, trigger: TriggerName | None = None) -> bool:
    """Whether a guard of that name blocks."""
    (found,) = (g for g in decision.guards if g.name is name and (trigger is None or g.triggers == (trigger,)))
    return found.blocks


YESTERDAY = past(1, TriggerName.QUALITY)
WORSE = quality(change=0.04)


def test_good_window_keeps_and_says_so() -> None:
    decision = decide(report(quality=quality()), [], as_of=NOW)
    assert decision.verdict is Verdict.KEEP and decision.reason == "No trigger is raised."
    assert not any(t.raised or t.fired for t in decision.triggers) and decision.investigate == ()
    assert {t.name for t in decision.triggers} == {
        TriggerName.WORSE_RELEASE,
        TriggerName.QUALITY,
        TriggerName.CALIBRATION,
        TriggerName.DRIFT,
        TriggerName.NEW_ITEMS,
        TriggerName.SCHEDULE,
        TriggerName.NEW_ROWS,
    }


# Quality.


def test_worse_quality_retrains_when_it_persists() -> None:
    once = decide(report(quality=WORSE), [], as_of=NOW)
    assert once.verdict is Verdict.KEEP and guard(once, GuardName.PERSISTENCE, TriggerName.QUALITY)
    assert once.reason.startswith("quality raised, held back: quality: persistence (1 windows in a row of 2)")
    twice = decide(report(quality=WORSE), [YESTERDAY], as_of=NOW)
    assert twice.verdict is Verdict.RETRAIN
    assert twice.reason == "quality: normalized entropy +4.0% against the reference, at least +3.5%."


def test_worse_quality_within_the_interval_is_chance() -> None:
    decision = decide(report(quality=quality(change=0.04, half=0.05)), [YESTERDAY], as_of=NOW)
    assert decision.verdict is Verdict.KEEP
    trigger = decision.trigger(TriggerName.QUALITY)
    assert trigger is not None and trigger.value == 0.04 and not trigger.raised


def test_significant_but_small_loss_is_no_reason() -> None:
    decision = decide(report(quality=quality(change=0.019, half=0.001)), [YESTERDAY], as_of=NOW)
    assert decision.verdict is Verdict.KEEP and not any(t.raised for t in decision.triggers)


@pytest.mark.parametrize(
    ("few", "reason"),
    [
        ({"rows": 999}, "999 matured rows, 1000 are needed to judge"),
        ({"clicks": 49}, "49 clicks, 50 are needed to judge"),
        ({"users": 29}, "29 users, 30 are needed to judge"),
    ],
)
def test_small_sample_never_decides(few: dict[str, int], reason: str) -> None:
    decision = decide(report(quality=quality(change=9.0, calibration=9.0, **few)), [YESTERDAY], as_of=NOW)
    assert decision.verdict is Verdict.KEEP and guard(decision, GuardName.MINIMUM_SAMPLES, TriggerName.QUALITY)
    trigger = decision.trigger(TriggerName.QUALITY)
    assert trigger is not None and trigger.value is None and trigger.reason == reason
    assert f"quality: {reason}" in decision.investigate


def test_severe_loss_does_not_wait_for_a_second_window() -> None:
    assert decide(report(quality=quality(change=0.2049)), [], as_of=NOW).verdict is Verdict.KEEP
    decision = decide(report(quality=quality(change=0.2051)), [], as_of=NOW)
    assert decision.verdict is Verdict.RETRAIN and not guard(decision, GuardName.PERSISTENCE, TriggerName.QUALITY)


@pytest.mark.parametrize("change", [0.2, -0.2])
def test_probabilities_that_are_wrong_either_way_retrain(change: float) -> None:
    history = [past(1, TriggerName.CALIBRATION)]
    assert decide(report(quality=quality(calibration=change)), history, as_of=NOW).verdict is Verdict.RETRAIN


def test_windows_must_be_in_a_row() -> None:
    history = [past(2, TriggerName.QUALITY), past(1)]
    assert decide(report(quality=WORSE), history, as_of=NOW).verdict is Verdict.KEEP
    a_gap = [past(3, TriggerName.QUALITY)]
    assert decide(report(quality=WORSE), a_gap, as_of=NOW).verdict is Verdict.KEEP


def test_windows_that_overlap_are_one() -> None:
    rolling = [past(hours / 24, TriggerName.QUALITY) for hours in range(1, 12)]
    assert decide(report(quality=WORSE), rolling, as_of=NOW).verdict is Verdict.KEEP
    rolling = [past(hours / 24, TriggerName.QUALITY) for hours in range(1, 25)]
    assert decide(report(quality=WORSE), rolling, as_of=NOW).verdict is Verdict.RETRAIN


def test_what_was_raised_on_another_model_or_on_broken_data_does_not_count() -> None:
    for other in (
        past(1, TriggerName.QUALITY, version="m1"),
        past(1, TriggerName.QUALITY, verdict=Verdict.ALARM),
        past(1, TriggerName.DRIFT),
    ):
        assert decide(report(quality=WORSE), [other], as_of=NOW).verdict is Verdict.KEEP


def test_what_comes_and_goes_with_the_week_is_not_retrained() -> None:
    last_week = [past(8, TriggerName.QUALITY), past(7, TriggerName.QUALITY), past(5), past(3), YESTERDAY]
    decision = decide(report(quality=WORSE), last_week, as_of=NOW)
    assert decision.verdict is Verdict.KEEP and guard(decision, GuardName.SEASON, TriggerName.QUALITY)
    assert "was so on 2026-03-02 too" in decision.reason
    never_gone = [past(n, TriggerName.QUALITY) for n in range(1, 9)]
    assert decide(report(quality=WORSE), never_gone, as_of=NOW).verdict is Verdict.RETRAIN


# Since when the world is another one.


COLLAPSE = quality(change=9.0)
COLLAPSED = {"severe": (TriggerName.QUALITY,), "verdict": Verdict.RETRAIN, "version": "m1"}


def test_collapse_is_a_change_in_its_window() -> None:
    decision = decide(report(quality=COLLAPSE), [past(1)], as_of=NOW)
    assert decision.verdict is Verdict.RETRAIN and decision.record().severe == (TriggerName.QUALITY,)
    assert changed_at(decision) == NOW - DAY


def test_slight_loss_is_of_the_model_and_no_change() -> None:
    lasting = [past(2, TriggerName.CALIBRATION), YESTERDAY]
    decision = decide(report(quality=WORSE), lasting, as_of=NOW)
    assert decision.verdict is Verdict.RETRAIN and changed_at(decision) is None
    assert changed_at(decide(report(quality=COLLAPSE), lasting, as_of=NOW)) == NOW - DAY
    collapse = past(4, TriggerName.QUALITY, **COLLAPSED)
    after = decide(report(quality=WORSE), [collapse, past(3), YESTERDAY], as_of=NOW)
    assert after.verdict is Verdict.RETRAIN and changed_at(after) == NOW - 5 * DAY


def test_collapse_lasts_until_it_is_answered_and_is_one() -> None:
    held = [run(20, "just now")]
    first = decide(report(quality=COLLAPSE), held, as_of=NOW)
    assert first.verdict is Verdict.KEEP and changed_at(first) is None
    next_day = NOW + DAY
    second = decide(report(quality=COLLAPSE, at=next_day), [*held, first], as_of=next_day)
    assert second.verdict is Verdict.RETRAIN and changed_at(second) == NOW - DAY


@pytest.mark.parametrize("verdict", [Verdict.ROLLBACK, Verdict.ALARM])
def test_collapse_by_a_bad_release_or_broken_data_is_no_change(verdict: Verdict) -> None:
    bad = past(4, TriggerName.QUALITY, **COLLAPSED | {"verdict": verdict})
    decision = decide(report(quality=quality(), age=7 * DAY), [bad, past(1)], as_of=NOW)
    assert decision.verdict is Verdict.RETRAIN and changed_at(decision) is None


def test_training_for_another_reason_knows_of_no_change() -> None:
    by_age = decide(report(quality=quality(), age=7 * DAY), [], as_of=NOW)
    by_drift = decide(report(drift=DRIFTED, quality=quality(change=0.012)), [past(1, TriggerName.DRIFT)], as_of=NOW)
    for decision in (by_age, by_drift):
        assert decision.verdict is Verdict.RETRAIN and changed_at(decision) is None


def test_later_training_still_knows_of_the_change_before() -> None:
    """Else the next one would learn from the rows of the old world again."""
    history = [past(4, TriggerName.QUALITY, **COLLAPSED), past(3), past(1)]
    decision = decide(report(quality=quality(), age=7 * DAY), history, as_of=NOW)
    assert decision.verdict is Verdict.RETRAIN and changed_at(decision) == NOW - 5 * DAY


def test_second_change_replaces_the_first() -> None:
    history = [past(6, TriggerName.QUALITY, **COLLAPSED), past(5), past(1)]
    assert changed_at(decide(report(quality=COLLAPSE), history, as_of=NOW)) == NOW - DAY


def test_change_is_the_same_however_the_history_is_ordered_and_after_replay(tmp_path: Path) -> None:
    history = [past(3, TriggerName.QUALITY, **COLLAPSED), past(2), YESTERDAY]
    decision = decide(report(quality=WORSE), history[::-1], as_of=NOW)
    assert changed_at(decision) == NOW - 4 * DAY
    decision.write(tmp_path / "decision.json")
    assert changed_at(replay(tmp_path / "decision.json")) == NOW - 4 * DAY


# Drift.


DRIFTED = finding(DriftStatus.DRIFTED, 0.6)


def test_drift_alone_opens_an_investigation() -> None:
    decision = decide(report(drift=DRIFTED, quality=quality()), [past(1, TriggerName.DRIFT)], as_of=NOW)
    assert decision.verdict is Verdict.KEEP and guard(decision, GuardName.AGREEMENT)
    assert decision.investigate == ("features drift, without a training so far: price: drifted at 0.6",)


@pytest.mark.parametrize("agrees", [quality(change=0.012), quality(estimated=0.012)], ids=["measured", "estimated"])
def test_drift_with_a_loss_of_quality_retrains(agrees: QualityReport) -> None:
    decision = decide(report(drift=DRIFTED, quality=agrees), [past(1, TriggerName.DRIFT)], as_of=NOW)
    assert decision.verdict is Verdict.RETRAIN and decision.reason.startswith("drift: drifted at 0.6")


def test_drift_of_one_window_waits() -> None:
    decision = decide(report(drift=DRIFTED, quality=quality(estimated=0.1)), [], as_of=NOW)
    assert decision.verdict is Verdict.KEEP and guard(decision, GuardName.PERSISTENCE, TriggerName.DRIFT)


@pytest.mark.parametrize("status", [DriftStatus.SEASONAL, DriftStatus.UNKNOWN, DriftStatus.STABLE])
def test_drift_that_the_same_weekday_explains_is_none(status: DriftStatus) -> None:
    seen = report(drift=finding(status, 0.9), quality=quality(estimated=0.1))
    decision = decide(seen, [past(1, TriggerName.DRIFT)], as_of=NOW)
    assert decision.verdict is Verdict.KEEP and not any(t.raised for t in decision.triggers)


def test_new_catalogue_retrains_when_it_stays() -> None:
    new = signal(SignalKind.UNKNOWN_ITEMS, 0.3, 0.02)
    assert decide(report(new), [], as_of=NOW).verdict is Verdict.KEEP
    assert decide(report(new), [past(1, TriggerName.NEW_ITEMS)], as_of=NOW).verdict is Verdict.RETRAIN
    few = signal(SignalKind.UNKNOWN_ITEMS, 0.3, 0.02, rows=199)
    assert decide(report(few), [past(1, TriggerName.NEW_ITEMS)], as_of=NOW).verdict is Verdict.KEEP


def test_drift_of_predictions_and_labels_is_for_people() -> None:
    decision = decide(report(quality=quality(), prediction_drift=DRIFTED, label_drift=DRIFTED), [past(1)], as_of=NOW)
    assert decision.verdict is Verdict.KEEP
    assert decision.investigate == ("predictions drift: drifted at 0.6", "labels drift: drifted at 0.6")


# Time.


def test_old_model_is_trained_anew() -> None:
    assert decide(report(quality=quality(), age=7 * DAY - HOUR), [], as_of=NOW).verdict is Verdict.KEEP
    decision = decide(report(quality=quality(), age=7 * DAY), [], as_of=NOW)
    assert decision.verdict is Verdict.RETRAIN and decision.reason.startswith(
        "schedule: the model knows the world until"
    )


def test_model_of_this_moment_has_an_age() -> None:
    young, unknown = report(age=timedelta(0)), report().model_copy(update={"trained_as_of": None})
    ages = [decide(seen, [], as_of=NOW).trigger(TriggerName.SCHEDULE) for seen in (young, unknown)]
    assert ages[0] is not None and ages[0].value == 0 and ages[0].reason.endswith("until 2026-03-09 00:00:00+00:00")
    assert ages[1] is not None and ages[1].value is None and ages[1].reason == "the model's age is not known"


def test_as_many_new_rows_as_it_was_trained_on_retrain() -> None:
    release = ReleaseRecord(model_version="m2", released_at=NOW - 5 * DAY, train_rows=50_000)
    assert decide(report(quality=quality(new_rows=49_999)), [release], as_of=NOW).verdict is Verdict.KEEP
    assert decide(report(quality=quality(new_rows=50_000)), [release], as_of=NOW).verdict is Verdict.RETRAIN


def test_what_a_training_does_not_reach_back_to_is_not_there_to_be_learned() -> None:
    config = DecisionConfig(training_window=4 * DAY)

    def decided(train_rows: int, new_rows: int) -> RetrainDecision:
        release = ReleaseRecord(model_version="m2", released_at=NOW - 2 * DAY, train_rows=train_rows)
        given = report(quality=quality(new_rows=new_rows), age=2 * DAY)
        return decide(given, [release], as_of=NOW, config=config)

    # 20,000 rows a day: four days of them are what there is, and what the model was trained on.
    assert decided(80_000, 40_000).verdict is Verdict.KEEP
    assert (
        decide(
            report(quality=quality(new_rows=80_000), age=4 * DAY),
            [ReleaseRecord(model_version="m2", released_at=NOW - 4 * DAY, train_rows=80_000)],
            as_of=NOW,
            config=config,
        ).verdict
        is Verdict.KEEP
    )
    young = decided(20_000, 40_000)
    assert young.verdict is Verdict.RETRAIN and "it was trained on 20000, a training would have 60000" in young.reason


def test_after_a_collapse_only_what_came_then_counts_as_seen() -> None:
    trained = report(quality=quality(new_rows=20_000), age=2 * DAY)
    release = ReleaseRecord(model_version="m2", released_at=NOW - 2 * DAY, train_rows=500_000)
    one_day_known = [past(2, TriggerName.QUALITY, **COLLAPSED), release]
    decision = decide(trained, one_day_known, as_of=NOW)
    assert decision.verdict is Verdict.RETRAIN
    assert "the model knows 1 day, 0:00:00 of the 3 days, 0:00:00 since quality collapsed" in decision.reason
    four_days_known = [past(5, TriggerName.QUALITY, **COLLAPSED), release]
    assert decide(trained, four_days_known, as_of=NOW).verdict is Verdict.KEEP
    assert decide(trained, [release], as_of=NOW).verdict is Verdict.KEEP


# Broken data.


@pytest.mark.parametrize(
    ("broken", "name"),
    [
        (signal(SignalKind.NULLS, 0.25, 0.05), TriggerName.BROKEN_FEATURE),
        (signal(SignalKind.CONSTANT, 0.95, 0.3), TriggerName.BROKEN_FEATURE),
        (signal(SignalKind.CONSTANT, 1.0, 0.9), TriggerName.BROKEN_FEATURE),
        (signal(SignalKind.FRESHNESS, 24 * 3600, 3600), TriggerName.STALE_FEATURES),
        (signal(SignalKind.VOLUME, 0.0, None), TriggerName.VOLUME_CHANGE),
        (signal(SignalKind.VOLUME, 0.5, None), TriggerName.VOLUME_CHANGE),
        (signal(SignalKind.VOLUME, 4.0, None), TriggerName.VOLUME_CHANGE),
        (signal(SignalKind.SCHEMA, 1, None), TriggerName.SCHEMA_CHANGE),
        (signal(SignalKind.SKEW, 0.1, None), TriggerName.SKEW),
        (signal(SignalKind.DEGRADED, 0.25, 0.05), TriggerName.DEGRADED),
        (signal(SignalKind.SUSPICIOUS, 0.15, 0.02), TriggerName.SUSPICIOUS),
    ],
)
def test_broken_data_is_an_alarm_and_nothing_learns_from_it(broken: Signal, name: TriggerName) -> None:
    """Also when all else calls for a training or a rollback."""
    seen = report(broken, drift=DRIFTED, quality=quality(change=0.5, comparison=against_m1(-0.5)), age=30 * DAY)
    history = [YESTERDAY, RELEASE]
    decision = decide(seen, history, as_of=NOW)
    assert decision.verdict is Verdict.ALARM and decision.reason.startswith(name)
    assert decision.broken_windows[-1].start == NOW - DAY and decision.rollback_to is None
    trigger = decision.trigger(TriggerName.QUALITY)
    assert trigger is not None and trigger.fired, "what else was found is in the decision all the same"


@pytest.mark.parametrize(
    "usual",
    [
        signal(SignalKind.NULLS, 0.24, 0.05),
        signal(SignalKind.NULLS, 1.0, None),
        signal(SignalKind.CONSTANT, 0.94, 0.1),
        signal(SignalKind.CONSTANT, 1.0, 0.91),
        signal(SignalKind.CONSTANT, 0.99, 0.9),
        signal(SignalKind.FRESHNESS, 3600, 60),
        signal(SignalKind.FRESHNESS, 48 * 3600, 24 * 3600),
        signal(SignalKind.VOLUME, 0.6, None),
        signal(SignalKind.VOLUME, 2.5, None),
        signal(SignalKind.VOLUME, 0.0, None, rows=100),
        signal(SignalKind.SCHEMA, 0, None),
        signal(SignalKind.SKEW, 0.05, None),
        signal(SignalKind.SKEW, None, None),
        signal(SignalKind.DEGRADED, 0.1, 0.0),
        signal(SignalKind.SUSPICIOUS, 0.05, 0.02),
        signal(SignalKind.SUSPICIOUS, 1.0, 0.02, rows=199),
        signal(SignalKind.UNKNOWN_USERS, 1.0, 0.0),
    ],
    ids=str,
)
def test_what_is_usual_or_too_few_raises_no_alarm(usual: Signal) -> None:
    assert decide(report(usual, quality=quality()), [], as_of=NOW).verdict is Verdict.KEEP


def test_new_items_without_features_are_a_new_catalogue_and_no_broken_feature() -> None:
    new, nulls = signal(SignalKind.UNKNOWN_ITEMS, 0.4, 0.02), signal(SignalKind.NULLS, 0.45, 0.05)
    history = [past(1, TriggerName.NEW_ITEMS)]
    assert decide(report(nulls, new), history, as_of=NOW).verdict is Verdict.RETRAIN
    assert decide(report(nulls), history, as_of=NOW).verdict is Verdict.ALARM
    assert decide(report(signal(SignalKind.NULLS, 1.0, 0.05), new), history, as_of=NOW).verdict is Verdict.ALARM


def test_signal_that_cannot_be_judged_is_said() -> None:
    decision = decide(report(signal(SignalKind.SKEW, None), quality=quality()), [], as_of=NOW)
    assert decision.investigate == ("signals that cannot be judged: skew; skew: None",)


def test_broken_windows_since_the_training_are_left_out_of_the_next() -> None:
    old, new = past(20, verdict=Verdict.ALARM), past(2, verdict=Verdict.ALARM)
    decision = decide(report(quality=quality(), age=10 * DAY), [old, new, past(1)], as_of=NOW)
    assert decision.verdict is Verdict.RETRAIN
    assert [(w.start, w.end) for w in decision.broken_windows] == [(new.start, new.end)]


# Rollback.


RELEASE = ReleaseRecord(model_version="m2", released_at=NOW - 2 * DAY, replaced="m1")


def against_m1(
    change: float | None,
    *,
    half: float = 0.03,
    rows: int = 5000,
    side_by_side: bool = True,
    replayed: Estimate | None = None,
) -> Comparison:
    return Comparison(
        model_version="m2",
        against="m1",
        side_by_side=side_by_side,
        rows=rows,
        against_rows=5000,
        click_rate_change=estimate(change, half),
        replayed_change=replayed,
    )


def rollback(comparison: Comparison, release: ReleaseRecord = RELEASE) -> RetrainDecision:
    return decide(report(quality=quality(comparison=comparison)), [release], as_of=NOW)


def test_release_that_is_worse_is_taken_back() -> None:
    decision = rollback(against_m1(-0.1))
    assert decision.verdict is Verdict.ROLLBACK and decision.rollback_to == "m1"
    assert decision.reason == "worse_release of m2: m2 has a click rate -10.0% against m1 in the same hours."


def test_rollback_goes_before_a_training() -> None:
    decision = decide(
        report(quality=quality(change=0.5, comparison=against_m1(-0.1)), age=30 * DAY), [RELEASE], as_of=NOW
    )
    assert decision.verdict is Verdict.ROLLBACK


@pytest.mark.parametrize(
    "comparison",
    [
        against_m1(-0.04, half=0.001),
        against_m1(-0.1, half=0.11),
        against_m1(None),
        against_m1(-0.5, rows=999),
        against_m1(-0.19, side_by_side=False),
        against_m1(0.1),
    ],
    ids=["small", "chance", "unknown", "few", "other hours", "better"],
)
def test_release_that_is_not_surely_worse_stays(comparison: Comparison) -> None:
    assert rollback(comparison).verdict is Verdict.KEEP


def test_in_other_hours_the_older_model_must_have_done_better_when_asked_the_same() -> None:
    decision = rollback(against_m1(-0.25, side_by_side=False, replayed=estimate(-0.08, 0.03)))
    assert decision.verdict is Verdict.ROLLBACK
    assert "in other hours; asked the same, m1 has a normalized entropy -8.0% against it" in decision.reason


@pytest.mark.parametrize(
    ("replayed", "words"),
    [
        (estimate(0.01, 0.005), "asked the same, m1 has a normalized entropy +1.0% against it"),  # the world changed
        (estimate(-0.04, 0.01), "asked the same, m1 has a normalized entropy -4.0% against it"),
        (estimate(-0.08, 0.09), "asked the same, m1 has a normalized entropy -8.0% against it"),
        (Estimate(value=None, reason="3 clicks"), "whether m1 would have done better is not known: 3 clicks"),
        (None, "whether m1 would have done better is not known: it was not asked again"),
    ],
    ids=["as bad", "small", "chance", "few", "not asked"],
)
def test_release_that_a_changed_world_clicks_less_stays(replayed: Estimate | None, words: str) -> None:
    decision = rollback(against_m1(-0.6, side_by_side=False, replayed=replayed))
    assert decision.verdict is Verdict.KEEP and decision.rollback_to is None
    assert any(note.startswith("m2 stays: ") and words in note for note in decision.investigate)


@pytest.mark.parametrize(
    "changes",
    [{"released_at": NOW - 3 * DAY - HOUR}, {"is_rollback": True}, {"replaced": None}, {"replaced": "m0"}],
    ids=["after probation", "a rollback itself", "the first", "another one"],
)
def test_only_a_fresh_release_is_taken_back(changes: dict[str, Any]) -> None:
    assert rollback(against_m1(-0.5), RELEASE.model_copy(update=changes)).verdict is Verdict.KEEP


def test_only_the_last_release_is_taken_back() -> None:
    newer = ReleaseRecord(model_version="m3", released_at=NOW - DAY, replaced="m2")
    decision = decide(report(quality=quality(comparison=against_m1(-0.5))), [RELEASE, newer], as_of=NOW)
    assert decision.verdict is Verdict.KEEP


# Guards.


def run(hours: float, name: str = "run", *, took: float | None = 1.0) -> RunRecord:
    started = NOW - hours * HOUR
    return RunRecord(run_id=name, started_at=started, finished_at=None if took is None else started + took * HOUR)


@pytest.mark.parametrize(
    ("history", "name"),
    [
        ([run(5, took=None)], GuardName.ONE_RUN),
        ([run(5, took=6)], GuardName.ONE_RUN),
        ([run(23)], GuardName.COOLDOWN),
        ([ReleaseRecord(model_version="m2", released_at=NOW - 23 * HOUR)], GuardName.COOLDOWN),
        ([run(30, "a"), run(60, "b"), run(100, "c")], GuardName.BUDGET),
    ],
    ids=["running", "ends later", "run", "release", "budget"],
)
def test_guard_holds_a_training_back_and_says_so(history: list[HistoryRecord], name: GuardName) -> None:
    decision = decide(report(quality=WORSE, age=30 * DAY), [YESTERDAY, *history], as_of=NOW)
    assert decision.verdict is Verdict.KEEP and guard(decision, name)
    assert decision.reason.startswith("quality, schedule would retrain, held back by") and name in decision.reason


def test_budget_spent_before_a_collapse_does_not_stand_against_learning_what_came_then() -> None:
    spent = [run(30, "a"), run(60, "b"), run(100, "c")]
    decision = decide(report(quality=COLLAPSE), spent, as_of=NOW)
    assert decision.verdict is Verdict.RETRAIN and not guard(decision, GuardName.BUDGET)
    collapse = past(3, TriggerName.QUALITY, **COLLAPSED)
    since = [collapse, *(run(hours, str(hours)) for hours in (72, 50, 26))]
    held = decide(report(quality=WORSE), [run(100, "before"), *since, YESTERDAY], as_of=NOW)
    assert held.verdict is Verdict.KEEP and guard(held, GuardName.BUDGET)
    assert "3 runs began in the last seven days after quality collapsed on 2026-03-05" in held.reason


@pytest.mark.parametrize(
    "history",
    [
        [run(25)],
        [run(30, "a"), run(60, "b"), run(169, "c")],
        [run(30, "a"), run(30, "a", took=None), run(60, "b"), run(60, "b", took=None)],
        [run(25, took=None)],
    ],
    ids=["cool", "within budget", "began and ended", "dead"],
)
def test_guards_let_go(history: list[HistoryRecord]) -> None:
    assert decide(report(quality=WORSE), [YESTERDAY, *history], as_of=NOW).verdict is Verdict.RETRAIN


def test_run_that_never_ended_is_said() -> None:
    decision = decide(report(quality=quality()), [run(25, took=None)], as_of=NOW)
    assert decision.investigate == ("run run began at 2026-03-07 23:00:00+00:00 and never ended",)


def test_nothing_new_to_learn_from_holds_back() -> None:
    decision = decide(report(quality=quality(new_rows=999), age=30 * DAY), [], as_of=NOW)
    assert decision.verdict is Verdict.KEEP and guard(decision, GuardName.NEW_DATA)


def test_moment_must_have_a_time_zone_and_come_after_the_report() -> None:
    with pytest.raises(ValueError, match=r"2026-03-09T00:00:00: has no offset"):
        decide(report(), [], as_of=NOW.replace(tzinfo=None))
    with pytest.raises(ValueError, match="the report knows the world until 2026-03-09"):
        decide(report(), [], as_of=NOW - HOUR)


# What holds for every window and every history.


TRIGGERS = st.sampled_from(TriggerName)
AGO = st.floats(-3, 30)


@st.composite
def histories(draw: st.DrawFn) -> list[HistoryRecord]:
    records: list[HistoryRecord] = []
    for _ in range(draw(st.integers(0, 6))):
        ago = draw(AGO)
        match draw(st.sampled_from(("decision", "run", "release"))):
            case "decision":
                raised = tuple(sorted(draw(st.sets(TRIGGERS, max_size=3))))
                verdict, version = draw(st.sampled_from(Verdict)), draw(st.sampled_from(("m1", "m2")))
                records.append(
                    past(draw(st.sampled_from((ago, 1.0, 2.0, 7.0))), *raised, verdict=verdict, version=version)
                )
            case "run":
                took = draw(st.none() | st.floats(0, 48))
                records.append(run(24 * ago, draw(st.sampled_from("abcd")), took=took))
            case _:
                records.append(
                    ReleaseRecord(
                        model_version=draw(st.sampled_from(("m1", "m2"))),
                        released_at=NOW - ago * DAY,
                        replaced=draw(st.sampled_from((None, "m1"))),
                        is_rollback=draw(st.booleans()),
                        train_rows=draw(st.sampled_from((None, 40_000))),
                    )
                )
    return records


SIGNALS = st.builds(
    signal,
    st.sampled_from(SignalKind),
    st.none() | st.floats(0, 1) | st.floats(0, 1e5),
    st.none() | st.floats(0, 1),
    st.sampled_from((0, 100, 1000)),
)
CHANGES = st.none() | st.floats(-0.3, 0.5)


@st.composite
def reports(draw: st.DrawFn) -> MonitoringReport:
    measured = None
    if draw(st.booleans()):
        measured = quality(
            change=draw(CHANGES),
            calibration=draw(CHANGES),
            half=draw(st.sampled_from((0.001, 0.02))),
            rows=draw(st.sampled_from((500, 10_000))),
            new_rows=draw(st.sampled_from((None, 10, 50_000))),
            estimated=draw(CHANGES),
            comparison=draw(st.none() | st.builds(against_m1, st.floats(-0.5, 0.5))),
        )
    return report(
        *draw(st.lists(SIGNALS, max_size=3)),
        drift=finding(draw(st.sampled_from(DriftStatus)), draw(st.none() | st.floats(0, 1))),
        quality=measured,
        age=draw(st.sampled_from((DAY, 6 * DAY, 8 * DAY))),
    )


@given(reports(), histories(), st.randoms(use_true_random=False))
def test_order_and_repetition_of_the_history_do_not_matter(
    seen: MonitoringReport, history: list[HistoryRecord], random: Any
) -> None:
    decision = decide(seen, history, as_of=NOW)
    shuffled = [*history, *history]
    random.shuffle(shuffled)
    assert decide(seen, shuffled, as_of=NOW) == decision


@given(reports(), histories())
def test_decision_made_again_is_the_same_whatever_followed_from_it(
    seen: MonitoringReport, history: list[HistoryRecord]
) -> None:
    decision = decide(seen, history, as_of=NOW)
    consequences = [
        decision,
        RunRecord(run_id="new", started_at=NOW, finished_at=NOW + HOUR),
        ReleaseRecord(model_version="m3", released_at=NOW + HOUR, replaced="m2"),
    ]
    assert decide(seen, [*history, *consequences], as_of=NOW) == decision
    assert decide(seen, decision.history, as_of=NOW) == decision, "what it holds of the history is enough"


@given(seen=reports(), history=histories())
def test_decision_is_read_back_and_replayed(
    seen: MonitoringReport, history: list[HistoryRecord], tmp_path_factory: pytest.TempPathFactory
) -> None:
    decision = decide(seen, history, as_of=NOW)
    path = tmp_path_factory.getbasetemp() / "decision.json"
    decision.write(path)
    assert RetrainDecision.read(path) == decision == replay(path)


@given(reports(), histories())
def test_broken_data_is_an_alarm_whatever_else_is_so(seen: MonitoringReport, history: list[HistoryRecord]) -> None:
    broken = seen.model_copy(update={"signals": (*seen.signals, signal(SignalKind.CONSTANT, 1.0, 0.0))})
    assert decide(broken, history, as_of=NOW).verdict is Verdict.ALARM
    fired = [t for t in decide(seen, history, as_of=NOW).triggers if t.calls_for is Verdict.ALARM and t.fired]
    assert (decide(seen, history, as_of=NOW).verdict is Verdict.ALARM) == bool(fired)


@given(reports(), histories())
def test_training_follows_only_from_a_trigger_that_no_guard_holds(
    seen: MonitoringReport, history: list[HistoryRecord]
) -> None:
    decision = decide(seen, history, as_of=NOW)
    fired = {t.name for t in decision.triggers if t.fired and t.calls_for is Verdict.RETRAIN}
    held = {name for g in decision.guards if g.blocks for name in g.triggers}
    others = decision.verdict in (Verdict.ALARM, Verdict.ROLLBACK)
    assert (decision.verdict is Verdict.RETRAIN) == (not others and bool(fired - held))
    assert all(t.raised for t in decision.triggers if t.fired)
    assert all(t.value is not None for t in decision.triggers if t.raised), "the unknown raises nothing"
    assert (decision.rollback_to is not None) == (decision.verdict is Verdict.ROLLBACK)


@given(reports(), histories(), st.floats(0, 0.5))
def test_more_loss_never_turns_a_training_into_none(
    seen: MonitoringReport, history: list[HistoryRecord], more: float
) -> None:
    if seen.quality is None or seen.quality.models[0].entropy_change.value is None:
        return
    (model,) = seen.quality.models
    change = model.entropy_change.value
    assert change is not None
    worse = model.model_copy(update={"entropy_change": estimate(change + more, 0.001)})
    same = model.model_copy(update={"entropy_change": estimate(change, 0.001)})
    verdicts = []
    for version in (same, worse):
        measured = seen.quality.model_copy(update={"models": (version,)})
        verdicts.append(decide(seen.model_copy(update={"quality": measured}), history, as_of=NOW).verdict)
    assert verdicts[0] is not Verdict.RETRAIN or verdicts[1] is Verdict.RETRAIN


@given(reports(), histories(), st.floats(0, 6))
def test_more_runs_never_bring_about_a_training(
    seen: MonitoringReport, history: list[HistoryRecord], ago: float
) -> None:
    if decide(seen, history, as_of=NOW).verdict is not Verdict.RETRAIN:
        assert decide(seen, [*history, run(24 * ago, "more")], as_of=NOW).verdict is not Verdict.RETRAIN


@given(reports(), histories(), st.sampled_from(("quality_effect", "drift_score", "new_items_increase", "max_age")))
def test_higher_threshold_never_brings_about_a_training(
    seen: MonitoringReport, history: list[HistoryRecord], name: str
) -> None:
    higher = CONFIG.model_copy(update={name: 2 * getattr(CONFIG, name)})
    if decide(seen, history, as_of=NOW, config=higher).verdict is Verdict.RETRAIN:
        assert decide(seen, history, as_of=NOW).verdict is Verdict.RETRAIN


# The rules over weeks. Figures of a day are drawn with the error that a day's clicks leave them.


def interval(value: float, error: float) -> Estimate:
    return Estimate(value=value, low=value - 1.96 * error, high=value + 1.96 * error)


def live(
    seed: int, *, days: int, entropy_error: float, calibration_error: float, shift_day: int | None = None
) -> dict[int, set[TriggerName]]:
    """Decide daily and train when told so: the days of the trainings, and what called for them.

    From `shift_day` on a model trained before loses 4 % of normalized entropy and promises 35 % too many clicks.
    """
    rng = np.random.default_rng(seed)
    errors = np.array([entropy_error, calibration_error])
    history: list[RetrainDecision | HistoryRecord] = []
    trainings: dict[int, set[TriggerName]] = {}
    trained, reference = -1, rng.normal(0, errors)
    for day in range(days):
        at, version = NOW + day * DAY, f"m{len(trainings)}"
        loss = (0.04, 0.35) if shift_day is not None and trained < shift_day <= day else (0.0, 0.0)
        entropy, calibration = rng.normal(loss, errors) - reference
        measured = quality(version=version)
        changes = {
            "entropy_change": interval(entropy, entropy_error * 2**0.5),
            "calibration_change": interval(calibration, calibration_error * 2**0.5),
        }
        measured = measured.model_copy(update={"models": (measured.models[0].model_copy(update=changes),)})
        seen = report(quality=measured, at=at, version=version, age=(day - trained) * DAY)
        history.append(decision := decide(seen, history, as_of=at))
        if decision.verdict is Verdict.RETRAIN:
            trainings[day] = {t.name for t in decision.triggers if t.fired}
            trained, reference = day, rng.normal(0, errors)
            history.append(RunRecord(run_id=f"run-{day}", started_at=at, finished_at=at + HOUR))
            history.append(ReleaseRecord(model_version=f"m{len(trainings)}", released_at=at + HOUR, replaced=version))
    return trainings


@pytest.mark.parametrize(("entropy_error", "calibration_error"), [(0.01, 0.05), (0.02, 0.08), (0.04, 0.15)])
def test_sixty_days_without_change_bring_few_trainings_beyond_the_schedule(
    entropy_error: float, calibration_error: float
) -> None:
    extra = []
    for seed in range(20):
        trainings = live(seed, days=60, entropy_error=entropy_error, calibration_error=calibration_error)
        extra.append(sum(TriggerName.SCHEDULE not in fired for fired in trainings.values()))
    assert max(extra) <= 2 and np.mean(extra) <= 0.6


@pytest.mark.parametrize(
    ("entropy_error", "calibration_error", "found"), [(0.01, 0.05, 20), (0.02, 0.08, 16)], ids=["much", "some"]
)
def test_loss_is_retrained_by_the_second_day(entropy_error: float, calibration_error: float, found: int) -> None:
    """The shift comes two days after a training by the schedule, so that the next one is far."""
    in_time = 0
    for seed in range(20):
        errors = {"entropy_error": entropy_error, "calibration_error": calibration_error}
        trainings = live(seed, days=12, shift_day=8, **errors)
        in_time += any(day in (8, 9) for day in trainings)
    assert in_time >= found


def test_decision_does_not_grow_with_its_history() -> None:
    history: list[RetrainDecision] = []
    sizes = []
    for day in range(60):
        at = NOW + day * DAY
        seen = report(quality=quality(), at=at).model_copy(update={"trained_as_of": at - 2 * DAY})
        history.append(decide(seen, history, as_of=at))
        sizes.append(len(history[-1].model_dump_json()))
    assert sizes[-1] == sizes[20] < 30_000


def test_file_of_another_version_says_so(tmp_path: Path) -> None:
    path = tmp_path / "decision.json"
    decide(report(quality=quality()), [], as_of=NOW).write(path)
    content = json.loads(path.read_text())
    content["config"]["patience"] = 3
    path.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=r"config\.patience: .*another version of Evergreen"):
        replay(path)
