"""The primary metric on parts of the test rows: who is new, what is new, and day by day."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from evergreen.contracts.evaluation import Estimate, SliceEstimate
from evergreen.contracts.mapping import LogKind
from evergreen.contracts.snapshot import TIMESTAMP_TYPE
from evergreen.contracts.training_set import TrainingSet
from evergreen.evaluation.config import EvaluationConfig
from evergreen.evaluation.queries import Queries
from evergreen.evaluation.ranking import KNOWN_ITEMS, NEW_ITEMS, RankedQueries
from evergreen.evaluation.rows import PERIODS, TestRows, row_periods, row_statistics
from evergreen.metrics.bootstrap import Interval, cluster_bootstrap
from evergreen.metrics.statistic import IntArray, Mean, Statistic


@dataclass(frozen=True)
class KnownIds:
    """Users and items that have an event in the train split."""

    users: pa.Array
    items: pa.Array

    @classmethod
    def of(cls, training_set: TrainingSet) -> KnownIds:
        """Read them. Items that were only drawn as negatives do not count: nobody had an event with them."""
        rows = training_set.read("train", ["user_id", "item_id", "label"])
        if training_set.kind is LogKind.INTERACTIONS:
            rows = rows.filter(pc.greater(rows["label"], 0))
        users, items = (pc.unique(rows[name].drop_null()) for name in ("user_id", "item_id"))
        return cls(users, items)


@dataclass(frozen=True)
class Slice:
    """A part of the rows (or queries), and how to measure every model on it."""

    dimension: str
    name: str
    index: IntArray
    positives: int
    statistics: Callable[[], Mapping[str, Statistic]]
    skipped: str | None = None


def row_slices(rows: TestRows, known: KnownIds, *, kind: LogKind, metric: str, config: EvaluationConfig) -> list[Slice]:
    """Slices of test rows: new and known users and items, users with and without a history, and days."""

    def make(dimension: str, name: str, mask: NDArray[np.bool_]) -> Slice:
        index = np.flatnonzero(mask)
        labels = rows.labels[index]

        def statistics() -> dict[str, Statistic]:
            bins = config.calibration_bins
            return {
                model: row_statistics(kind, labels, predictions[index], calibration_bins=bins)[metric]
                for model, predictions in rows.predictions.items()
            }

        positives = 0 if kind is LogKind.RATINGS else int(labels.sum())
        return Slice(dimension, name, index, positives, statistics, _too_few(len(index), positives))

    def _too_few(num_rows: int, positives: int) -> str | None:
        if num_rows < config.min_slice_rows:
            return f"{num_rows} rows, at least {config.min_slice_rows} are needed"
        if kind is not LogKind.RATINGS and positives < config.min_slice_positives:
            return f"{positives} positives, at least {config.min_slice_positives} are needed"
        if kind is not LogKind.RATINGS and positives == num_rows:
            return "every row is positive"
        return None

    slices = []
    for dimension, ids in (("user", known.users), ("item", known.items)):
        column = rows.keys[f"{dimension}_id"]
        present = column.is_valid().to_numpy()
        if not present.any():
            continue
        is_known = pc.is_in(column, value_set=ids.cast(column.type)).to_numpy()
        slices.append(make(dimension, f"new {dimension}s", present & ~is_known))
        slices.append(make(dimension, f"known {dimension}s", present & is_known))
        if dimension == "user" and rows.has_history is not None:
            slices += _by_history(present, rows.has_history, make)
    return slices + _by_time(rows.keys["event_timestamp"], make, config)


def query_slices(
    queries: Queries, ranked: RankedQueries, known: KnownIds, *, metric: str, config: EvaluationConfig
) -> list[Slice]:
    """Slices of ranked queries: as `row_slices`, with new and known relevant items."""
    num_relevant = np.array([len(query.relevant) for query in queries.queries])

    def make(dimension: str, name: str, mask: NDArray[np.bool_]) -> Slice:
        index = np.flatnonzero(mask)
        values = {model: metrics[metric][index] for model, metrics in ranked.metrics.items()}
        return query_slice(dimension, name, index, int(num_relevant[index].sum()), values)

    def query_slice(
        dimension: str, name: str, index: IntArray, positives: int, values: Mapping[str, NDArray[np.float64]]
    ) -> Slice:
        skipped = None
        if len(index) < config.min_slice_queries:
            skipped = f"{len(index)} queries, at least {config.min_slice_queries} are needed"
        return Slice(dimension, name, index, positives, lambda: {m: Mean(v) for m, v in values.items()}, skipped)

    users = pa.array([query.user_id for query in queries.queries], pa.string())
    is_known = pc.is_in(users, value_set=known.users.cast(pa.string())).to_numpy(zero_copy_only=False)
    slices = [make("user", "new users", ~is_known), make("user", "known users", is_known)]
    slices += _by_history(np.ones(len(users), dtype=bool), ranked.has_history, make)
    for name in (NEW_ITEMS, KNOWN_ITEMS):
        part = ranked.item_slices[name]
        slices.append(query_slice("item", name, part.queries, part.num_relevant, part.values))
    times = pa.chunked_array([pa.array([query.time for query in queries.queries], TIMESTAMP_TYPE)])
    return slices + _by_time(times, make, config)


def _by_history(
    present: NDArray[np.bool_], has_history: NDArray[np.bool_], make: Callable[[str, str, NDArray[np.bool_]], Slice]
) -> list[Slice]:
    """Users of whom nothing is known when they ask, and the others: new users may have a history of some hours."""
    return [
        make("user", "users without history", present & ~has_history),
        make("user", "users with history", present & has_history),
    ]


def _by_time(
    timestamps: pa.ChunkedArray, make: Callable[[str, str, NDArray[np.bool_]], Slice], config: EvaluationConfig
) -> list[Slice]:
    """Slices by day; by week or month where most days hold too little to measure."""
    for unit in PERIODS:
        named = row_periods(timestamps, unit=unit, max_periods=config.max_periods)
        periods, codes = np.unique(named, return_inverse=True)
        slices = [make(unit, str(period), codes == i) for i, period in enumerate(periods)]
        # "until …" sorts behind the digits, but is the oldest.
        slices.sort(key=lambda part: (not part.name.startswith("until"), part.name))
        if 2 * sum(part.skipped is None for part in slices) >= len(slices):
            break
    return slices


def estimate_slices(slices: Sequence[Slice], clusters: IntArray, config: EvaluationConfig) -> Iterator[SliceEstimate]:
    """Measure every model on every slice.

    Args:
        slices: parts of the rows or queries.
        clusters: of all rows or queries, (num_rows,).
        config: replicates and seed.
    """
    for part in slices:
        models: dict[str, Estimate] = {}
        if part.skipped is None:
            bootstrap = cluster_bootstrap(
                part.statistics(), clusters[part.index], num_replicates=config.num_replicates, seed=config.seed
            )
            models = {name: as_estimate(bootstrap.interval(name)) for name in bootstrap.values}
        yield SliceEstimate(
            dimension=part.dimension,
            name=part.name,
            rows=len(part.index),
            positives=part.positives,
            models=models,
            skipped=part.skipped,
        )


def as_estimate(interval: Interval, *, undefined: str = "these rows have one class only") -> Estimate:
    """An interval as the contract has it: null with a reason where it is undefined.

    Args:
        interval: of a metric or a difference.
        undefined: the reason to give.
    """
    if not np.isfinite(interval.value):
        return Estimate(value=None, reason=undefined)
    if not np.isfinite(interval.low):
        return Estimate(value=interval.value, reason="undefined on every draw, so there is no interval")
    return Estimate(value=interval.value, low=interval.low, high=interval.high)
