"""What a model was accepted on: the rows that a window of its impressions is compared with, as profiles.

The main reference is the split on which the model was evaluated: while the world looks as it did there, quality is what
it was there. Beside it stand all rows of the training set by weekday, so that a Saturday is not taken for a change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import AwareDatetime

from evergreen.contracts.artifact import JsonModel
from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.impressions import IDS, feature_table
from evergreen.contracts.mapping import LogKind
from evergreen.contracts.training_set import SPLITS, ColumnKind, Feature, FeatureOrigin, TrainingSet
from evergreen.models.package import ModelPackage
from evergreen.monitoring.drift import sample_split
from evergreen.monitoring.gate import IN_SERVICE, SAME_WEEKDAY, TRAINING
from evergreen.monitoring.importance import Importance
from evergreen.monitoring.profile import (
    Cells,
    IdCells,
    Profile,
    ProfileBuilder,
    fit_cells,
    make_profile,
    mixture,
    user_groups,
)

PREDICTION, LABEL = "prediction", "label"
ID_COLUMNS = ("user_id", "item_id")
AGE_SUFFIX = "_recency_seconds"
"""Features that tell how long ago the store last heard of a user or item."""

_KEYS = ("event_timestamp", "request_id", "user_id", "item_id")
_DAY = timedelta(days=1)
_MAX_WINDOW_SHARE = 0.01
"""A weekday with less of a window's rows is not worth a reference."""


class ReferenceRows(JsonModel):
    """Profiles of some rows of the training set."""

    features: Profile
    """Of the features, and of the ids: known are those of the rows that the model learned from."""
    predictions: Profile
    labels: Profile | None
    """Null for interactions, where the share of positives is drawn."""


class MonitoringReference(JsonModel):
    """Everything that the monitors need of a model and its training set; no row is read again."""

    model_version: str
    kind: LogKind
    trained_as_of: AwareDatetime
    features: tuple[Feature, ...]
    weights: dict[str, float]
    """Importance by feature."""
    training: ReferenceRows
    weekdays: dict[int, ReferenceRows]
    """By weekday, 0 is Monday (UTC)."""
    median_ages: dict[str, float]
    """Seconds, by feature."""
    left_out: dict[str, str]
    """Features that are not compared, with the reason."""
    in_service: ReferenceRows | None = None
    """Of the first days in service, in the cells of `training`; null: they are not over."""

    def profiles(self, part: str, days: Mapping[int, float]) -> dict[str, Profile]:
        """References of the gate.

        Args:
            part: field of `ReferenceRows`.
            days: share of the window's rows on each weekday; those of hardly any rows are passed over.
        """
        found: dict[str, Profile] = {TRAINING: getattr(self.training, part)}
        days = {day: share for day, share in days.items() if share >= _MAX_WINDOW_SHARE}
        known = [getattr(self.weekdays[day], part) for day in days if day in self.weekdays]
        # A window of all weekdays is like the whole, and one with a weekday that is not known has no equal.
        if days and len(known) == len(days) < 7:
            total = sum(days.values())
            found[SAME_WEEKDAY] = mixture([(p, s / total) for p, s in zip(known, days.values(), strict=True)])
        if self.in_service is not None and (profile := getattr(self.in_service, part)) is not None:
            found[IN_SERVICE] = profile
        return found

    def with_service(
        self, impressions: Iterable[pa.Table], outcomes: Iterable[pa.Table], *, start: datetime, end: datetime
    ) -> MonitoringReference | None:
        """The same with `in_service`; None: the model made no whole answer in that time.

        Args:
            impressions: tables of `impression_schema`; of them the model's own whole answers in [start, end) count.
            outcomes: tables of matured outcomes of the same time with `OUTCOME_FIELDS`.
            start: of the first days, by event_timestamp.
            end: of them.
        """
        features = ProfileBuilder(self.training.features.cells)
        predictions = ProfileBuilder(self.training.predictions.cells)
        labels = ProfileBuilder(self.training.labels.cells) if self.training.labels is not None else None
        rows = 0
        for table in impressions:
            mine = self._own(table, start, end)
            if mine.num_rows:
                rows += mine.num_rows
                columns = feature_table(mine)
                known = [name for name in columns.column_names if name in self.training.features.cells]
                add_answers(features, predictions, mine, columns.select(known))
        if not rows:
            return None
        found_labels = None
        if labels is not None:
            for table in outcomes:
                mine = self._own(table, start, end)
                if mine.num_rows:
                    label = mine["rating" if self.kind is LogKind.RATINGS else "clicked"].cast(pa.float64())
                    labels.add(pa.table({LABEL: label}), user_groups(mine), 1 / mine["sampling_rate"].to_numpy())
                    found_labels = labels
        in_service = ReferenceRows(
            features=features.profile(),
            predictions=predictions.profile(),
            labels=found_labels.profile() if found_labels is not None else None,
        )
        return self.model_copy(update={"in_service": in_service})

    def _own(self, rows: pa.Table, start: datetime, end: datetime) -> pa.Table:
        times = rows["event_timestamp"]
        within = pc.and_(
            pc.greater_equal(times, pa.scalar(start, times.type)), pc.less(times, pa.scalar(end, times.type))
        )
        mine = pc.and_(pc.equal(rows["model_version"], self.model_version), pc.invert(rows["degraded"]))
        return rows.filter(pc.and_(within, mine))


