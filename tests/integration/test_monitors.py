"""From a trained model to the report on a window that it served: real log, model, impressions, outcomes, Evidently."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.impressions import impression_schema, impression_table, read_impressions
from evergreen.contracts.mapping import Mapping
from evergreen.contracts.monitoring_report import DriftStatus, MonitoringReport, SignalKind
from evergreen.contracts.outcomes import Outcomes
from evergreen.contracts.training_set import TrainingSet
from evergreen.features.tables import build_feature_tables
from evergreen.ingest.log import ingest_log
from evergreen.models.package import ModelPackage
from evergreen.monitoring.evidently_report import rows_of_impressions, rows_of_reference, write_evidently_report
from evergreen.monitoring.importance import cached_importance
from evergreen.monitoring.monitors import monitor_window
from evergreen.monitoring.outcomes import join_outcomes
from evergreen.monitoring.reference import PREDICTION, MonitoringReference, make_reference
from evergreen.simulator.log import SimulatorConfig, simulate_log
from evergreen.training.config import TrainingConfig
from evergreen.training.dataset import build_training_set
from evergreen.training.trainer import train_model
from tests.joined import Joined

DAY = timedelta(days=1)


@dataclass(frozen=True)
class Served:
    """A model, what it was accepted on, and rows of its test days."""

    training_set: TrainingSet
    package: ModelPackage
    reference: MonitoringReference
    start: datetime
    rows: pa.Table

    def log(self, folder: Path, rows: pa.Table) -> str:
        """Write rows as the impressions that a server logs."""
        moments = rows["event_timestamp"].combine_chunks()
        columns = {
            **{name: rows[name].combine_chunks() for name in ("request_id", "user_id", "item_id", "position")},
            "event_timestamp": moments,
            "served_at": moments,
            "known_user": pa.array([True] * rows.num_rows),
            "model_version": pa.array([self.package.version] * rows.num_rows),
            "degraded": pa.array([False] * rows.num_rows),
            "sampling_rate": pa.array(np.ones(rows.num_rows)),
            "category": rows["item_category"].combine_chunks(),
            "score": pa.array(self.package.predict(rows)),
        }
        features = {f.name: rows[f.name].combine_chunks() for f in self.package.info.features}
        table = impression_table(columns, features, impression_schema(self.package.info.features))
        dates = pc.strftime(table["event_timestamp"], "%Y-%m-%d")
        for date in pc.unique(dates).to_pylist():
            (folder / f"date={date}").mkdir(parents=True)
            pq.write_table(table.filter(pc.equal(dates, date)), folder / f"date={date}" / "part.parquet")
        return str(folder)

    def monitor(self, log: str, **options: object) -> MonitoringReport:
        end = self.start + 2 * DAY
        return monitor_window(read_impressions(log), self.reference, start=self.start, end=end, as_of=end, **options)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    root = tmp_path_factory.mktemp("monitors")
    config = SimulatorConfig(num_users=400, num_items=60, num_days=16, events_per_day=2_500, seed=5)
    simulate_log(config, root / "log")
    snapshot = ingest_log(Mapping.load("simulated"), str(root / "log"), root / "snapshot")
    tables = build_feature_tables(snapshot, root / "tables")
    training_set = build_training_set(snapshot, tables, Joined(tables), root / "training_set")
    package = train_model(
        training_set,
        root / "model",
        config=TrainingConfig(model="logistic_regression", max_epochs=1, export_program=False),
    )
    importance = cached_importance(root / "importance.json", package, training_set.read("validation"))
    reference = make_reference(training_set, package, importance)
    last = training_set.manifest.splits["test"].end.replace(hour=0, minute=0, second=0, microsecond=0)
    rows = training_set.read("test")
    start = last - 2 * DAY
    moments = rows["event_timestamp"]
    inside = pc.and_(
        pc.greater_equal(moments, pa.scalar(start, moments.type)), pc.less(moments, pa.scalar(last, moments.type))
    )
    return Served(training_set, package, reference, start, rows.filter(inside))


def replaced(rows: pa.Table, name: str, values: Sequence[float] | np.ndarray) -> pa.Table:
    return rows.set_column(rows.column_names.index(name), name, pa.array(values, rows.schema.field(name).type))


def test_what_the_model_was_accepted_on_is_stable(served: Served, tmp_path: Path) -> None:
    report = served.monitor(served.log(tmp_path / "log", served.rows))
    assert report.rows == served.rows.num_rows > 3_000
    assert report.feature_drift.status is DriftStatus.STABLE
    assert report.prediction_drift.status is DriftStatus.STABLE
    assert report.model_version == served.package.version
    assert {"hour", "weekday", "user_id"} <= report.feature_drift.left_out.keys()
    assert [s.value for s in report.signals_of(SignalKind.SCHEMA)] == [0]
    assert sum(report.hourly_requests) == report.requests


def test_prices_that_rise_are_found_by_name(served: Served, tmp_path: Path) -> None:
    prices = served.rows["price"].to_numpy()
    dearer = replaced(served.rows, "price", prices + np.nanstd(prices))
    finding = served.monitor(served.log(tmp_path / "log", dearer)).feature_drift
    assert finding.details["price"].status is DriftStatus.DRIFTED
    assert [name for name, column in finding.details.items() if column.status is DriftStatus.DRIFTED] == ["price"]
    assert finding.score == finding.details["price"].weight


def test_zeros_in_the_heaviest_features_drift_and_show_as_constants(served: Served, tmp_path: Path) -> None:
    weights = served.reference.weights
    numbers = [
        n for n in served.reference.training.features.columns if pa.types.is_floating(served.rows.schema.field(n).type)
    ]
    heaviest = sorted(numbers, key=lambda name: -weights[name])[:3]
    broken = served.rows
    for name in heaviest:
        broken = replaced(broken, name, np.zeros(broken.num_rows))
    report = served.monitor(served.log(tmp_path / "log", broken))
    constant = {s.subject for s in report.signals_of(SignalKind.CONSTANT) if s.value == 1.0 and s.reference < 0.9}
    assert constant == set(heaviest)
    assert set(heaviest) <= set(report.feature_drift.columns)


def test_matured_outcomes_tell_label_drift(served: Served, tmp_path: Path) -> None:
    log = served.log(tmp_path / "log", served.rows)
    rng = np.random.default_rng(0)
    base = served.training_set.manifest.splits["test"].label_mean
    end = served.start + 2 * DAY
    for factor, expected in ((1.0, DriftStatus.STABLE), (4.0, DriftStatus.DRIFTED)):
        clicked = served.rows.filter(pa.array(rng.random(served.rows.num_rows) < factor * base))
        clicks = clicked.select(["request_id", "item_id"]).append_column(
            "click_timestamp", pc.add(clicked["event_timestamp"], pa.scalar(timedelta(minutes=3), pa.duration("us")))
        )
        pq.write_table(clicks, tmp_path / "clicks.parquet")
        out = tmp_path / f"outcomes_{factor}"
        join_outcomes(log, str(tmp_path / "clicks.parquet"), out, window=timedelta(hours=6), as_of=end)
        outcomes = Outcomes.load(out).rows(mature=True)
        finding = served.monitor(log, outcomes=outcomes).label_drift
        assert finding.status is expected, finding.reason
        assert 0 < finding.rows < served.rows.num_rows  # the last six hours are not mature


def test_the_reference_reads_back_and_holds_no_id(served: Served, tmp_path: Path) -> None:
    served.reference.write(tmp_path / "reference.json")
    assert MonitoringReference.read(tmp_path / "reference.json") == served.reference
    user = served.rows["user_id"][0].as_py()
    assert f'"{user}"' not in (tmp_path / "reference.json").read_text()
    assert set(served.reference.weekdays) == set(range(7))


def recut(training_set: TrainingSet, length: timedelta, out: Path) -> TrainingSet:
    """The same rows, of which the newest of a length are the test split."""
    shutil.copytree(training_set.path, out)
    rows = pa.concat_tables([training_set.read("validation"), training_set.read("test")])
    infos = dict(training_set.manifest.splits)
    cut = infos["test"].end - length
    newest = pc.greater_equal(rows["event_timestamp"], pa.scalar(cut, rows["event_timestamp"].type))
    for split, part in (("validation", rows.filter(pc.invert(newest))), ("test", rows.filter(newest))):
        pq.write_table(part, out / f"{split}.parquet")
        edges = {"end": cut} if split == "validation" else {"start": cut}
        infos[split] = infos[split].model_copy(update={**edges, "rows": part.num_rows})
    training_set.manifest.model_copy(update={"splits": infos}).write(out / TrainingSet.MANIFEST)
    return TrainingSet.load(out)


def test_split_of_some_hours_is_compared_as_the_newest_day(served: Served, tmp_path: Path) -> None:
    importance = cached_importance(tmp_path / "i.json", served.package, served.rows)
    hours = recut(served.training_set, timedelta(hours=6), tmp_path / "hours")
    day = recut(served.training_set, DAY, tmp_path / "day")
    of_hours, of_day = (make_reference(rows, served.package, importance) for rows in (hours, day))
    assert hours.manifest.splits["test"].rows < 0.6 * day.manifest.splits["test"].rows
    assert of_day.training.features.rows == day.manifest.splits["test"].rows, "a day is compared as it is"
    assert of_hours.training.model_dump() == of_day.training.model_dump(), (
        "what hours of the day are like is not what days are like"
    )


def test_newest_day_is_sampled_as_any_split(served: Served, tmp_path: Path) -> None:
    importance = cached_importance(tmp_path / "i.json", served.package, served.rows)
    hours = recut(served.training_set, timedelta(hours=6), tmp_path / "hours")
    small, again = (make_reference(hours, served.package, importance, sample_rows=700, seed=4) for _ in range(2))
    assert small.model_dump() == again.model_dump()
    assert small.training.features.rows == small.training.predictions.rows == 700


def test_importance_of_another_model_is_refused(served: Served, tmp_path: Path) -> None:
    importance = cached_importance(tmp_path / "i.json", served.package, served.rows)
    other = importance.model_copy(update={"model_version": "deepfm-0"})
    with pytest.raises(ArtifactError, match="the importance is of deepfm-0"):
        make_reference(served.training_set, served.package, other)


def test_evidentlys_page_bears_the_gates_word(served: Served, tmp_path: Path) -> None:
    dearer = replaced(served.rows, "price", served.rows["price"].to_numpy() * 1.5)
    log = served.log(tmp_path / "log", dearer)
    report = served.monitor(log)
    window = {"model_version": served.package.version, "start": report.start, "end": report.end}
    current = rows_of_impressions(read_impressions(log), **window, max_rows=2_000)
    assert current.num_rows == 2_000
    assert rows_of_impressions(read_impressions(log), **window).num_rows == report.rows
    assert rows_of_impressions(read_impressions(log), **{**window, "model_version": "other"}).num_rows == 0
    reference = rows_of_reference(served.training_set, served.package, max_rows=3_000)
    shown = write_evidently_report(
        current, reference, report, tmp_path / "page.html", tmp_path / "page.json", max_columns=8
    )
    page = (tmp_path / "page.html").read_text()
    assert shown[:2] == (PREDICTION, "price") and len(shown) <= 10  # the window has no labels yet
    assert "user_id" not in shown
    assert page.count("The gate: ") == len(shown)
    assert "The gate: drifted (location" in page
    assert "Data drift detected" not in page and "Data drift not detected" not in page
    assert page.index("<body>") < page.index("<h1>") < page.index('<div id="root_metric')
    figures = json.loads((tmp_path / "page.json").read_text())
    assert set(figures["evidently"]) == set(shown)
    assert figures["gate"]["feature_drift"]["details"]["price"]["status"] == "drifted"
    assert len(page) < 10_000_000


def test_a_window_without_rows_still_has_a_page(served: Served, tmp_path: Path) -> None:
    report = served.monitor(served.log(tmp_path / "log", served.rows.slice(0, 3)))
    rows = served.rows.slice(0, 3)
    shown = write_evidently_report(rows, served.rows, report, tmp_path / "page.html", tmp_path / "page.json")
    assert shown == ()
    assert "unknown" in (tmp_path / "page.html").read_text()
