"""The monitors: a window of impressions, and the outcomes that are known by then, against what the model was made for.

Features are compared as they were served, of the answers of the reference's model that had all of them: a default in
the place of a value is no drift, and is told apart (`SignalKind.DEGRADED`). Nothing here says what is to be done.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from evergreen.contracts.artifact import JsonModel
from evergreen.contracts.impressions import feature_table, first_rows, impression_schema
from evergreen.contracts.mapping import LogKind
from evergreen.contracts.monitoring_report import DriftFinding, MonitoringReport
from evergreen.contracts.quality import QualityReport
from evergreen.monitoring.gate import GateConfig, drift_gate, drift_of_column, unknown
from evergreen.monitoring.profile import Profile, ProfileBuilder, user_groups
from evergreen.monitoring.reference import LABEL, PREDICTION, MonitoringReference, add_answers
from evergreen.monitoring.signals import (
    HOUR,
    VolumeConfig,
    ages_of_events,
    degraded_answers,
    health_of_features,
    schema_changes,
    skew_of_features,
    suspicious_rows,
    unseen_ids,
    volume_of_requests,
)
from evergreen.monitoring.skew import SkewReport
from evergreen.monitoring.statistics import FloatArray

_HOUR_MICROSECONDS = 3_600_000_000
_LAST_SHARE = 0.1
"""Of the requests: the last ones, which say who serves now."""


class MonitorConfig(JsonModel):
    """How a window is measured."""

    gate: GateConfig = GateConfig()
    volume: VolumeConfig = VolumeConfig()


def monitor_window(
    impressions: Iterable[pa.Table],
    reference: MonitoringReference,
    *,
    start: datetime,
    end: datetime,
    as_of: datetime,
    outcomes: Iterable[pa.Table] | None = None,
    quality: QualityReport | None = None,
    skew: SkewReport | None = None,
    suspicious_share: float | None = None,
    earlier: Sequence[MonitoringReport] = (),
    config: MonitorConfig | None = None,
) -> MonitoringReport:
    """Measure a window.

    Args:
        impressions: tables of `impression_schema`; rows outside [start, end) by event_timestamp are passed over. None
            at all is an outage, not an error.
        reference: of the model that serves.
        start: of the window.
        end: of the window.
        as_of: the moment of the report.
        outcomes: tables of matured outcomes with `OUTCOME_FIELDS`. They may be of other days than the window: labels
            take their time. None: label drift is not known.
        quality: measured on outcomes.
        skew: of the window.
        suspicious_share: share of the window's rows that look like those of bots; None: nobody looked.
        earlier: reports of windows before this one; what their hours brought is what is usual.
        config: how to measure.

    Raises:
        ValueError: the window has no length, or the suspicious share is not one.
    """
    config = config or MonitorConfig()
    if start >= end:
        raise ValueError(f"a window from {start} to {end}: the end must be later")
    if suspicious_share is not None and not 0 <= suspicious_share <= 1:
        raise ValueError(f"suspicious_share={suspicious_share}: must lie in [0, 1]")
    window = _Window(reference, start, end)
    for table in impressions:
        window.add(table)
    labels, labels_note = _labels(outcomes, reference, config.gate)
    features = window.features.profile() if window.compared_rows else None
    return MonitoringReport(
        as_of=as_of,
        start=start,
        end=end,
        model_version=window.serving_version(),
        model_versions=dict(sorted(window.versions.items())),
        trained_as_of=reference.trained_as_of if window.serving_version() == reference.model_version else None,
        requests=window.requests,
        estimated_requests=float(window.hours.sum()),
        hourly_requests=tuple(window.hours),
        rows=window.rows,
        users=len(window.users),
        feature_drift=_feature_drift(features, window, config.gate),
        prediction_drift=_prediction_drift(window, config.gate),
        label_drift=labels,
        signals=(
            *volume_of_requests(window.hours, start, earlier, config.volume),
            schema_changes(window.changes, rows=window.versions[reference.model_version]),
            degraded_answers(window.degraded, rows=window.rows),
            suspicious_rows(suspicious_share, rows=window.rows),
            *(health_of_features(features, reference.training.features) if features else ()),
            *(unseen_ids(features, reference.training.features) if features else ()),
            *ages_of_events(window.ages, reference.median_ages),
            *skew_of_features(skew),
        ),
        quality=quality,
        notes=(*window.notes(), *labels_note),
    )


class _Window:
    """Adds up a window, a table of impressions at a time."""

    def __init__(self, reference: MonitoringReference, start: datetime, end: datetime) -> None:
        self.reference, self.start, self.end = reference, start, end
        self.features = ProfileBuilder(reference.training.features.cells)
        self.predictions = ProfileBuilder(reference.training.predictions.cells)
        self.hours = np.zeros(math.ceil((end - start) / HOUR))
        self.users: set[str] = set()
        self.versions: Counter[str] = Counter()
        self.rows = self.requests = self.degraded = self.compared_rows = 0
        self.days: Counter[int] = Counter()
        self.changes: set[str] = set()
        self.ages: dict[str, list[FloatArray]] = {name: [] for name in reference.median_ages}
        self._requests: list[tuple[NDArray[np.int64], list[str]]] = []
        fields = impression_schema(reference.features)
        self._expected = {f.name: f.type for f in fields.field("features").type} if "features" in fields.names else {}

    def add(self, impressions: pa.Table) -> None:
        """Add some impressions, of whatever model and time."""
        moments = impressions["event_timestamp"]
        inside = pc.and_(
            pc.greater_equal(moments, pa.scalar(self.start, moments.type)),
            pc.less(moments, pa.scalar(self.end, moments.type)),
        )
        rows = _filter(impressions, inside)
        if not rows.num_rows:
            return
        self.rows += rows.num_rows
        self.degraded += pc.sum(rows["degraded"]).as_py()
        self.users.update(pc.unique(rows["user_id"].drop_null()).to_pylist())
        for count in pc.value_counts(rows["model_version"]).to_pylist():
            self.versions[count["values"]] += count["counts"]
        of_request = rows.select(["event_timestamp", "sampling_rate", "model_version"])
        requests = of_request.take(pa.array(first_rows(rows)))
        self.requests += requests.num_rows
        microseconds = requests["event_timestamp"].cast(pa.int64()).to_numpy()
        hour = (microseconds - int(self.start.timestamp() * 1e6)) // _HOUR_MICROSECONDS
        self.hours += np.bincount(hour, 1 / requests["sampling_rate"].to_numpy(), len(self.hours))
        self._requests.append((microseconds, requests["model_version"].to_pylist()))
        of_model = pc.equal(rows["model_version"], self.reference.model_version)
        if pc.any(of_model).as_py():
            self._note_schema(feature_table(rows.slice(0, 1)).schema)
        self._compare(_filter(rows, pc.and_not(of_model, rows["degraded"])))

    def _note_schema(self, schema: pa.Schema) -> None:
        found = {field.name: field.type for field in schema}
        self.changes |= {f"{name} is gone" for name in self._expected.keys() - found.keys()}
        self.changes |= {f"{name} is new" for name in found.keys() - self._expected.keys()}
        self.changes |= {
            f"{name} is {found[name]}, was {dtype}"
            for name, dtype in self._expected.items()
            if name in found and found[name] != dtype
        }

    def _compare(self, rows: pa.Table) -> None:
        if not rows.num_rows:
            return
        features = feature_table(rows)
        fitting = [f.name for f in features.schema if self._expected.get(f.name) == f.type]
        add_answers(self.features, self.predictions, rows, features.select(fitting))
        self.compared_rows += rows.num_rows
        for count in pc.value_counts(pc.day_of_week(rows["event_timestamp"])).to_pylist():
            self.days[count["values"]] += count["counts"]
        for name in self.ages.keys() & set(fitting):
            self.ages[name].append(features[name].drop_null().to_numpy())

    def day_shares(self) -> dict[int, float]:
        """Share of the compared rows on each weekday."""
        return {day: rows / self.compared_rows for day, rows in self.days.items()}

    def serving_version(self) -> str:
        """The version that answered most of the last requests; the reference's where there are none."""
        if not self._requests:
            return self.reference.model_version
        moments = np.concatenate([moments for moments, _ in self._requests])
        versions = np.concatenate([versions for _, versions in self._requests])
        last = np.argsort(moments, kind="stable")[-max(math.ceil(_LAST_SHARE * len(moments)), 1) :]
        return str(Counter(versions[last]).most_common(1)[0][0])

    def notes(self) -> list[str]:
        """What was not compared."""
        others = {name: rows for name, rows in self.versions.items() if name != self.reference.model_version}
        return [
            f"{rows} rows were answered by {name}: counted, but not compared with the reference of "
            f"{self.reference.model_version}"
            for name, rows in sorted(others.items())
        ]


