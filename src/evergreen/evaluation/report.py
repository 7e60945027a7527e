"""report.html: an evaluation for people. One file, no script, nothing from the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from evergreen.contracts.evaluation import (
    BASE_RATE,
    Curves,
    EvaluationResult,
    ModelEvaluation,
    Verdict,
)
from evergreen.contracts.mapping import LogKind
from evergreen.contracts.snapshot import SnapshotManifest
from evergreen.contracts.training_set import SPLITS, TrainingSetManifest
from evergreen.evaluation import figures
from evergreen.evaluation.figures import Series
from evergreen.evaluation.ranking import RECENT_POPULARITY

_LABELS = {
    "auc": "AUC",
    "log_loss": "log loss",
    "normalized_entropy": "normalized entropy",
    "expected_calibration_error": "calibration error",
    "click_rate_ratio": "predicted / actual",
    "rmse": "RMSE",
    "mae": "MAE",
}
_PERIODS = ("day", "week", "month")
_LOWER_IS_BETTER = {"log_loss", "normalized_entropy", "expected_calibration_error", "rmse", "mae"}
_VERDICT_WORDS = {Verdict.BETTER: "better", Verdict.TIED: "tied", Verdict.WORSE: "worse"}


def metric_label(metric: str) -> str:
    """A metric's name for people: `ndcg_at_10` is "NDCG@10"."""
    name, at, k = metric.partition("_at_")
    if at:
        return f"{'NDCG' if name == 'ndcg' else name}@{k}"
    return _LABELS.get(metric, metric.replace("_", " "))


def metric_arrow(metric: str) -> str:
    """↓ where lower is better, ↑ where higher is; a ratio should be 1."""
    if metric == "click_rate_ratio":
        return "→ 1"
    return "↓" if metric in _LOWER_IS_BETTER else "↑"


def write_report(
    result: EvaluationResult,
    curves: Curves,
    training_set: TrainingSetManifest,
    snapshot: SnapshotManifest,
    path: Path,
) -> None:
    """Render the report.

    Args:
        result: what was measured.
        curves: ROC and reliability; may be empty.
        training_set: splits, features, and the rows that are in no split.
        snapshot: what the log holds, and what of it was left out.
        path: the file to write.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = lambda value: f"{value:,.4f}"
    environment.filters["count"] = lambda value: f"{value:,}"
    template = (resources.files("evergreen.evaluation") / "report.html.j2").read_text(encoding="utf-8")
    context = _context(result, curves, training_set, snapshot)
    path.write_text(environment.from_string(template).render(context), encoding="utf-8")


@dataclass(frozen=True)
class _MetricColumn:
    name: str
    label: str
    arrow: str
    primary: bool


@dataclass(frozen=True)
class _Table:
    title: str
    note: str
    columns: tuple[_MetricColumn, ...]
    models: tuple[ModelEvaluation, ...]
    """Those that have these metrics: a baseline that only ranks predicts no probability."""


def _context(
    result: EvaluationResult, curves: Curves, training_set: TrainingSetManifest, snapshot: SnapshotManifest
) -> dict[str, Any]:
    series = {
        model.name: Series(display_name(model.name), i, chosen=model.name == result.champion)
        for i, model in enumerate(result.models)
    }
    return {
        "result": result,
        "champion": next(model for model in result.models if model.name == result.champion),
        "baseline_name": "the base rate" if result.baseline == BASE_RATE else display_name(result.baseline),
        "primary_label": metric_label(result.primary_metric),
        "series": series,
        "tables": _tables(result),
        "figures": {name: Markup(svg) for name, svg in _figures(result, curves, training_set, series).items()},
        "slices": [part for part in result.slices if part.dimension not in _PERIODS],
        "period": next((part.dimension for part in result.slices if part.dimension in _PERIODS), "day"),
        "periods_skipped": sum(part.skipped is not None for part in result.slices if part.dimension in _PERIODS),
        "training_set": training_set,
        "snapshot": snapshot,
        "sections": {
            "Rows that broke the schema (quarantine)": snapshot.quarantined,
            "Good rows that the mapping or as_of leaves out": snapshot.left_out,
            "Events that are in no split": training_set.left_out,
        },
        "over_budget": [
            display_name(model.name)
            for model in result.models
            if model.latency is not None and not model.latency.within_budget
        ],
        "unit": "queries" if result.primary_metric.startswith("ndcg") else "rows",
        "is_rating": result.kind is LogKind.RATINGS,
        "verdict_words": _VERDICT_WORDS,
        "embargo": duration_words(training_set.embargo_seconds),
        "display_name": display_name,
    }


def display_name(model: str) -> str:
    """A model's name for people: `factorization_machine` is "factorization machine"."""
    return model.replace("_", " ")


