"""Test rows as they were served: the features that the server had in the place of those that training would have had.

A training set cannot show that its own features are wrong. One that is made with the future, by a join that is off by a
day or a column that is filled in after the click, is in its test rows, too. The log of what was served has what was
there when somebody asked. So the newest test rows are looked up in it: the same impressions and labels, twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.evaluation import Estimate, Verdict
from evergreen.contracts.gate import ServedComparison
from evergreen.contracts.impressions import IDS, feature_table
from evergreen.contracts.mapping import LogKind
from evergreen.contracts.training_set import ROW_FIELDS, TrainingSet
from evergreen.evaluation.config import EvaluationConfig, GateConfig, Scorer
from evergreen.evaluation.rows import TestRows, row_clusters, row_statistics
from evergreen.evaluation.slices import as_estimate
from evergreen.metrics.bootstrap import Bootstrap, Interval, cluster_bootstrap
from evergreen.metrics.statistic import FloatArray, IntArray, Statistic, evaluate

NOT_LOGGED = "not in the log of what was served"
DEGRADED = "answered with defaults in the place of features"
OLDER = "older than the newest that are compared"
"""Why test rows are not compared."""

_EXPLAINED_ROWS = 20_000
_EXPLAINED_FEATURES = 5


@dataclass(frozen=True)
class ServedRows:
    """Test rows that are in the log of what was served."""

    places: IntArray
    """(num_rows,) rows of the test split, ascending."""
    table: pa.Table
    """(num_rows) every column of the test split that is no outcome, with the values of the log."""
    left_out: dict[str, int]
    never_served: tuple[str, ...]
    """Features of the training set that the log does not have."""


def find_served(
    training_set: TrainingSet, impressions: Iterable[pa.Table], keys: pa.Table, config: GateConfig
) -> ServedRows:
    """Look the test rows up in a log of what was served, by request and item.

    Args:
        training_set: whose test rows are looked up.
        impressions: tables with `contracts.impressions.impression_schema`.
        keys: (num_test_rows) with `rows.KEY_COLUMNS`.
        config: which features are taken from the training set, and how many rows at most.
    """
    split = training_set.manifest.splits["test"]
    outcomes = {field.name for field in ROW_FIELDS} - set(IDS)
    schema = pa.schema([f for f in pq.read_schema(training_set.file("test")) if f.name not in outcomes])
    wanted = _pairs(keys)
    served, degraded = (np.zeros(keys.num_rows, np.bool_) for _ in range(2))
    places: list[IntArray] = []
    parts: list[pa.Table] = []
    logged: set[str] = set()
    for log in impressions:
        times = log["event_timestamp"]
        within = pc.and_(
            pc.greater_equal(times, pa.scalar(split.start, times.type)),
            pc.less(times, pa.scalar(split.end, times.type)),
        )
        log = log.filter(within)
        found = pc.index_in(_pairs(log), value_set=wanted, skip_nulls=True).fill_null(-1).to_numpy()
        defaults = log["degraded"].to_numpy()
        degraded[found[(found >= 0) & defaults]] = True
        rows = np.flatnonzero((found >= 0) & ~defaults)
        rows = rows[~served[found[rows]]]
        rows = rows[np.sort(np.unique(found[rows], return_index=True)[1])]  # a request that was asked twice
        if not len(rows):
            continue
        served[found[rows]] = True
        places.append(found[rows].astype(np.int64))
        chosen = log.take(pa.array(rows))
        features = feature_table(chosen)
        columns = {name: chosen[name] for name in IDS} | dict(zip(features.column_names, features.columns, strict=True))
        logged |= columns.keys()
        parts.append(
            pa.table(
                [columns[f.name].cast(f.type) if f.name in columns else pa.nulls(len(rows), f.type) for f in schema],
                schema,
            )
        )
    left_out = {NOT_LOGGED: int((~served & ~degraded).sum()), DEGRADED: int((degraded & ~served).sum())}
    place = np.concatenate(places) if places else np.empty(0, np.int64)
    newest = np.argsort(place, kind="stable")[-config.max_served_rows :]
    left_out[OLDER] = len(place) - len(newest)
    place = place[newest]
    table = (pa.concat_tables(parts) if parts else schema.empty_table()).take(pa.array(newest))
    trusted = tuple(name for name in schema.names if name in config.trusted_features and name not in logged)
    found_rows = ServedRows(
        places=place,
        table=table,
        left_out={reason: rows for reason, rows in left_out.items() if rows},
        never_served=tuple(f.name for f in training_set.manifest.features if f.name not in {*logged, *trusted}),
    )
    return replace(found_rows, table=_as_trained(training_set, found_rows, trusted))


def compare_served(
    training_set: TrainingSet,
    challenger: Scorer,
    incumbent: Scorer | None,
    rows: TestRows,
    impressions: Iterable[pa.Table],
    *,
    metric: str,
    config: GateConfig,
) -> ServedComparison:
    """Measure both models on the test rows as they were served, and what they lose from training to serving.

    Args:
        training_set: of the challenger.
        challenger: the model that was trained on it; its predictions are in `rows` under its name.
        incumbent: likewise; None where nothing serves.
        rows: the test rows with the features as trained.
        impressions: as in `find_served`.
        metric: lower is better.
        config: of the gate.

    Raises:
        ArtifactError: a model predicts something that is not finite.
    """
    found = find_served(training_set, impressions, rows.keys, config)
    labels = rows.labels[found.places]
    kind = training_set.kind
    positives = len(labels) if kind is LogKind.RATINGS else int((labels == 1).sum())
    if positives < config.min_positives:
        return _too_few(found, positives)
    shown = training_set.read("test", ["position"])["position"].fill_null(0).to_numpy().astype(np.int32)
    positions = shown[found.places]
    contenders = [challenger, *([incumbent] if incumbent is not None else [])]
    statistics: dict[str, Statistic] = {}
    for package in contenders:
        name = package.info.name
        as_served = _predict(package, found.table, positions)
        for how, predictions in (("trained", rows.predictions[name][found.places]), ("served", as_served)):
            of_rows = _statistics(kind, labels, predictions)
            statistics |= {f"{name} {how} {m}": of_rows[m] for m in (metric, "click_rate_ratio") if m in of_rows}
    if found.never_served:
        known = _as_trained(training_set, found, found.never_served)
        statistics["as if known"] = _statistics(kind, labels, _predict(challenger, known, positions))[metric]
    bootstrap = cluster_bootstrap(
        statistics, row_clusters(rows.keys.take(pa.array(found.places))).codes, seed=config.seed
    )
    ours, theirs = challenger.info.name, incumbent.info.name if incumbent is not None else None
    bootstrap = _with_skews(bootstrap, [package.info.name for package in contenders], metric)
    difference = bootstrap.difference(f"{ours} served {metric}", f"{theirs} served {metric}") if theirs else None
    more = bootstrap.difference(f"{ours} skew", f"{theirs} skew") if theirs else bootstrap.interval(f"{ours} skew")
    gain = bootstrap.difference(f"{ours} served {metric}", "as if known") if found.never_served else None
    comparison = ServedComparison(
        rows=len(labels),
        positives=positives,
        left_out=found.left_out,
        never_served=found.never_served,
        never_served_gain=as_estimate(gain) if gain is not None else None,
        challenger_value=as_estimate(bootstrap.interval(f"{ours} served {metric}")),
        incumbent_value=as_estimate(bootstrap.interval(f"{theirs} served {metric}")) if theirs else None,
        difference=as_estimate(difference) if difference is not None else None,
        verdict=verdict_of(difference) if difference is not None else None,
        click_rate_ratio=as_estimate(bootstrap.interval(f"{ours} served click_rate_ratio"))
        if kind is not LogKind.RATINGS
        else None,
        skew=as_estimate(bootstrap.interval(f"{ours} skew")),
        incumbent_skew=as_estimate(bootstrap.interval(f"{theirs} skew")) if theirs else None,
        skew_difference=as_estimate(more),
        skew_by_feature={},
    )
    if not is_skewed(comparison, config):
        return comparison
    by_feature = _skew_by_feature(training_set, challenger, found, labels, positions, metric)
    return comparison.model_copy(update={"skew_by_feature": by_feature})


def is_skewed(comparison: ServedComparison, config: GateConfig) -> bool:
    """Whether the challenger loses more from training to serving than it may, and that is not chance.

    One that is far better than what serves may lose more than that: a model that knows little has little to lose.
    """
    more = comparison.skew_difference
    if more.value is None or more.low is None:
        return False
    assert comparison.challenger_value.value is not None and comparison.skew.value is not None
    trained = comparison.challenger_value.value - comparison.skew.value
    difference = comparison.difference.value if comparison.difference is not None else None
    return more.low > 0 and more.value > max(config.max_skew * trained, -(difference or 0.0))


def verdict_of(difference: Interval) -> Verdict:
    """What the interval of challenger less incumbent says, where lower is better."""
    if not difference.excludes_zero:
        return Verdict.TIED
    return Verdict.BETTER if difference.high < 0 else Verdict.WORSE


def _too_few(found: ServedRows, positives: int) -> ServedComparison:
    none = Estimate(value=None, reason=f"{positives} positive rows of the test split were served")
    return ServedComparison(
        rows=len(found.places),
        positives=positives,
        left_out=found.left_out,
        never_served=found.never_served,
        challenger_value=none,
        incumbent_value=none,
        difference=none,
        verdict=None,
        click_rate_ratio=none,
        skew=none,
        incumbent_skew=none,
        skew_difference=none,
        skew_by_feature={},
    )


def _pairs(table: pa.Table) -> pa.ChunkedArray:
    """(num_rows,) request and item in one; null without a request."""
    return pc.binary_join_element_wise(table["request_id"], table["item_id"].fill_null(""), "\0")


def _as_trained(training_set: TrainingSet, found: ServedRows, names: Sequence[str]) -> pa.Table:
    """The rows with some features from the training set."""
    table = found.table
    for name in names:
        trained = training_set.read("test", [name])[name].take(pa.array(found.places))
        table = table.set_column(table.column_names.index(name), table.schema.field(name), trained)
    return table


def _predict(package: Scorer, table: pa.Table, positions: NDArray[np.int32]) -> FloatArray:
    predictions = np.asarray(package.predict_encoded(package.encoder.transform(table), positions), dtype=np.float64)
    if bad := int((~np.isfinite(predictions)).sum()):
        raise ArtifactError(
            f"{package.version}: {bad} of {len(predictions)} predictions from the features as served are not finite: "
            "train it again"
        )
    return predictions


def _with_skews(bootstrap: Bootstrap, names: Sequence[str], metric: str) -> Bootstrap:
    """The same draws with what each model loses from training to serving."""
    values, replicates = dict(bootstrap.values), dict(bootstrap.replicates)
    for name in names:
        served, trained = f"{name} served {metric}", f"{name} trained {metric}"
        values[f"{name} skew"] = values[served] - values[trained]
        replicates[f"{name} skew"] = replicates[served] - replicates[trained]
    return Bootstrap(values, replicates, bootstrap.num_clusters)


def _skew_by_feature(
    training_set: TrainingSet,
    challenger: Scorer,
    found: ServedRows,
    labels: FloatArray,
    positions: NDArray[np.int32],
    metric: str,
) -> dict[str, float]:
    """What one feature as trained brings, of the newest rows: the loss is rarely all of one, but one stands out."""
    newest = slice(-_EXPLAINED_ROWS, None)
    found = replace(
        found, places=found.places[newest], table=found.table.slice(max(found.table.num_rows - _EXPLAINED_ROWS, 0))
    )

    def value_of(rows: pa.Table) -> float:
        predictions = _predict(challenger, rows, positions[newest])
        return evaluate(_statistics(training_set.kind, labels[newest], predictions)[metric])

    as_served = value_of(found.table)
    gains = {}
    for feature in training_set.manifest.features:
        trained = _as_trained(training_set, found, [feature.name])
        if not trained[feature.name].equals(found.table[feature.name]):
            gains[feature.name] = round(as_served - value_of(trained), 6)
    ordered = sorted(gains.items(), key=lambda entry: -entry[1])[:_EXPLAINED_FEATURES]
    return {name: gain for name, gain in ordered if gain > 0 and gain >= 0.1 * ordered[0][1]}


def _statistics(kind: LogKind, labels: FloatArray, predictions: FloatArray) -> dict[str, Statistic]:
    return row_statistics(kind, labels, predictions, calibration_bins=EvaluationConfig().calibration_bins)