def _filter(table: pa.Table, keep: pa.ChunkedArray) -> pa.Table:
    """The rows to keep; mostly all of them, and copying a table costs as much as measuring it."""
    return table if pc.all(keep).as_py() else table.filter(keep)


def _feature_drift(features: Profile | None, window: _Window, config: GateConfig) -> DriftFinding:
    if features is None:
        return unknown(f"no whole answer of {window.reference.model_version} in the window")
    references = window.reference.profiles("features", window.day_shares())
    finding = drift_gate(features, references, weights=window.reference.weights, config=config)
    return finding.model_copy(update={"left_out": {**finding.left_out, **window.reference.left_out}})


def _prediction_drift(window: _Window, config: GateConfig) -> DriftFinding:
    if not window.compared_rows:
        return unknown(f"no whole answer of {window.reference.model_version} in the window")
    references = window.reference.profiles("predictions", window.day_shares())
    return drift_of_column(PREDICTION, window.predictions.profile(), references, config=config)


def _labels(
    outcomes: Iterable[pa.Table] | None, reference: MonitoringReference, config: GateConfig
) -> tuple[DriftFinding, list[str]]:
    if reference.training.labels is None:
        return unknown("the training labels of a log of interactions are drawn: their share says nothing"), []
    if outcomes is None:
        return unknown("no outcomes were given"), []
    name = "rating" if reference.kind is LogKind.RATINGS else "clicked"
    builder = ProfileBuilder(reference.training.labels.cells)
    days: Counter[int] = Counter()
    first: list[datetime] = []
    for table in outcomes:
        if not table.num_rows:
            continue
        labels = pa.table({LABEL: table[name].cast(pa.float64())})
        builder.add(labels, user_groups(table), 1 / table["sampling_rate"].to_numpy())
        for count in pc.value_counts(pc.day_of_week(table["event_timestamp"])).to_pylist():
            days[count["values"]] += count["counts"]
        first += pc.min_max(table["event_timestamp"]).as_py().values()
    rows = sum(days.values())
    if not rows:
        return unknown("no outcome is mature yet"), []
    references = reference.profiles("labels", {day: count / rows for day, count in days.items()})
    finding = drift_of_column(LABEL, builder.profile(), references, config=config)
    return finding, [
        f"label drift is of {rows} mature rows, {min(first):%Y-%m-%d %H:%M} to {max(first):%Y-%m-%d %H:%M}"
    ]
