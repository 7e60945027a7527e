"""Evaluate models on the same test rows, choose the champion, and write metrics.json, curves.json and report.html."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np
import pyarrow as pa

from evergreen.contracts.artifact import atomic_directory
from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.evaluation import (
    BASE_RATE,
    Difference,
    Evaluation,
    EvaluationResult,
    Latency,
    ModelEvaluation,
    RankingQueries,
    Verdict,
)
from evergreen.contracts.feature_tables import FeatureTables
from evergreen.contracts.mapping import LogKind
from evergreen.contracts.snapshot import Snapshot
from evergreen.contracts.training_set import TrainingSet
from evergreen.evaluation.champion import Choice, Contender, choose_champion
from evergreen.evaluation.config import EvaluationConfig, Scorer
from evergreen.evaluation.curves import model_curves
from evergreen.evaluation.latency import measure_latency
from evergreen.evaluation.queries import Queries, find_queries
from evergreen.evaluation.ranking import RECENT_POPULARITY, RankedQueries, rank_queries
from evergreen.evaluation.report import write_report
from evergreen.evaluation.rows import Clusters, TestRows, predict_test_rows, row_clusters, row_statistics
from evergreen.evaluation.slices import KnownIds, Slice, as_estimate, estimate_slices, query_slices, row_slices
from evergreen.metrics.bootstrap import Bootstrap, Interval, cluster_bootstrap
from evergreen.metrics.statistic import IntArray, Mean, Statistic

logger = logging.getLogger(__name__)

POPULARITY = "popularity"

__all__ = ["EvaluationConfig", "evaluate_models"]


def evaluate_models(
    training_set: TrainingSet,
    packages: Sequence[Scorer],
    out: Path,
    *,
    tables: FeatureTables,
    snapshot: Snapshot,
    config: EvaluationConfig | None = None,
) -> Evaluation:
    """Measure every model on the test rows, with intervals, and say which should serve.

    Args:
        training_set: its test split is evaluated; its train split says who and what is known.
        packages: the models, trained on this snapshot.
        out: the directory to write; replaced as a whole.
        tables: feature tables of the same snapshot, for whole-catalogue ranking.
        snapshot: the log.
        config: settings; default: `EvaluationConfig()`.

    Raises:
        ArtifactError: there are no models or no test rows, two models share a name, a model, the tables or the
            training set is of another snapshot, or a prediction is not finite.
    """
    from evergreen.models.registry import MODEL_NAMES  # imports the models, and with them torch

    config = config or EvaluationConfig()
    _check_inputs(training_set, packages, tables, snapshot)
    packages = sorted(packages, key=lambda p: (*MODEL_NAMES, p.info.name).index(p.info.name))
    rows = predict_test_rows(training_set, packages, config)
    clusters = row_clusters(rows.keys)
    logger.info("%d test rows of %d %s", rows.num_rows, len(np.unique(clusters.codes)), clusters.unit)
    bootstraps = [_bootstrap_rows(rows, clusters, training_set.kind, config)]
    known = KnownIds.of(training_set)
    ranking = _rank(training_set, packages, tables, snapshot, known, config)
    names = [BASE_RATE, *(package.info.name for package in packages)]
    if ranking is not None and ranking.ranked is not None:
        names = list(ranking.ranked.metrics)
        bootstraps.append(_bootstrap_queries(ranking.ranked, ranking.clusters.codes, config))
    comparison = _comparison(training_set.kind, names, ranking, bootstraps, config)
    differences = _differences(comparison, names)
    request = ranking.ranked.latency_rows if ranking is not None and ranking.ranked is not None else rows.sample
    latencies = measure_latency(packages, request, config)
    choice = _choose(packages, comparison, differences, latencies, MODEL_NAMES, config)
    logger.info("champion: %s. %s", choice.champion, choice.reason)
    slices, slice_clusters = _slices(rows, clusters, ranking, known, comparison, training_set.kind, config)
    split = training_set.manifest.splits["test"]
    result = EvaluationResult(
        snapshot_id=training_set.manifest.snapshot_id,
        mapping=training_set.manifest.mapping.name,
        kind=training_set.kind,
        as_of=training_set.manifest.as_of,
        test_start=split.start,
        test_end=split.end,
        test_rows=rows.num_rows,
        test_positives=split.positives,
        primary_metric=comparison.metric,
        lower_is_better=comparison.lower_is_better,
        baseline=comparison.baseline,
        resampled=(clusters if comparison.bootstrap is bootstraps[0] or ranking is None else ranking.clusters).unit,
        num_clusters=comparison.bootstrap.num_clusters,
        num_replicates=config.num_replicates,
        latency_budget_ms=config.latency_budget_ms,
        champion=choice.champion,
        champion_version=next(p.version for p in packages if p.info.name == choice.champion),
        reason=comparison.note + choice.reason,
        any_beats_baseline=choice.any_beats_baseline,
        models=tuple(
            _model(name, packages, bootstraps, differences, latencies, comparison.baseline, choice.champion)
            for name in names
        ),
        slices=tuple(estimate_slices(slices, slice_clusters, config)),
        queries=ranking.summary if ranking is not None else None,
    )
    threshold = training_set.manifest.splits["train"].label_mean
    curves = model_curves(rows, kind=training_set.kind, threshold=threshold, config=config)
    with atomic_directory(out) as scratch:
        result.write(scratch / Evaluation.METRICS)
        curves.write(scratch / Evaluation.CURVES)
        write_report(result, curves, training_set.manifest, snapshot.manifest, scratch / Evaluation.REPORT)
    return Evaluation.load(out)


def _check_inputs(
    training_set: TrainingSet, packages: Sequence[Scorer], tables: FeatureTables, snapshot: Snapshot
) -> None:
    if not packages:
        raise ArtifactError("no models to evaluate: train at least one")
    if twice := [name for name, n in Counter(package.info.name for package in packages).items() if n > 1]:
        raise ArtifactError(f"models {twice} are given twice: evaluate one package of each name at a time")
    snapshots = {
        f"training set {training_set.path}": training_set.manifest.snapshot_id,
        f"feature tables {tables.path}": tables.manifest.snapshot_id,
        **{f"model {package.version}": package.info.snapshot_id for package in packages},
    }
    for name, snapshot_id in snapshots.items():
        if snapshot_id != snapshot.id:
            raise ArtifactError(
                f"{name} was made from snapshot {snapshot_id[:12]}, not from {snapshot.id[:12]} ({snapshot.path}): "
                f"evaluate artifacts of one snapshot"
            )


@dataclass(frozen=True)
class _Ranking:
    """What whole-catalogue ranking gave; `ranked` is None when no query could be ranked."""

    queries: Queries
    ranked: RankedQueries | None
    clusters: Clusters
    summary: RankingQueries


def _rank(
    training_set: TrainingSet,
    packages: Sequence[Scorer],
    tables: FeatureTables,
    snapshot: Snapshot,
    known: KnownIds,
    config: EvaluationConfig,
) -> _Ranking | None:
    if training_set.kind is not LogKind.INTERACTIONS:
        return None
    split = training_set.manifest.splits["test"]
    queries = find_queries(
        snapshot, tables, start=split.start, end=split.end, max_queries=config.max_queries, seed=config.seed
    )
    ranked = None
    if queries.queries:
        items = known.items.to_pylist()
        ranked = rank_queries(
            queries,
            tables,
            packages,
            mapping=snapshot.mapping,
            known_items=items,
            config=config,
            with_recent_popularity=POPULARITY not in {package.info.name for package in packages},
        )
    users = pa.chunked_array([[query.user_id for query in queries.queries]], pa.string())
    clusters = row_clusters(pa.table({"user_id": users, "request_id": pa.nulls(len(users), pa.string())}))
    if clusters.unit == "rows":
        clusters = Clusters(clusters.codes, "queries")
    num_candidates = ranked.num_candidates if ranked is not None else np.array([], dtype=np.int64)
    return _Ranking(queries, ranked, clusters, queries.summary(num_candidates))


def _key(model: str, metric: str) -> str:
    return f"{model} {metric}"


def _bootstrap_rows(rows: TestRows, clusters: Clusters, kind: LogKind, config: EvaluationConfig) -> Bootstrap:
    statistics: dict[str, Statistic] = {}
    for model, predictions in rows.predictions.items():
        of_model = row_statistics(kind, rows.labels, predictions, calibration_bins=config.calibration_bins)
        statistics |= {_key(model, metric): statistic for metric, statistic in of_model.items()}
    return cluster_bootstrap(statistics, clusters.codes, num_replicates=config.num_replicates, seed=config.seed)


def _bootstrap_queries(ranked: RankedQueries, clusters: IntArray, config: EvaluationConfig) -> Bootstrap:
    statistics = {
        _key(model, metric): Mean(values)
        for model, metrics in ranked.metrics.items()
        for metric, values in metrics.items()
    }
    return cluster_bootstrap(statistics, clusters, num_replicates=config.num_replicates, seed=config.seed)


@dataclass(frozen=True)
class _Comparison:
    """By which metric models are compared, and against what."""

    metric: str
    lower_is_better: bool
    baseline: str
    bootstrap: Bootstrap
    note: str = ""


def _comparison(
    kind: LogKind,
    names: Sequence[str],
    ranking: _Ranking | None,
    bootstraps: Sequence[Bootstrap],
    config: EvaluationConfig,
) -> _Comparison:
    if kind is LogKind.RATINGS:
        return _Comparison("rmse", True, BASE_RATE, bootstraps[0])
    if ranking is None:
        return _Comparison("normalized_entropy", True, BASE_RATE, bootstraps[0])
    baseline = next(name for name in (POPULARITY, RECENT_POPULARITY, BASE_RATE) if name in names)
    if ranking.ranked is not None:
        return _Comparison(f"ndcg_at_{config.primary_cutoff}", False, baseline, bootstraps[1])
    found = ranking.queries
    note = (
        f"No query of the test period could be ranked over the catalogue (of {found.found} found, "
        f"{found.without_new_items} have no item that is new to their user and {found.unreachable} none that was in "
        f"the catalogue), so models are compared by normalized_entropy on the sampled rows. "
    )
    return _Comparison("normalized_entropy", True, baseline, bootstraps[0], note)


def _differences(comparison: _Comparison, names: Sequence[str]) -> dict[tuple[str, str], Difference]:
    """Of every ordered pair of models: the primary metric of the first minus that of the second."""
    differences = {}
    for a, b in permutations(names, 2):
        interval = comparison.bootstrap.difference(_key(a, comparison.metric), _key(b, comparison.metric))
        verdict = _verdict(interval, lower_is_better=comparison.lower_is_better)
        differences[a, b] = Difference(against=b, estimate=as_estimate(interval), verdict=verdict)
    return differences


def _verdict(interval: Interval, *, lower_is_better: bool) -> Verdict:
    if not interval.excludes_zero:
        return Verdict.TIED
    return Verdict.BETTER if (interval.high < 0) == lower_is_better else Verdict.WORSE


def _choose(
    packages: Sequence[Scorer],
    comparison: _Comparison,
    differences: Mapping[tuple[str, str], Difference],
    latencies: Mapping[str, Latency],
    simplest_first: Sequence[str],
    config: EvaluationConfig,
) -> Choice:
    contenders = [
        Contender(
            name=package.info.name,
            value=as_estimate(comparison.bootstrap.interval(_key(package.info.name, comparison.metric))),
            latency=latencies[package.info.name],
        )
        for package in packages
    ]
    return choose_champion(
        contenders,
        differences,
        metric=comparison.metric,
        lower_is_better=comparison.lower_is_better,
        baseline=comparison.baseline,
        latency_budget_ms=config.latency_budget_ms,
        simplest_first=simplest_first,
    )


def _slices(
    rows: TestRows,
    clusters: Clusters,
    ranking: _Ranking | None,
    known: KnownIds,
    comparison: _Comparison,
    kind: LogKind,
    config: EvaluationConfig,
) -> tuple[list[Slice], IntArray]:
    if ranking is not None and ranking.ranked is not None:
        slices = query_slices(ranking.queries, ranking.ranked, known, metric=comparison.metric, config=config)
        return slices, ranking.clusters.codes
    return row_slices(rows, known, kind=kind, metric=comparison.metric, config=config), clusters.codes


def _model(
    name: str,
    packages: Sequence[Scorer],
    bootstraps: Sequence[Bootstrap],
    differences: Mapping[tuple[str, str], Difference],
    latencies: Mapping[str, Latency],
    baseline: str,
    champion: str,
) -> ModelEvaluation:
    prefix = _key(name, "")
    against_baseline = differences.get((name, baseline))
    return ModelEvaluation(
        name=name,
        version=next((package.version for package in packages if package.info.name == name), None),
        metrics={
            key.removeprefix(prefix): as_estimate(bootstrap.interval(key))
            for bootstrap in bootstraps
            for key in bootstrap.values
            if key.startswith(prefix)
        },
        latency=latencies.get(name),
        against_baseline=against_baseline,
        against_champion=differences.get((name, champion)),
        beats_baseline=None if against_baseline is None else against_baseline.verdict is Verdict.BETTER,
    )
