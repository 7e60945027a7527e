"""Evidently's report on a window, for people: how the columns that matter are distributed, under the gate's verdict.

It is a picture, not the decision. Evidently's own tests are left out, since they raise the alarm on almost every
window (`benchmarks/loop/drift_gate.md`); what it writes over a column is the gate's finding on it. Its time grows with
rows and with the square of categories, so it sees a sample, the columns with the most importance, and no ids.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from evergreen.contracts.impressions import feature_table
from evergreen.contracts.monitoring_report import ColumnDrift, DriftStatus, MonitoringReport
from evergreen.contracts.training_set import TrainingSet
from evergreen.models.package import ModelPackage
from evergreen.monitoring.drift import MAX_CATEGORIES, MIN_VALUES, sample_split
from evergreen.monitoring.gate import describe
from evergreen.monitoring.reference import LABEL, PREDICTION

MAX_ROWS = 20_000
MAX_COLUMNS = 15

_FINDINGS = {"feature_drift": "Features", "prediction_drift": "Predictions", "label_drift": "Labels"}
_EVIDENTLYS_WORD = re.compile(
    r'"value": "Drift in column \'([^"]*?)\'", "label": "Data drift (?:not )?detected\. ([^"]*)"'
)
_MISSING, _OTHER = "(missing)", "(other)"
_COLOURS = {
    DriftStatus.DRIFTED: "#b3261e",
    DriftStatus.SEASONAL: "#8a5a00",
    DriftStatus.STABLE: "#1b6e3c",
    DriftStatus.UNKNOWN: "#5f6368",
}


def write_evidently_report(
    current: pa.Table,
    reference: pa.Table,
    report: MonitoringReport,
    out_html: Path,
    out_json: Path,
    *,
    max_rows: int = MAX_ROWS,
    max_columns: int = MAX_COLUMNS,
    seed: int = 0,
) -> tuple[str, ...]:
    """Write the page and its figures.

    Args:
        current: rows of the window with columns of features, and "prediction" and "label" where there are any.
        reference: rows of the reference with the same columns; those that are not in both are left out.
        report: of the window; says which columns matter and what the gate found.
        out_html: the page; needs no network.
        out_json: what Evidently measured, with the verdicts beside it.
        max_rows: of each table at most, drawn by seed.
        max_columns: of features at most, those with the most importance, drifted ones first.
        seed: of the sample.

    Returns:
        Names of the columns on the page.

    Raises:
        ValueError: max_rows or max_columns is below 1.
    """
    if max_rows < 1 or max_columns < 1:
        raise ValueError(f"max_rows={max_rows}, max_columns={max_columns}: both must be at least 1")
    current, reference = (_sample(table, max_rows, seed) for table in (current, reference))
    shown = [n for n in _columns(report, max_columns) if _is_usable(current, n) and _is_usable(reference, n)]
    page, figures = (
        _run(current, reference, shown) if shown else ("<!DOCTYPE html><html lang='en'><body></body></html>", {})
    )
    details = {name: column for part in _FINDINGS for name, column in getattr(report, part).details.items()}
    out_html.write_text(_with_verdicts(page, details).replace("<body>", f"<body>{_heading(report, shown)}", 1))
    findings = {part: getattr(report, part).model_dump(mode="json") for part in _FINDINGS}
    out_json.write_text(json.dumps({"gate": findings, "evidently": figures}, indent=2) + "\n")
    return tuple(shown)


def rows_of_impressions(
    impressions: Iterable[pa.Table],
    *,
    model_version: str,
    start: datetime,
    end: datetime,
    max_rows: int = MAX_ROWS,
    seed: int = 0,
) -> pa.Table:
    """Rows for `write_evidently_report`: features and predictions as served, drawn by seed from a stream.

    Args:
        impressions: tables of `impression_schema`.
        model_version: whose answers are taken, those that had all features.
        start: of the window.
        end: of the window; half-open by event_timestamp.
        max_rows: to draw at most.
        seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    drawn, keys = pa.table({}), np.empty(0)
    for table in impressions:
        moments = table["event_timestamp"]
        is_inside = pc.and_(
            pc.greater_equal(moments, pa.scalar(start, moments.type)), pc.less(moments, pa.scalar(end, moments.type))
        )
        is_whole = pc.and_not(pc.equal(table["model_version"], model_version), table["degraded"])
        rows = table.filter(pc.and_(is_inside, is_whole))
        if not rows.num_rows:
            continue
        columns = feature_table(rows).append_column(PREDICTION, rows["score"])
        drawn = pa.concat_tables([drawn, columns], promote_options="default") if drawn.num_rows else columns
        # The rows with the smallest random keys of all are a sample of all, whenever the others are dropped.
        keys = np.append(keys, rng.random(rows.num_rows))
        kept = np.sort(np.argsort(keys, kind="stable")[:max_rows])
        drawn, keys = drawn.take(pa.array(kept)), keys[kept]
    return drawn


