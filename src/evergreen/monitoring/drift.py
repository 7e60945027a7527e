"""Data drift: do the test rows look like the rows that the models were trained on? By Evidently, for people.

Columns are judged by the size of the shift, not by a p-value: at thousands of rows every column differs
"significantly", and rows of one user are not independent. Numbers: the Wasserstein distance in standard deviations of
the train rows. Categories: the Jensen-Shannon distance, in [0, 1].
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from enum import StrEnum
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from evergreen.contracts.artifact import JsonModel
from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.mapping import LogKind
from evergreen.contracts.training_set import ColumnKind, TrainingSet

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

THRESHOLD = 0.1
"""A shift from here on counts as drift: a tenth of a standard deviation, or a Jensen-Shannon distance of 0.1."""

MAX_CATEGORIES = 50
ROWS_A_CATEGORY = 100
"""With fewer rows for each category, samples of the same rows lie further apart than the threshold."""

MIN_VALUES = 100
"""Known values that a column must have in both samples."""

_MISSING = "(missing)"
_IDS = ("user_id", "item_id")


class DriftMethod(StrEnum):
    """How the distance of a column is measured; Evidently's names."""

    WASSERSTEIN = "wasserstein"
    JENSEN_SHANNON = "jensenshannon"


class ColumnDrift(JsonModel):
    """How far a column of the test rows lies from the train rows."""

    method: DriftMethod
    distance: float
    drifted: bool


class DriftSummary(JsonModel):
    """The figures of a drift report."""

    reference_rows: int
    """Sampled from train."""
    current_rows: int
    """Sampled from test."""
    threshold: float
    columns: dict[str, ColumnDrift]
    label: ColumnDrift | None
    """Label drift, which is not data drift; null for interactions, where the share of positives is drawn."""
    left_out: dict[str, str]
    """Columns that are not compared, with the reason."""

    @property
    def num_columns(self) -> int:
        """How many feature columns were compared."""
        return len(self.columns)

    @property
    def drifted(self) -> tuple[str, ...]:
        """Names of the feature columns that drifted, the furthest first."""
        names = [name for name, column in self.columns.items() if column.drifted]
        return tuple(sorted(names, key=lambda name: -self.columns[name].distance))

    @property
    def num_drifted(self) -> int:
        """How many of them drifted."""
        return len(self.drifted)


def drift_report(training_set: TrainingSet, out_html: Path, *, sample_rows: int = 5000, seed: int = 0) -> DriftSummary:
    """Compare a sample of the test rows with one of the train rows and write Evidently's page on it.

    Ids, lists and columns of many categories are left out: their distance says how many values there are, not that the
    world changed, and Evidently's time grows with the square of them.

    Args:
        training_set: its train split is the reference, its test split is compared with it.
        out_html: the page to write; its folder must exist.
        sample_rows: of each split at most; Evidently's time and memory grow with it.
        seed: of the samples.

    Raises:
        ArtifactError: a split has no rows.
        ValueError: sample_rows is below 1.
    """
    if sample_rows < 1:
        raise ValueError(f"sample_rows={sample_rows}: must be at least 1")
    features = {feature.name: feature.kind for feature in training_set.manifest.features}
    scalars = [n for n, kind in features.items() if kind in (ColumnKind.NUMERIC, ColumnKind.CATEGORICAL)]
    columns = [name for name in scalars if name not in _IDS]
    left_out = {name: "an id" for name in scalars if name in _IDS}
    left_out |= {name: f"a {features[name].value} column" for name in features if name not in scalars}
    reference = sample_split(training_set, "train", [*columns, "label"], sample_rows=sample_rows, seed=seed)
    current = sample_split(training_set, "test", [*columns, "label"], sample_rows=sample_rows, seed=seed)
    methods: dict[str, DriftMethod] = {}
    for name in columns:
        reason = _why_not(reference[name], current[name], features[name])
        if reason is None:
            is_number = features[name] is ColumnKind.NUMERIC
            methods[name] = DriftMethod.WASSERSTEIN if is_number else DriftMethod.JENSEN_SHANNON
        else:
            left_out[name] = reason
    if not methods:
        logger.warning("no column can be compared: the splits have too few rows; see the page for the reason of each")
        out_html.write_text(_nothing_to_compare(reference.num_rows, current.num_rows, left_out))
    elif training_set.kind is LogKind.RATINGS:
        methods["label"] = DriftMethod.WASSERSTEIN
    elif training_set.kind is LogKind.IMPRESSIONS:
        methods["label"] = DriftMethod.JENSEN_SHANNON
    distances = {}
    if methods:
        distances = _run_evidently(_to_pandas(reference, methods), _to_pandas(current, methods), methods, out_html)
    drifts = {
        name: ColumnDrift(method=methods[name], distance=distance, drifted=distance >= THRESHOLD)
        for name, distance in distances.items()
    }
    label = drifts.pop("label", None)
    summary = DriftSummary(
        reference_rows=reference.num_rows,
        current_rows=current.num_rows,
        threshold=THRESHOLD,
        columns=drifts,
        label=label,
        left_out=left_out,
    )
    logger.info("%d of %d columns drifted: %s", summary.num_drifted, summary.num_columns, ", ".join(summary.drifted))
    return summary