def make_reference(
    training_set: TrainingSet,
    package: ModelPackage,
    importance: Importance,
    *,
    split: str = "test",
    sample_rows: int = 200_000,
    seed: int = 0,
) -> MonitoringReference:
    """Profile the rows of a training set as a model sees them.

    Args:
        training_set: that the model was trained on.
        package: the model.
        importance: of its features.
        split: of the main reference; where it is shorter than a day, the newest day.
        sample_rows: of each split at most.
        seed: of the samples.

    Raises:
        ArtifactError: the split has no rows, the importance is of another model, or the rows are not the model's.
    """
    if importance.model_version != package.version:
        raise ArtifactError(
            f"the importance is of {importance.model_version}, the model is {package.version}: measure it"
        )
    left_out = {f.name: reason for f in package.info.features if (reason := _why_not(f))}
    names = [f.name for f in package.info.features]
    samples = {}
    for part in SPLITS:
        if pq.read_metadata(training_set.file(part)).num_rows:
            wanted = list(dict.fromkeys([*_KEYS, "label", *names]))
            samples[part] = sample_split(training_set, part, wanted, sample_rows=sample_rows, seed=seed)
    if split not in samples:
        raise ArtifactError(f"{training_set.path}: the {split} split has no rows to compare windows with")
    main = samples[split]
    end = training_set.manifest.splits[split].end
    if end - training_set.manifest.splits[split].start < _DAY:
        main = _newest_rows(training_set, end - _DAY, main.column_names, sample_rows=sample_rows, seed=seed)
    compared = [name for name in names if name not in left_out]
    is_click = package.info.kind is not LogKind.RATINGS
    main_scores = pa.array(package.predict(main))
    scores = pa.concat_arrays([pa.array(package.predict(sample)) for sample in samples.values()])
    cells = _Cells(
        features={**fit_cells(main.select(compared)), **_known_ids(training_set)},
        predictions=fit_cells(pa.table({PREDICTION: main_scores}), probabilities=[PREDICTION] if is_click else []),
        labels=fit_cells(main.select([LABEL]), probabilities=[LABEL] if is_click else []),
        has_labels=package.info.kind is not LogKind.INTERACTIONS,
    )
    everything = pa.concat_tables(samples.values())
    weekday = pc.day_of_week(everything["event_timestamp"]).combine_chunks()
    weekdays = {}
    for day in pc.unique(weekday).sort().to_pylist():
        is_day = pc.equal(weekday, day)
        weekdays[day] = cells.count(everything.filter(is_day), scores.filter(is_day))
    return MonitoringReference(
        model_version=package.version,
        kind=package.info.kind,
        trained_as_of=package.info.as_of,
        features=package.info.features,
        weights=importance.weights,
        training=cells.count(main, main_scores),
        weekdays=weekdays,
        median_ages={name: m for name in names if name.endswith(AGE_SUFFIX) if (m := median(main[name])) is not None},
        left_out=left_out,
    )


