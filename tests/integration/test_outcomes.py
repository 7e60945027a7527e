"""The circle closes: what was served and clicked is trained on again, measured as it was evaluated, and decided on."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from evergreen.contracts.decision import Verdict
from evergreen.contracts.feature_tables import FeatureTables
from evergreen.contracts.impressions import impression_schema, impression_table, read_impressions
from evergreen.contracts.mapping import FeatureType, Mapping, Role
from evergreen.contracts.monitoring_report import MonitoringReport
from evergreen.contracts.outcomes import Outcomes
from evergreen.contracts.snapshot import Snapshot
from evergreen.contracts.training_set import ColumnKind, Feature, FeatureOrigin, TrainingSet
from evergreen.features.tables import build_feature_tables
from evergreen.ingest.log import ingest_log
from evergreen.metrics.binary import auc, expected_calibration_error, normalized_entropy
from evergreen.models.package import ModelPackage
from evergreen.monitoring.decision import decide, replay
from evergreen.monitoring.importance import cached_importance
from evergreen.monitoring.monitors import monitor_window
from evergreen.monitoring.outcomes import join_outcomes
from evergreen.monitoring.quality import measure_quality, reference_in_service
from evergreen.monitoring.reference import make_reference
from evergreen.serving.impression_sinks import ParquetSink
from evergreen.simulator.config import SimulatorConfig
from evergreen.simulator.log import simulate_log
from evergreen.training.config import TrainingConfig
from evergreen.training.dataset import build_training_set
from evergreen.training.trainer import train_model
from tests.joined import Joined

DAY = timedelta(days=1)
_ORIGINS = {Role.USER: FeatureOrigin.USER, Role.ITEM: FeatureOrigin.ITEM, Role.CONTEXT: FeatureOrigin.CONTEXT}
_KINDS = {
    FeatureType.NUMERIC: ColumnKind.NUMERIC,
    FeatureType.CATEGORICAL: ColumnKind.CATEGORICAL,
    FeatureType.MULTI: ColumnKind.MULTI,
}


@dataclass(frozen=True)
class Log:
    """A simulated log, and all that training makes of it."""

    snapshot: Snapshot
    tables: FeatureTables
    training_set: TrainingSet


def prepare(snapshot: Snapshot, root: Path) -> Log:
    tables = build_feature_tables(snapshot, root / "tables")
    return Log(snapshot, tables, build_training_set(snapshot, tables, Joined(tables), root / "training_set"))


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    root = tmp_path_factory.mktemp("log")
    simulate_log(SimulatorConfig(num_users=150, num_items=80, num_days=8, events_per_day=2500, seed=5), root / "log")
    return prepare(ingest_log(Mapping.load("simulated"), str(root / "log"), root / "snapshot"), root)


def serve(rows: pa.Table, features: tuple[Feature, ...], scores: Any, out: Path) -> None:
    """Log rows as a server that shows them."""
    n = rows.num_rows
    columns = {
        "served_at": rows["event_timestamp"].combine_chunks(),
        "known_user": pa.array([True] * n),
        "model_version": pa.array(["m"] * n),
        "degraded": pa.array([False] * n),
        "sampling_rate": pa.array(np.ones(n)),
        "score": pa.array(np.asarray(scores, np.float64)),
        **{name: rows[name].combine_chunks() for name in ("request_id", "event_timestamp", "user_id", "item_id")},
        "category": rows["category" if "category" in rows.column_names else "item_category"].combine_chunks(),
        "position": rows["position"].combine_chunks(),
    }
    given = {feature.name: rows[feature.name].combine_chunks() for feature in features}
    table = impression_table(columns, given, impression_schema(features))
    dates = table["served_at"].cast(pa.date32())
    for date in dates.unique():
        ParquetSink(str(out)).write(f"{date}", table.filter(pc.equal(dates, date)))


def events(snapshot: Snapshot) -> pa.Table:
    """All rows, in an order that does not depend on the log's own."""
    table = pa.concat_tables(pq.ParquetFile(file).read() for file in snapshot.files)
    order = [("event_timestamp", "ascending"), ("request_id", "ascending"), ("position", "ascending")]
    return table.sort_by(order).drop_columns(["event_id", "propensity"])


def test_training_on_what_was_served_is_training_on_the_log(log: Log, tmp_path: Path) -> None:
    """Impressions joined twice a day, exported and ingested are the events that they were made of, label by label."""
    mapping = log.snapshot.mapping
    features = tuple(
        Feature(name=name, kind=_KINDS[feature.type], origin=_ORIGINS[role])
        for role in Role
        for name, feature in mapping.features(role).items()
    )
    rows = events(log.snapshot)
    serve(rows, features, np.full(rows.num_rows, 0.02), tmp_path / "impressions")
    window, end = mapping.split.attribution_window, log.snapshot.as_of
    corrected = 0
    for half_days in reversed(range(16)):
        manifest = join_outcomes(
            str(tmp_path / "impressions"),
            str(log.snapshot.path / "events"),
            tmp_path / "outcomes",
            window=window,
            as_of=end - half_days * DAY / 2,
            start=end - (half_days + 1) * DAY / 2,
            mapping=mapping,
        )
        corrected += sum(r.corrected_rows for r in manifest.revisions)
    assert corrected == 0, "no click came late, so no mature label was ever wrong"
    assert len(manifest.latest()) == 8 < len(manifest.revisions), "half a date, then the whole"
    outcomes = Outcomes.load(tmp_path / "outcomes")

    written = outcomes.export_click_log(tmp_path / "export")
    again = ingest_log(Mapping.load(str(written)), str(written.parent / "events"), tmp_path / "snapshot", as_of=end)
    assert again.manifest.quarantined == {} and again.manifest.rows == rows.num_rows
    assert events(again).equals(rows)

    served = prepare(again, tmp_path)
    assert served.training_set.manifest.features == log.training_set.manifest.features
    for split in ("train", "validation", "test"):
        ours, theirs = (pq.read_table(part.training_set.file(split)) for part in (served, log))
        left_out = ["row_id", "propensity"]  # the place in the log, and what our server does not draw by
        order = [("event_timestamp", "ascending"), ("request_id", "ascending"), ("position", "ascending")]
        ours, theirs = (part.drop_columns(left_out).sort_by(order) for part in (ours, theirs))
        assert ours.num_rows > 0 and ours.equals(theirs)


