"""What windows are compared with: beside the training data a model's own first days in service."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from evergreen.contracts.mapping import LogKind
from evergreen.contracts.monitoring_report import DriftStatus
from evergreen.monitoring.gate import IN_SERVICE, TRAINING
from evergreen.monitoring.monitors import monitor_window
from evergreen.monitoring.reference import MonitoringReference
from tests.unit.monitoring.served_days import DAY, MODEL, MONDAY, impressions, outcomes, reference

RELEASED = MONDAY + 7 * DAY
CHOSEN = 0.8
"""What the model shows is dearer than what it learned from."""
PARTS = ("features", "predictions", "labels")


def matured(table: pa.Table, rate: float = 0.1) -> pa.Table:
    """Outcomes with all that tells whose answer they are of."""
    found = outcomes(table, rate)
    for name in ("model_version", "degraded"):
        found = found.append_column(name, table[name])
    return found


def with_first_day(*days: pa.Table, rate: float = 0.1) -> MonitoringReference | None:
    return reference().with_service(
        iter(days), (matured(day, rate) for day in days), start=RELEASED, end=RELEASED + DAY
    )


FIRST = impressions(RELEASED, seed=1, shift=CHOSEN)


def test_first_day_is_counted_in_the_cells_of_the_training_data() -> None:
    found = with_first_day(FIRST, rate=0.2)
    assert found is not None and found.in_service is not None
    assert found.model_copy(update={"in_service": None}) == reference(), "the rest is as it was"
    for part in PARTS:
        ours, theirs = getattr(found.in_service, part), getattr(found.training, part)
        assert ours.cells == theirs.cells and ours.rows == FIRST.num_rows
    prices = pc.struct_field(FIRST["features"], "price").to_numpy()
    assert found.in_service.features.columns["price"].mean == pytest.approx(prices.mean(), abs=0.02)
    assert found.in_service.predictions.columns["prediction"].mean == pytest.approx(
        pc.mean(FIRST["score"]).as_py(), rel=0.06
    )
    assert found.in_service.labels is not None
    assert found.in_service.labels.columns["label"].mean == pytest.approx(0.2, abs=0.03)
    assert MonitoringReference.model_validate_json(found.model_dump_json()) == found


def test_tables_of_the_log_are_counted_as_one() -> None:
    assert with_first_day(FIRST.slice(0, 1_000), FIRST.slice(1_000)) is not None
    split = reference().with_service(
        [FIRST.slice(0, 1_000), FIRST.slice(1_000)], [], start=RELEASED, end=RELEASED + DAY
    )
    whole = reference().with_service([FIRST], [], start=RELEASED, end=RELEASED + DAY)
    assert split is not None and whole is not None and split.in_service is not None and whole.in_service is not None
    for part in ("features", "predictions"):
        one, other = getattr(split.in_service, part), getattr(whole.in_service, part)
        assert one.rows == other.rows
        for name, column in one.columns.items():
            assert column.shares == pytest.approx(other.columns[name].shares), name


def test_only_whole_answers_of_the_model_in_that_time_count() -> None:
    degraded = impressions(RELEASED, seed=2, shift=9.0)
    degraded = degraded.set_column(
        degraded.column_names.index("degraded"), "degraded", pa.array([True] * degraded.num_rows)
    )
    others = [
        degraded,
        impressions(RELEASED, seed=3, shift=9.0, model="new-1"),
        impressions(RELEASED - DAY, seed=4, shift=9.0),
        impressions(RELEASED + DAY, seed=5, shift=9.0),
    ]
    assert with_first_day(others[0], FIRST, *others[1:]) == with_first_day(FIRST)
    assert with_first_day(*others) is None, "it made no whole answer then"
    assert with_first_day() is None


def test_rows_stand_for_those_that_were_not_logged() -> None:
    morning = impressions(RELEASED, seed=6, hours=range(12), shift=2.0, requests=450)
    evening = impressions(RELEASED, seed=7, hours=range(12, 24), requests=450, sampling_rate=0.25)
    found = with_first_day(morning, evening)
    assert found is not None and found.in_service is not None
    assert found.in_service.features.columns["price"].mean == pytest.approx((2.0 * 1 + 0.0 * 4) / 5, abs=0.1)


def test_labels_are_left_out_where_none_is_mature_or_they_are_drawn() -> None:
    unripe = reference().with_service([FIRST], [], start=RELEASED, end=RELEASED + DAY)
    drawn = reference(LogKind.INTERACTIONS).with_service([FIRST], [matured(FIRST)], start=RELEASED, end=RELEASED + DAY)
    for found in (unripe, drawn):
        assert found is not None and found.in_service is not None and found.in_service.labels is None
        assert IN_SERVICE not in found.profiles("labels", {0: 1.0})
        assert IN_SERVICE in found.profiles("features", {0: 1.0})


def test_reference_has_no_first_days_until_they_are_given() -> None:
    assert set(reference().profiles("features", dict.fromkeys(range(7), 1 / 7))) == {TRAINING}
    found = with_first_day(FIRST)
    assert found is not None
    assert set(found.profiles("features", dict.fromkeys(range(7), 1 / 7))) == {TRAINING, IN_SERVICE}


def test_what_a_model_has_shown_from_the_first_day_on_is_no_drift_later() -> None:
    third = RELEASED + 2 * DAY
    window = {"start": third, "end": third + DAY, "as_of": third + DAY}
    same, moved = impressions(third, seed=8, shift=CHOSEN), impressions(third, seed=8, shift=2 * CHOSEN)
    known = with_first_day(FIRST)
    assert known is not None
    found = {
        (shown, knows): monitor_window(
            [rows], known if knows else reference(), outcomes=[outcomes(rows, 0.1)], **window
        )
        for shown, rows in (("same", same), ("moved", moved))
        for knows in (False, True)
    }
    assert found["same", False].feature_drift.status is DriftStatus.DRIFTED
    assert found["same", False].prediction_drift.status is DriftStatus.DRIFTED
    for finding in (found["same", True].feature_drift, found["same", True].prediction_drift):
        assert finding.status is DriftStatus.STABLE
    for finding in (found["moved", True].feature_drift, found["moved", True].prediction_drift):
        assert finding.status is DriftStatus.DRIFTED
    assert found["moved", True].feature_drift.columns == ("price",)
    against = found["moved", True].feature_drift.details["price"].against
    effects = [next(iter(against[label].aspects.values())).effect for label in (TRAINING, IN_SERVICE)]
    assert effects == pytest.approx([2 * CHOSEN, CHOSEN], abs=0.15)


def test_model_version_of_another_release_is_not_taken_for_the_own() -> None:
    mixed = impressions(RELEASED, seed=9, model="old-1", hours=range(6)), impressions(RELEASED, seed=10)
    found = with_first_day(*mixed)
    assert found is not None and found.in_service is not None and found.model_version == MODEL
    assert found.in_service.features.rows == mixed[1].num_rows
    assert np.isclose(found.in_service.features.columns["price"].mean or np.nan, 0.0, atol=0.1)