def _newest_rows(
    training_set: TrainingSet, start: datetime, columns: list[str], *, sample_rows: int, seed: int
) -> pa.Table:
    """Rows of all splits from a moment on: hours of the day differ in who comes and in how old features are, so a part
    of a day is nothing to compare days with.
    """
    newest = [("event_timestamp", ">=", start)]
    parts = [pq.read_table(training_set.file(part), columns=columns, filters=newest) for part in SPLITS]
    rows = pa.concat_tables(parts).combine_chunks()
    if rows.num_rows > sample_rows:
        chosen = np.random.default_rng(seed).choice(rows.num_rows, size=sample_rows, replace=False)
        rows = rows.take(pa.array(np.sort(chosen)))
    return rows


def add_answers(features: ProfileBuilder, predictions: ProfileBuilder, rows: pa.Table, columns: pa.Table) -> None:
    """Count a server's answers.

    Args:
        features: gets the columns, and the ids.
        predictions: gets the scores.
        rows: (num_rows) of `impression_schema`.
        columns: (num_rows) features of theirs.
    """
    groups, rates = user_groups(rows), rows["sampling_rate"].to_numpy()
    weights = None if np.all(rates == 1) else 1 / rates
    for name in IDS:
        columns = columns.append_column(name, rows[name])
    features.add(columns, groups, weights)
    predictions.add(rows.select(["score"]).rename_columns([PREDICTION]), groups, weights)


def median(column: pa.ChunkedArray) -> float | None:
    """Of the known numbers; None without any."""
    known = column.drop_null().cast(pa.float64()).to_numpy()
    known = known[~np.isnan(known)]
    return float(np.median(known)) if len(known) else None


def weekday_shares(moments: pa.ChunkedArray) -> dict[int, float]:
    """Share of the rows on each weekday, 0 is Monday (UTC)."""
    counts = pc.value_counts(pc.day_of_week(moments))
    return {day["values"]: day["counts"] / len(moments) for day in counts.to_pylist()}


class _Cells:
    """Counts rows in three sets of cells."""

    def __init__(
        self, features: dict[str, Cells], predictions: dict[str, Cells], labels: dict[str, Cells], has_labels: bool
    ) -> None:
        self._features, self._predictions, self._labels = features, predictions, labels
        self._has_labels = has_labels

    def count(self, rows: pa.Table, predictions: pa.Array) -> ReferenceRows:
        keys = rows.select(["request_id", "user_id"])  # a feature may have any name, also that of the prediction
        return ReferenceRows(
            features=make_profile([rows], self._features),
            predictions=make_profile([keys.append_column(PREDICTION, predictions)], self._predictions),
            labels=make_profile([rows], self._labels) if self._has_labels else None,
        )


def _known_ids(training_set: TrainingSet) -> dict[str, Cells]:
    """Ids of the rows that the model learned from."""
    train = training_set.read("train", list(ID_COLUMNS))
    return {name: IdCells.from_values(pc.unique(train[name].drop_null()).cast(pa.string())) for name in ID_COLUMNS}


def _why_not(feature: Feature) -> str | None:
    if feature.name in ID_COLUMNS:
        return "an id: only the share of unseen ones is told"
    if feature.origin is FeatureOrigin.ON_DEMAND and feature.kind is ColumnKind.CATEGORICAL:
        return "read off the clock: it differs with the window"
    return None