@pytest.fixture(scope="module")
def package(log: Log, tmp_path_factory: pytest.TempPathFactory) -> ModelPackage:
    config = TrainingConfig(model="logistic_regression", max_epochs=1, export_program=False)
    return train_model(log.training_set, tmp_path_factory.mktemp("model") / "package", config=config)


def serve_test_rows(log: Log, package: ModelPackage, rows: pa.Table, root: Path, *, logged: bool) -> Outcomes:
    """Show rows of the test split, scored by the model, click what was clicked, and join."""
    serve(rows, package.info.features if logged else (), package.predict(rows), root / "impressions")
    clicked = rows.filter(pc.equal(rows["label"], 1.0))
    clicks = clicked.select(["request_id", "item_id"]).append_column("click_timestamp", clicked["event_timestamp"])
    (root / "clicks").mkdir()
    pq.write_table(clicks, root / "clicks" / "clicks.parquet")
    join_outcomes(
        str(root / "impressions"),
        str(root / "clicks"),
        root / "outcomes",
        window=log.snapshot.mapping.split.attribution_window,
        as_of=log.snapshot.as_of,
    )
    return Outcomes.load(root / "outcomes")


def test_quality_in_service_is_that_of_the_evaluation(log: Log, package: ModelPackage, tmp_path: Path) -> None:
    """Scores are for the average position; measured where items were shown, they are what an evaluation measures."""
    assert package.position is not None and package.calibration is not None
    test, as_of = log.training_set.read("test"), log.snapshot.as_of
    outcomes = serve_test_rows(log, package, test, tmp_path, logged=False)
    report = measure_quality(outcomes, as_of=as_of, start=as_of - 30 * DAY, end=as_of, models={"m": package})
    figures = report.models[0].figures
    labels = test["label"].to_numpy().astype(np.float64)
    there = package.predict_encoded(package.encoder.transform(test), test["position"].to_numpy())
    assert figures.rows == test.num_rows
    for estimate, value in (
        (figures.normalized_entropy, normalized_entropy(labels, there)),
        (figures.auc, auc(labels, there)),
        (figures.calibration_ratio, there.sum() / labels.sum()),
        (figures.calibration_error, expected_calibration_error(labels, there)),
    ):
        assert estimate.value == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize(
    ("world", "verdict"), [("as it was", Verdict.KEEP), ("zeros", Verdict.ALARM), ("no log", Verdict.ALARM)]
)
def test_from_the_log_to_the_decision(
    log: Log, package: ModelPackage, tmp_path: Path, world: str, verdict: Verdict
) -> None:
    """Served, joined, measured, monitored, decided, and decided again from the file."""
    rows, as_of = log.training_set.read("test"), log.snapshot.as_of
    if world == "zeros":
        broken = [name for name in rows.column_names if name.startswith("user_events_")]
        for name in broken:
            rows = rows.set_column(rows.column_names.index(name), name, pa.array(np.zeros(rows.num_rows)))
    outcomes = serve_test_rows(log, package, rows, tmp_path, logged=True)
    start = log.training_set.manifest.splits["test"].start
    quality = measure_quality(
        outcomes,
        as_of=as_of,
        start=start,
        end=as_of,
        models={"m": package},
        references={"m": reference_in_service(outcomes, "m", as_of=as_of, start=start, end=as_of, model=package)},
        trained_as_of=package.info.as_of,
    )
    importance = cached_importance(tmp_path / "importance.json", package, log.training_set.read("validation"))
    reference = make_reference(log.training_set, package, importance)
    reference = reference.model_copy(update={"model_version": "m"})
    impressions = list(read_impressions(str(tmp_path / "impressions")))

    def watch(shown: list[pa.Table], end: datetime, earlier: list[MonitoringReport]) -> MonitoringReport:
        return monitor_window(
            shown, reference, start=end - (as_of - start), end=end, as_of=end, quality=quality, earlier=earlier
        )

    first = watch(impressions, as_of, [])
    report = first
    if world == "no log":
        length = as_of - start
        earlier = [first.model_copy(update={"start": start - n * length, "end": as_of - n * length}) for n in range(4)]
        report = watch([], as_of + length, earlier)
    decision = decide(report, [], as_of=report.as_of)
    assert decision.verdict is verdict, decision.reason
    if world == "zeros":
        broken_features = {t.subject for t in decision.triggers if t.fired}
        assert broken_features and broken_features <= set(broken), decision.reason
    decision.write(tmp_path / "decision.json")
    assert replay(tmp_path / "decision.json") == decision
