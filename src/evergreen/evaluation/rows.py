"""The test rows: what was predicted for each, and the metrics of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.evaluation import BASE_RATE
from evergreen.contracts.mapping import LogKind
from evergreen.contracts.training_set import TrainingSet
from evergreen.evaluation.config import EvaluationConfig, RowEncoder, Scorer
from evergreen.metrics.binary import Auc, CalibrationError, ClickRateRatio, LogLoss, NormalizedEntropy
from evergreen.metrics.regression import MeanAbsoluteError, RootMeanSquaredError
from evergreen.metrics.statistic import FloatArray, IntArray, Statistic

logger = logging.getLogger(__name__)

KEY_COLUMNS = ["event_timestamp", "request_id", "user_id", "item_id", "label"]
HISTORY = "user_history"
"""The feature that says whether a user did anything yet."""


@dataclass(frozen=True)
class TestRows:
    """The rows of the test split without their features, and every model's prediction of them."""

    __test__ = False  # the name is the field's; pytest should not collect it

    keys: pa.Table
    """KEY_COLUMNS, in time order."""
    labels: FloatArray
    predictions: Mapping[str, FloatArray]
    """By model, the base rate among them: (num_rows,) probability or rating."""
    has_history: NDArray[np.bool_] | None
    """(num_rows,) whether the row's user had a positive event before it; None where no row of the log has a history."""
    sample: pa.Table
    """Some rows with all their features, to measure latency on."""

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        return len(self.labels)


def predict_test_rows(training_set: TrainingSet, packages: Sequence[Scorer], config: EvaluationConfig) -> TestRows:
    """Let every model predict every test row, a chunk of rows at a time.

    What is predicted is the click at the position where the row was shown, for that is what its label tells.

    Raises:
        ArtifactError: there are no test rows, or a model predicts something that is not finite.
    """
    keys = training_set.read("test", KEY_COLUMNS)
    if keys.num_rows == 0:
        raise ArtifactError(
            f"{training_set.path}: the test split has no rows, so nothing can be evaluated: use a longer log, "
            f"a larger split.test_fraction or a shorter split.attribution_window in the mapping"
        )
    chunks: dict[str, list[FloatArray]] = {package.info.name: [] for package in packages}
    histories: list[NDArray[np.bool_]] = []
    sample: pa.Table | None = None
    done = 0
    with pq.ParquetFile(training_set.file("test")) as file:
        for batch in file.iter_batches(batch_size=config.chunk_rows):
            table = pa.Table.from_batches([batch])
            if sample is None:
                sample = table.slice(0, config.latency_rows)
            positions = table["position"].fill_null(0).to_numpy().astype(np.int32)
            for package, encoded in each_encoded(packages, partial(_transform, table)):
                shown = package.predict_encoded(encoded, positions)
                chunks[package.info.name].append(np.asarray(shown, dtype=np.float64))
            if HISTORY in table.column_names:
                histories.append(has_values(table[HISTORY]))
            done += table.num_rows
            logger.info("%d of %d test rows predicted", done, keys.num_rows)
    assert sample is not None
    base_rate = training_set.manifest.splits["train"].label_mean
    predictions = {BASE_RATE: np.full(keys.num_rows, base_rate)}
    for name, parts in chunks.items():
        predictions[name] = np.concatenate(parts)
        if bad := int((~np.isfinite(predictions[name])).sum()):
            raise ArtifactError(f"{name}: {bad} of {keys.num_rows} predictions are not finite: train it again")
    labels = keys["label"].to_numpy().astype(np.float64)
    has_history = np.concatenate(histories) if histories else None
    return TestRows(keys=keys, labels=labels, predictions=predictions, has_history=has_history, sample=sample)


def has_values(lists: pa.ChunkedArray) -> NDArray[np.bool_]:
    """(num_rows,) whether each list has a value; a null has none."""
    known: NDArray[np.bool_] = pc.greater(pc.list_value_length(lists).fill_null(0), 0).to_numpy()
    return known


def each_encoded(packages: Sequence[Scorer], encode: Callable[[RowEncoder], Any]) -> Iterator[tuple[Scorer, Any]]:
    """Each model with its encoded rows; models of one run have equal encoders, so rows are encoded once for them."""
    encoded: dict[str, Any] = {}
    for package in packages:
        digest = package.encoder.digest
        if digest not in encoded:
            encoded[digest] = encode(package.encoder)
        yield package, encoded[digest]


def _transform(table: pa.Table, encoder: RowEncoder) -> Any:
    return encoder.transform(table)


def row_statistics(
    kind: LogKind, labels: FloatArray, predictions: FloatArray, *, calibration_bins: int
) -> dict[str, Statistic]:
    """The metrics of one model's predictions that a kind of log has."""
    if kind is LogKind.RATINGS:
        return {"rmse": RootMeanSquaredError(labels, predictions), "mae": MeanAbsoluteError(labels, predictions)}
    return {
        "auc": Auc(labels, predictions),
        "log_loss": LogLoss(labels, predictions),
        "normalized_entropy": NormalizedEntropy(labels, predictions),
        "expected_calibration_error": CalibrationError(labels, predictions, num_bins=calibration_bins),
        "click_rate_ratio": ClickRateRatio(labels, predictions),
    }


@dataclass(frozen=True)
class Clusters:
    """Which rows belong together when the bootstrap draws."""

    codes: IntArray
    unit: str
    """"users", "requests" or "rows"."""


MIN_CLUSTERS = 20
"""With fewer, resampling them says little of the uncertainty: a single user would give intervals of no width."""


def row_clusters(keys: pa.Table) -> Clusters:
    """Users; requests when there are too few users to resample; rows when there are too few requests, too.

    A row that lacks the key which others have is a cluster of its own.
    """
    for column, unit in (("user_id", "users"), ("request_id", "requests")):
        if len(pc.unique(keys[column].drop_null())) >= MIN_CLUSTERS:
            return Clusters(_codes(keys[column]), unit)
    return Clusters(np.arange(keys.num_rows), "rows")


def _codes(column: pa.ChunkedArray) -> IntArray:
    encoded = column.combine_chunks().dictionary_encode()
    num_known = len(encoded.dictionary)
    codes: IntArray = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    missing = codes < 0
    codes[missing] = num_known + np.arange(int(missing.sum()))
    return codes


PERIODS = ("day", "week", "month")


def row_periods(timestamps: pa.ChunkedArray, *, unit: str, max_periods: int) -> NDArray[np.str_]:
    """The UTC day of each row as 2016-03-14, or the first day of its week (from Monday), or its month as 2016-03.

    Periods before the last `max_periods` are all "until <period>".
    """
    starts = pc.floor_temporal(timestamps, unit=unit).combine_chunks().dictionary_encode()
    names = [_date(moment)[: 7 if unit == "month" else None] for moment in starts.dictionary.to_pylist()]
    kept = sorted(set(names))[-max_periods:]
    older = sorted(set(names) - set(kept))
    labels = np.array([name if name in kept else f"until {older[-1]}" for name in names])
    named: NDArray[np.str_] = labels[starts.indices.to_numpy(zero_copy_only=False)]
    return named


def _date(moment: datetime) -> str:
    return moment.astimezone(UTC).date().isoformat()
