"""A window of impressions is measured as it was served, and what cannot be known is said to be unknown."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from evergreen.contracts.impressions import impression_schema, impression_table
from evergreen.contracts.mapping import LogKind
from evergreen.contracts.monitoring_report import DriftStatus, MonitoringReport, Signal, SignalKind
from evergreen.contracts.training_set import ColumnKind, Feature, FeatureOrigin
from evergreen.monitoring.monitors import monitor_window
from evergreen.monitoring.reference import MonitoringReference
from evergreen.monitoring.skew import FeatureSkew, SkewReport
from tests.unit.monitoring.served_days import DAY, FEATURES, MODEL, MONDAY, SATURDAY, impressions, outcomes, reference


def monitor(tables: Sequence[pa.Table], start: datetime = MONDAY + 7 * DAY, **options: object) -> MonitoringReport:
    given = {"start": start, "end": start + DAY, "as_of": start + DAY, **options}
    return monitor_window(tables, given.pop("reference", reference()), **given)


def signal(report: MonitoringReport, kind: SignalKind, subject: str = "") -> Signal:
    return next(s for s in report.signals_of(kind) if s.subject == subject)


NEXT_MONDAY = MONDAY + 7 * DAY


def test_a_day_like_those_before_is_stable_in_everything() -> None:
    today = impressions(NEXT_MONDAY, seed=1)
    report = monitor([today.slice(0, 1_600), today.slice(1_600)], outcomes=[outcomes(today, 0.1)])
    findings = (report.feature_drift, report.prediction_drift, report.label_drift)
    assert [finding.status for finding in findings] == [DriftStatus.STABLE] * 3
    assert (report.rows, report.requests, report.users) == (3_600, 900, len(today["user_id"].unique()))
    assert (report.model_version, report.trained_as_of) == (MODEL, NEXT_MONDAY)
    assert report.notes == (
        f"label drift is of 3600 mature rows, {pc.min(today['event_timestamp']).as_py():%Y-%m-%d %H:%M} "
        f"to {pc.max(today['event_timestamp']).as_py():%Y-%m-%d %H:%M}",
    )
    assert signal(report, SignalKind.SCHEMA).value == 0
    assert "hour" in report.feature_drift.left_out and "user_id" in report.feature_drift.left_out


def test_features_predictions_and_labels_drift_apart_from_each_other() -> None:
    today = impressions(NEXT_MONDAY, seed=2)
    dearer = impressions(NEXT_MONDAY, seed=2, shift=0.8)
    prices = dearer.set_column(dearer.column_names.index("score"), "score", today["score"])
    report = monitor([prices], outcomes=[outcomes(today, 0.16)])
    assert report.feature_drift.columns == ("price",)
    assert report.prediction_drift.status is DriftStatus.STABLE
    assert report.label_drift.status is DriftStatus.DRIFTED
    assert report.label_drift.score == pytest.approx(3, abs=1)  # 60 % more clicks, in fifths of the usual rate


def test_a_saturday_is_compared_with_saturdays() -> None:
    saturday = NEXT_MONDAY + 5 * DAY
    report = monitor([impressions(saturday, seed=3, shift=SATURDAY)], start=saturday)
    assert report.feature_drift.status is DriftStatus.SEASONAL
    assert report.prediction_drift.status is DriftStatus.SEASONAL
    assert report.feature_drift.columns == ("price",)
    on_monday = monitor([impressions(NEXT_MONDAY, seed=3, shift=SATURDAY)])
    assert on_monday.feature_drift.status is DriftStatus.DRIFTED


def test_a_weekend_is_compared_with_a_mixture_of_its_days() -> None:
    saturday = NEXT_MONDAY + 5 * DAY
    days = [impressions(saturday, seed=4, shift=SATURDAY), impressions(saturday + DAY, seed=5)]
    report = monitor(days, start=saturday, end=saturday + 2 * DAY)
    assert report.feature_drift.status is DriftStatus.SEASONAL
    week = [impressions(NEXT_MONDAY + k * DAY, seed=10 + k, shift=SATURDAY if k == 5 else 0.0) for k in range(7)]
    whole = monitor(week, end=NEXT_MONDAY + 7 * DAY)
    assert set(whole.feature_drift.details["price"].against) == {"training"}
    assert whole.feature_drift.status is DriftStatus.STABLE


def test_zeros_of_a_broken_pipeline_show_as_a_constant() -> None:
    today = impressions(NEXT_MONDAY, seed=6)
    names = [field.name for field in today.schema.field("features").type]
    columns = [pc.struct_field(today["features"], name).combine_chunks() for name in names]
    columns[names.index("user_rate_1d")] = pa.array(np.zeros(today.num_rows))
    struct = pa.StructArray.from_arrays(columns, fields=list(today.schema.field("features").type))
    broken = today.set_column(today.column_names.index("features"), today.schema.field("features"), struct)
    report = monitor([broken])
    found = signal(report, SignalKind.CONSTANT, "user_rate_1d")
    assert (found.value, found.reference) == (1.0, pytest.approx(0.3, abs=0.03))
    assert "100.0% are one value (0.0)" in found.reason
    assert report.feature_drift.columns == ("user_rate_1d",)


def test_missing_values_and_old_events_are_told() -> None:
    today = impressions(NEXT_MONDAY, seed=7)
    report = monitor([today])
    found = signal(report, SignalKind.NULLS, "user_recency_seconds")
    assert found.value == pytest.approx(found.reference, abs=0.05)
    fresh = signal(report, SignalKind.FRESHNESS, "user_recency_seconds")
    ages = pc.struct_field(today["features"], "user_recency_seconds").drop_null()
    assert fresh.value == pytest.approx(np.median(ages.to_numpy()))
    assert (fresh.reference, fresh.rows) == (2_500.0, len(ages))


def test_ids_that_the_model_did_not_learn_from_are_counted() -> None:
    today = impressions(NEXT_MONDAY, seed=8)
    new = pa.array(["brand new" if k % 4 == 0 else f"i{k % 40}" for k in range(today.num_rows)])
    report = monitor([today.set_column(today.column_names.index("item_id"), "item_id", new)])
    assert signal(report, SignalKind.UNKNOWN_ITEMS).value == 0.25
    assert signal(report, SignalKind.UNKNOWN_ITEMS).reference == 0.0
    users = signal(report, SignalKind.UNKNOWN_USERS)
    assert users.value == pytest.approx(0.1, abs=0.04) and users.reference == pytest.approx(0.1, abs=0.02)


def test_defaults_of_degraded_answers_are_no_drift() -> None:
    good, bad = impressions(NEXT_MONDAY, seed=9), impressions(NEXT_MONDAY, seed=10, requests=450, shift=5.0)
    bad = bad.set_column(bad.column_names.index("degraded"), "degraded", pa.array([True] * bad.num_rows))
    report = monitor([good, bad])
    assert report.feature_drift.status is report.prediction_drift.status is DriftStatus.STABLE
    assert signal(report, SignalKind.DEGRADED).value == pytest.approx(1 / 3)
    assert report.feature_drift.rows == good.num_rows
    only_bad = monitor([bad])
    assert only_bad.feature_drift.status is DriftStatus.UNKNOWN
    assert "no whole answer" in only_bad.feature_drift.reason


def test_a_change_of_the_schema_is_named_and_the_rest_is_still_measured() -> None:
    changed = (*(f for f in FEATURES if f.name not in ("price", "device")),)
    changed += (
        Feature(name="device", kind=ColumnKind.MULTI, origin=FeatureOrigin.CONTEXT),
        Feature(name="stock", kind=ColumnKind.NUMERIC, origin=FeatureOrigin.ITEM),
    )
    today = impressions(NEXT_MONDAY, seed=11)
    fields = impression_schema(changed)
    values = {
        f.name: pc.struct_field(today["features"], f.name) for f in FEATURES if f.name not in ("user_id", "item_id")
    }
    values |= {"device": pa.array([["phone"]] * today.num_rows), "stock": pa.array(np.ones(today.num_rows))}
    table = impression_table(
        {name: today[name] for name in today.column_names if name != "features"},
        {
            name: column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
            for name, column in values.items()
        },
        fields,
    )
    report = monitor([table])
    found = signal(report, SignalKind.SCHEMA)
    assert found.value == 3
    assert found.reason == "device is list<item: string>, was string; price is gone; stock is new"
    assert signal(report, SignalKind.NULLS, "price").value == 1.0
    assert report.feature_drift.details["user_rate_1d"].status is DriftStatus.STABLE


def test_other_models_are_counted_but_not_compared() -> None:
    ours, canary = (
        impressions(NEXT_MONDAY, seed=12),
        impressions(NEXT_MONDAY, seed=13, requests=90, shift=9.0, model="new-1"),
    )
    report = monitor([ours, canary])
    assert report.model_versions == {MODEL: 3_600, "new-1": 360}
    assert (report.model_version, report.rows, report.feature_drift.rows) == (MODEL, 3_960, 3_600)
    assert report.feature_drift.status is DriftStatus.STABLE
    assert any(note.startswith("360 rows were answered by new-1") for note in report.notes)
    taken_over = monitor(
        [
            impressions(NEXT_MONDAY, seed=14, hours=range(12)),
            impressions(NEXT_MONDAY, seed=15, hours=range(12, 24), model="new-1"),
        ]
    )
    assert (taken_over.model_version, taken_over.trained_as_of) == ("new-1", None)


def test_rows_outside_the_window_are_passed_over() -> None:
    before, today = impressions(MONDAY + 6 * DAY, seed=16, shift=9.0), impressions(NEXT_MONDAY, seed=17)
    assert monitor([before, today]) == monitor([today])


def test_a_silent_window_is_a_report_and_not_an_error() -> None:
    days = [monitor([impressions(NEXT_MONDAY + k * DAY, seed=20 + k)], start=NEXT_MONDAY + k * DAY) for k in range(4)]
    silent = monitor([], start=NEXT_MONDAY + 4 * DAY, earlier=days)
    assert (silent.rows, silent.requests, silent.users, silent.model_version) == (0, 0, 0, MODEL)
    volume = signal(silent, SignalKind.VOLUME)
    assert volume.value == 0 and volume.rows == pytest.approx(900, rel=0.1)
    assert silent.feature_drift.status is silent.label_drift.status is DriftStatus.UNKNOWN
    assert signal(silent, SignalKind.DEGRADED).value is None
    assert signal(silent, SignalKind.SCHEMA).value is None
    assert signal(silent, SignalKind.FRESHNESS, "user_recency_seconds").value is None


def test_hours_without_requests_show_in_the_emptiest_stretch() -> None:
    days = [monitor([impressions(NEXT_MONDAY + k * DAY, seed=20 + k)], start=NEXT_MONDAY + k * DAY) for k in range(4)]
    at = NEXT_MONDAY + 4 * DAY
    outage = monitor([impressions(at, seed=30, requests=790, hours=[*range(6), *range(9, 24)])], start=at, earlier=days)
    whole, emptiest, fullest = outage.signals_of(SignalKind.VOLUME)
    assert whole.value == pytest.approx(0.88, abs=0.08)
    assert (emptiest.subject, emptiest.value) == (f"3 hours from {at:%Y-%m-%d}T06:00", 0.0)
    assert emptiest.rows == pytest.approx(112, rel=0.2)
    assert fullest.value == pytest.approx(1.2, abs=0.25)


def test_volume_is_unknown_until_there_are_hours_to_compare_with() -> None:
    first = monitor([impressions(NEXT_MONDAY, seed=31)])
    second = monitor([impressions(NEXT_MONDAY + DAY, seed=32)], start=NEXT_MONDAY + DAY, earlier=[first])
    assert [s.value for s in second.signals_of(SignalKind.VOLUME)] == [None]


def test_volume_counts_what_was_answered_and_not_what_was_logged() -> None:
    report = monitor([impressions(NEXT_MONDAY, seed=33, sampling_rate=0.25)])
    assert (report.requests, report.estimated_requests) == (900, 3_600.0)
    assert sum(report.hourly_requests) == 3_600.0 and len(report.hourly_requests) == 24


def test_the_same_weekday_says_what_is_usual_when_it_is_known() -> None:
    days = [
        monitor(
            [impressions(NEXT_MONDAY + k * DAY, seed=40 + k, requests=300 if k % 7 == 5 else 900)],
            start=NEXT_MONDAY + k * DAY,
        )
        for k in range(20)
    ]
    saturday = NEXT_MONDAY + 26 * DAY
    quiet = monitor([impressions(saturday, seed=70, requests=300)], start=saturday, earlier=days)
    assert signal(quiet, SignalKind.VOLUME).value == pytest.approx(1.0, abs=0.15)


def test_what_others_measured_is_taken_over() -> None:
    skew = SkewReport(
        rows=50,
        requests=10,
        first=None,
        last=None,
        known_at=None,
        tolerance=0.0,
        left_out={},
        not_compared={},
        features={
            name: FeatureSkew(
                rows=50,
                equal=equal,
                differing=50 - equal,
                only_served=0,
                only_offline=0,
                max_abs_difference=None,
                examples=(),
            )
            for name, equal in (("price", 50), ("user_rate_1d", 30))
        },
    )
    report = monitor([impressions(NEXT_MONDAY, seed=34)], skew=skew, suspicious_share=0.2)
    assert [(s.subject, s.value) for s in report.signals_of(SignalKind.SKEW)] == [("", 0.4), ("user_rate_1d", 0.4)]
    assert signal(report, SignalKind.SUSPICIOUS).value == 0.2
    unasked = monitor([impressions(NEXT_MONDAY, seed=34)])
    assert signal(unasked, SignalKind.SKEW).value is None and signal(unasked, SignalKind.SUSPICIOUS).value is None


def test_labels_that_say_nothing_or_are_not_there_are_unknown() -> None:
    today = impressions(NEXT_MONDAY, seed=35)
    drawn = monitor([today], reference=reference(LogKind.INTERACTIONS), outcomes=[outcomes(today, 0.1)])
    assert (drawn.label_drift.status, drawn.label_drift.score) == (DriftStatus.UNKNOWN, None)
    assert "are drawn" in drawn.label_drift.reason
    assert monitor([today]).label_drift.reason == "no outcomes were given"
    assert (
        monitor([today], outcomes=[outcomes(today, 0.1).slice(0, 0)]).label_drift.reason == "no outcome is mature yet"
    )


def test_a_report_and_a_reference_read_back_as_they_were_written(tmp_path) -> None:
    report = monitor([impressions(NEXT_MONDAY, seed=36)])
    report.write(tmp_path / "report.json")
    assert MonitoringReport.read(tmp_path / "report.json") == report
    reference().write(tmp_path / "reference.json")
    assert MonitoringReference.read(tmp_path / "reference.json") == reference()


def test_a_window_that_cannot_be_is_an_error() -> None:
    with pytest.raises(ValueError, match="the end must be later"):
        monitor([], end=NEXT_MONDAY)
    with pytest.raises(ValueError, match=r"suspicious_share=1\.5"):
        monitor([], suspicious_share=1.5)