def duration_words(seconds: float) -> str:
    """A duration in its largest whole unit: 3600 is "1 h", 5400 is "90 min"."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size and seconds % size == 0:
            return f"{seconds / size:g} {unit}"
    return f"{seconds:g} s"


def _tables(result: EvaluationResult) -> list[_Table]:
    metrics = [name for name in _LABELS if name in result.models[0].metrics]
    rankings = sorted((name for name in result.models[0].metrics if "_at_" in name), key=_metric_and_cutoff)
    tables = []
    if rankings and result.queries is not None:
        note = (
            f"{result.queries.evaluated:,} queries, each ranked over {result.queries.mean_candidates:,.0f} candidates "
            f"on average. The base rate is a random order"
            + (
                "; recent popularity ranks by positives an hour, averaged over the windows of the last hour to month."
                if RECENT_POPULARITY in {model.name for model in result.models}
                else "."
            )
        )
        tables.append(_table("Ranking the whole catalogue", note, rankings, result))
    note = f"{result.test_rows:,} rows" + (
        "" if result.kind is LogKind.RATINGS else f", {result.test_positives:,} positive"
    )
    if result.kind is LogKind.INTERACTIONS:
        note += "; negatives are drawn, so rates are those of the draw, not of the world"
    title = "Predicting ratings" if result.kind is LogKind.RATINGS else "Predicting probabilities"
    tables.append(_table(title, note + ".", metrics, result))
    return tables


def _table(title: str, note: str, metrics: Sequence[str], result: EvaluationResult) -> _Table:
    models = tuple(model for model in result.models if metrics[0] in model.metrics)
    return _Table(title, note, _columns(metrics, result.primary_metric), models)


def _metric_and_cutoff(metric: str) -> tuple[str, int]:
    name, _, k = metric.partition("_at_")
    return name, int(k)


def _columns(metrics: Sequence[str], primary: str) -> tuple[_MetricColumn, ...]:
    first_primary = sorted(metrics, key=lambda name: name != primary)
    return tuple(_MetricColumn(m, metric_label(m), metric_arrow(m), m == primary) for m in first_primary)


def _figures(
    result: EvaluationResult, curves: Curves, training_set: TrainingSetManifest, series: Mapping[str, Series]
) -> dict[str, str]:
    label = f"{metric_label(result.primary_metric)} ({'lower' if result.lower_is_better else 'higher'} is better)"
    primary = {model.name: model.metrics[result.primary_metric] for model in result.models}
    drawn = {
        "forest": figures.forest(
            [(series[name], estimate) for name, estimate in primary.items()],
            label=label,
            baseline=primary[result.baseline].value,
        ),
        "timeline": figures.timeline(
            [(name, *_split(training_set, name)) for name in SPLITS], as_of=training_set.as_of
        ),
    }
    timed = [(series[m.name], m.latency.p99_ms, primary[m.name]) for m in result.models if m.latency is not None]
    if any(estimate.value is not None for _, _, estimate in timed):
        drawn["latency"] = figures.quality_against_latency(timed, label=label, budget_ms=result.latency_budget_ms)
    if curves.models:
        ordered = {name: curves.models[name] for name in series if name in curves.models}
        drawn["roc"] = figures.roc_curves(ordered, series)
        drawn["reliability"] = figures.reliability(ordered, series)
    periods = [part for part in result.slices if part.dimension in _PERIODS]
    if sum(part.skipped is None for part in periods) > 1:
        drawn["by_period"] = figures.by_period(
            [part.name for part in periods],
            {m.name: [part.models.get(m.name) for part in periods] for m in _worth_a_line(result.models)},
            series=series,
            label=label,
        )
    return drawn


def _worth_a_line(models: Sequence[ModelEvaluation]) -> list[ModelEvaluation]:
    """The models whose line over time says something; a random order or a constant is in the other figures."""
    return [model for model in models if model.name != BASE_RATE]


def _split(training_set: TrainingSetManifest, name: str) -> tuple[Any, Any, str]:
    info = training_set.splits[name]
    words = f"{info.rows:,} rows"
    if training_set.mapping.kind is not LogKind.RATINGS:
        words += f", {info.label_mean:.2%} positive"
    return info.start, info.end, words