def _nothing_to_compare(train_rows: int, test_rows: int, left_out: Mapping[str, str]) -> str:
    """The page for splits that are too small for any comparison."""
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(reason)}</td></tr>" for name, reason in left_out.items())
    return (
        "<!DOCTYPE html><html lang='en'><meta charset='utf-8'><title>Drift</title><h1>Nothing to compare</h1>"
        f"<p>{train_rows} training rows and {test_rows} test rows are too few to tell drift from chance.</p>"
        f"<table><tr><th>column</th><th>why it is left out</th></tr>{rows}</table></html>\n"
    )


def sample_split(training_set: TrainingSet, split: str, columns: list[str], *, sample_rows: int, seed: int) -> pa.Table:
    """Rows of a split drawn by seed without replacement, in time order; read in a stream.

    Raises:
        ArtifactError: the split has no rows.
    """
    with pq.ParquetFile(training_set.file(split)) as file:
        num_rows = int(file.metadata.num_rows)
        if num_rows == 0:
            raise ArtifactError(f"{training_set.path}: the {split} split has no rows, so drift cannot be measured")
        rng = np.random.default_rng(seed)
        chosen = np.sort(rng.choice(num_rows, size=min(sample_rows, num_rows), replace=False))
        parts, start = [], 0
        for batch in file.iter_batches(batch_size=100_000, columns=columns):
            end = start + batch.num_rows
            inside = chosen[np.searchsorted(chosen, start) : np.searchsorted(chosen, end)] - start
            parts.append(batch.take(pa.array(inside)))
            start = end
    return pa.Table.from_batches(parts).combine_chunks()


def _why_not(reference: pa.ChunkedArray, current: pa.ChunkedArray, kind: ColumnKind) -> str | None:
    """Why a column cannot be compared; None when it can."""
    if kind is ColumnKind.CATEGORICAL:
        values = pc.unique(pa.chunked_array([*reference.chunks, *current.chunks]).fill_null(_MISSING))
        most = min(MAX_CATEGORIES, min(len(reference), len(current)) // ROWS_A_CATEGORY)
        if len(values) > most:
            return f"{len(values)} categories in the samples, which are large enough for {most}"
        if len(values) < 2:
            return "one value in both samples"
        return None
    for name, column in (("train", reference), ("test", current)):
        if (known := len(column) - column.null_count) < MIN_VALUES:
            return f"{known} known values in the {name} sample, at least {MIN_VALUES} are needed"
    lowest = min(pc.min(reference).as_py(), pc.min(current).as_py())
    if lowest == max(pc.max(reference).as_py(), pc.max(current).as_py()):
        return "one value in both samples"
    return None


def _to_pandas(sample: pa.Table, methods: Mapping[str, DriftMethod]) -> pd.DataFrame:
    """The columns that are compared. A missing category is a category; a missing number is left out by Evidently."""
    columns = {}
    for name, method in methods.items():
        if method is DriftMethod.JENSEN_SHANNON:
            columns[name] = sample[name].cast(pa.string()).fill_null(_MISSING)
        else:
            columns[name] = sample[name].cast(pa.float64())
    frame: pd.DataFrame = pa.table(columns).to_pandas()
    return frame


def _run_evidently(
    reference: pd.DataFrame, current: pd.DataFrame, methods: Mapping[str, DriftMethod], out_html: Path
) -> dict[str, float]:
    """Write the page; distance by column."""
    # Takes several seconds to import, so only who asks for a report pays for it.
    from evidently import DataDefinition, Dataset, Report
    from evidently.presets import DataDriftPreset

    definition = DataDefinition(
        numerical_columns=[name for name, method in methods.items() if method is DriftMethod.WASSERSTEIN],
        categorical_columns=[name for name, method in methods.items() if method is DriftMethod.JENSEN_SHANNON],
    )
    preset = DataDriftPreset(
        columns=list(methods),
        num_method=DriftMethod.WASSERSTEIN.value,
        cat_method=DriftMethod.JENSEN_SHANNON.value,
        num_threshold=THRESHOLD,
        cat_threshold=THRESHOLD,
    )
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # numpy and pandas warn of Evidently's use of them, which nobody here can mend
        snapshot = Report([preset]).run(
            Dataset.from_pandas(current, data_definition=definition),
            Dataset.from_pandas(reference, data_definition=definition),
        )
        snapshot.save_html(str(out_html))
        metrics = snapshot.dict()["metrics"]
    distances = {
        metric["config"]["column"]: float(metric["value"])
        for metric in metrics
        if metric["config"]["type"] == "evidently:metric_v2:ValueDrift"
    }
    if missing := sorted(methods.keys() - distances.keys()):
        raise ArtifactError(f"Evidently measured no distance for {missing}")
    return {name: distances[name] for name in methods}