def rows_of_reference(
    training_set: TrainingSet, package: ModelPackage, *, split: str = "test", max_rows: int = MAX_ROWS, seed: int = 0
) -> pa.Table:
    """Rows for `write_evidently_report`: those that the model was accepted on, with its predictions and the labels.

    Args:
        training_set: that the model was trained on.
        package: the model.
        split: of the rows, as in `make_reference`.
        max_rows: to draw at most.
        seed: of the draw.

    Raises:
        ArtifactError: the split has no rows, or lacks a feature of the model.
    """
    names = [*(feature.name for feature in package.info.features), LABEL]
    rows = sample_split(training_set, split, names, sample_rows=max_rows, seed=seed)
    return rows.append_column(PREDICTION, pa.array(package.predict(rows)))


def _columns(report: MonitoringReport, max_columns: int) -> list[str]:
    """Drifted columns first, then by importance; predictions and labels on top."""
    details = report.feature_drift.details
    changed = (DriftStatus.DRIFTED, DriftStatus.SEASONAL)
    order = sorted(details, key=lambda name: (details[name].status not in changed, -details[name].weight, name))
    return [PREDICTION, LABEL, *order[:max_columns]]


def _sample(table: pa.Table, max_rows: int, seed: int) -> pa.Table:
    if table.num_rows <= max_rows:
        return table
    chosen = np.random.default_rng(seed).choice(table.num_rows, size=max_rows, replace=False)
    return table.take(pa.array(np.sort(chosen)))


def _is_usable(table: pa.Table, name: str) -> bool:
    return name in table.column_names and len(table) - table[name].null_count >= MIN_VALUES


def _run(current: pa.Table, reference: pa.Table, names: Sequence[str]) -> tuple[str, dict[str, float]]:
    """Evidently's page, and its distance of each column."""
    # Takes several seconds to import, so only who asks for a report pays for it.
    from evidently import DataDefinition, Dataset, Report
    from evidently.metrics import ValueDrift

    numbers = {n: all(_is_number(t[n].type) for t in (current, reference)) for n in names}
    frames = [
        pa.table({n: _as_number(t[n]) if numbers[n] else _as_category(t[n], reference[n]) for n in names}).to_pandas()
        for t in (current, reference)
    ]
    definition = DataDefinition(
        numerical_columns=[name for name in names if numbers[name]],
        categorical_columns=[name for name in names if not numbers[name]],
    )
    methods = {name: "wasserstein" if numbers[name] else "jensenshannon" for name in names}
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # numpy and pandas warn of Evidently's use of them, which nobody here can mend
        snapshot = Report([ValueDrift(column=name, method=methods[name]) for name in names]).run(
            *(Dataset.from_pandas(frame, data_definition=definition) for frame in frames)
        )
        page = str(snapshot.get_html_str(as_iframe=False))
        metrics = snapshot.dict()["metrics"]
    return page, {metric["config"]["column"]: float(metric["value"]) for metric in metrics}


def _is_number(dtype: pa.DataType) -> bool:
    return any(test(dtype) for test in (pa.types.is_integer, pa.types.is_floating, pa.types.is_list))


def _as_number(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return (pc.list_value_length(column) if pa.types.is_list(column.type) else column).cast(pa.float64())


def _as_category(column: pa.ChunkedArray, reference: pa.ChunkedArray) -> pa.ChunkedArray:
    """Text, with a name for what is missing, and one for what is not among the frequent values of the reference."""
    counts = pc.value_counts(reference.cast(pa.string()).drop_null())
    order = np.argsort(-counts.field("counts").to_numpy(), kind="stable")[:MAX_CATEGORIES]
    text = column.cast(pa.string())
    is_frequent = pc.is_in(text, value_set=counts.field("values").take(pa.array(order)))
    return pc.if_else(pc.or_(is_frequent, pc.is_null(text)), text, _OTHER).fill_null(_MISSING)


def _with_verdicts(page: str, details: Mapping[str, ColumnDrift]) -> str:
    """The page, with the gate's word in the place of Evidently's over each column."""

    def verdict(match: re.Match[str]) -> str:
        name, measured = match.groups()
        column = details.get(name)
        words = "not judged" if column is None else f"{column.status.value} ({describe(column)})"
        return f"""{match[0][: match[0].index('"label"')]}"label": {json.dumps(f"The gate: {words}. {measured}")}"""

    return _EVIDENTLYS_WORD.sub(verdict, page)


def _heading(report: MonitoringReport, shown: Sequence[str]) -> str:
    """The gate's findings, above everything else."""
    rows = "".join(
        f"<tr><th style='text-align:left;padding-right:1em'>{title}</th>"
        f"<td style='color:{_COLOURS[finding.status]};padding-right:1em'><b>{finding.status.value}</b></td>"
        f"<td>{escape(finding.reason)}</td></tr>"
        for part, title in _FINDINGS.items()
        for finding in [getattr(report, part)]
    )
    left_out = sorted(report.feature_drift.details.keys() - set(shown))
    return (
        "<section style='font-family:sans-serif;max-width:70em;margin:2em auto'>"
        f"<h1>{report.start:%Y-%m-%d %H:%M} to {report.end:%Y-%m-%d %H:%M} UTC, {escape(report.model_version)}</h1>"
        f"<p>{report.rows:,} rows of {report.users:,} users.</p><table>{rows}</table>"
        f"<p>Below: the columns that matter most, in a sample. Not shown: {escape(', '.join(left_out) or 'none')}.</p>"
        "</section>"
    )
