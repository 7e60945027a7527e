"""The gate: a challenger goes out only if it beats what serves on the newest rows, is calibrated, and quick enough.

Both models predict the test split of the challenger's training set: the newest rows whose labels are final. The
challenger has not seen them. What serves may have, if it was trained on a window that reaches into them: then it is
harder to beat, and the gate errs on the side of what serves. The difference is paired and users are resampled, so that
the same hard day does not count twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from evergreen.contracts.evaluation import Estimate, Latency, Verdict
from evergreen.contracts.gate import GateReport, ServedComparison
from evergreen.contracts.mapping import LogKind
from evergreen.contracts.training_set import TrainingSet
from evergreen.evaluation.champion import format_estimate
from evergreen.evaluation.config import EvaluationConfig, GateConfig, Scorer
from evergreen.evaluation.latency import measure_latency
from evergreen.evaluation.rows import predict_test_rows, row_clusters, row_statistics
from evergreen.evaluation.served import compare_served, is_skewed, verdict_of
from evergreen.evaluation.slices import as_estimate
from evergreen.metrics.bootstrap import Bootstrap, Interval, cluster_bootstrap

_CHALLENGER, _INCUMBENT = "challenger", "incumbent"


def gate_challenger(
    training_set: TrainingSet,
    challenger: Scorer,
    incumbent: Scorer | None,
    *,
    config: GateConfig | None = None,
    served: Iterable[pa.Table] | None = None,
) -> GateReport:
    """Compare a challenger with what serves.

    Args:
        training_set: of the challenger; its test split is compared on.
        challenger: the model that was trained on it.
        incumbent: what serves, of an earlier snapshot; None where nothing does: then it need not be beaten.
        config: what must hold.
        served: the log of what was served (`contracts.impressions.read_impressions`) over the time of the test rows:
            the challenger must hold with the features that it has, too. Without it, a training set that knows the
            future is taken at its word: leave it out only for a first model.

    Raises:
        ArtifactError: there are no test rows, or a model lacks a feature or predicts what is not finite.
    """
    config = config or GateConfig()
    kind = training_set.kind
    split = training_set.manifest.splits["test"]
    settings = EvaluationConfig(seed=config.seed, latency_budget_ms=config.latency_budget_ms)
    contenders: list[Scorer] = [_Named(_CHALLENGER, challenger)]
    if incumbent is not None:
        contenders.append(_Named(_INCUMBENT, incumbent))
    rows = predict_test_rows(training_set, contenders, settings)
    statistics = {
        f"{contender.info.name} {metric}": statistic
        for contender in contenders
        for metric, statistic in row_statistics(
            kind, rows.labels, rows.predictions[contender.info.name], calibration_bins=settings.calibration_bins
        ).items()
    }
    clusters = row_clusters(rows.keys).codes
    bootstrap = cluster_bootstrap(statistics, clusters, num_replicates=settings.num_replicates, seed=config.seed)
    metric = "rmse" if kind is LogKind.RATINGS else "normalized_entropy"
    latency = measure_latency([contenders[0]], rows.sample, settings)[_CHALLENGER]
    difference = None
    if incumbent is not None:
        difference = bootstrap.difference(f"{_CHALLENGER} {metric}", f"{_INCUMBENT} {metric}")
    calibration = None if kind is LogKind.RATINGS else bootstrap.interval(f"{_CHALLENGER} click_rate_ratio")
    as_served = None
    if served is not None:
        old = contenders[1] if incumbent is not None else None
        as_served = compare_served(training_set, contenders[0], old, rows, served, metric=metric, config=config)
    passed, reason = _judge(
        training_set, challenger, incumbent, metric, difference, calibration, latency, as_served, config
    )
    return GateReport(
        challenger=challenger.version,
        incumbent=incumbent.version if incumbent is not None else None,
        test_start=split.start,
        test_end=split.end,
        rows=rows.num_rows,
        positives=split.positives,
        metric=metric,
        challenger_value=_estimate(bootstrap, _CHALLENGER, metric),
        incumbent_value=_estimate(bootstrap, _INCUMBENT, metric) if incumbent is not None else None,
        difference=as_estimate(difference) if difference is not None else None,
        verdict=verdict_of(difference) if difference is not None else None,
        click_rate_ratio=as_estimate(calibration) if calibration is not None else None,
        mean_prediction_ratio=float(rows.predictions[_CHALLENGER].mean() / rows.predictions[_INCUMBENT].mean())
        if incumbent is not None
        else None,
        served=as_served,
        latency=latency,
        passed=passed,
        reason=reason,
    )


def _judge(
    training_set: TrainingSet,
    challenger: Scorer,
    incumbent: Scorer | None,
    metric: str,
    difference: Interval | None,
    calibration: Interval | None,
    latency: Latency,
    served: ServedComparison | None,
    config: GateConfig,
) -> tuple[bool, str]:
    """Whether it passes, and why in words: the first thing that stands against it, or what speaks for it."""
    positives = training_set.manifest.splits["test"].positives
    known_until = min(training_set.manifest.as_of, challenger.info.as_of)
    if incumbent is not None and known_until < incumbent.info.as_of:
        return False, (
            f"it knows the world until {known_until}, {incumbent.version}, which serves, until "
            f"{incumbent.info.as_of}: has ingest stopped, or did its training end after that of a newer model?"
        )
    if training_set.kind is not LogKind.RATINGS and positives < config.min_positives:
        return False, f"{positives} clicks in the test rows, {config.min_positives} needed to tell models apart"
    if not latency.within_budget:
        return False, f"p99 of {latency.p99_ms:.1f} ms is over the budget of {config.latency_budget_ms:g} ms"
    if served is not None and (reason := _against_serving(served, metric, config)) is not None:
        return False, reason
    if calibration is not None and _is_off(as_estimate(calibration), config):
        return False, _words_of_calibration(as_estimate(calibration), config)
    if incumbent is None or difference is None:
        return True, f"{challenger.version} is the first: there is nothing to beat"
    words = f"{metric} differs by {format_estimate(as_estimate(difference), signed=True)} from {incumbent.version}"
    verdict = verdict_of(difference)
    if verdict is Verdict.BETTER:
        return True, f"{words}: better outside the interval"
    if verdict is Verdict.TIED and not config.must_beat:
        return True, f"{words}: as good within the interval"
    return False, f"{words}: {'worse' if verdict is Verdict.WORSE else 'not better outside the interval'}"


def _against_serving(served: ServedComparison, metric: str, config: GateConfig) -> str | None:
    """What speaks against a challenger with the features as served; None: nothing."""
    if served.positives < config.min_positives:
        left_out = ", ".join(f"{rows} {reason}" for reason, rows in served.left_out.items())
        return (
            f"{served.positives} positive test rows are in the log of what was served, {config.min_positives} needed "
            f"to know that features are served as they were trained ({left_out or 'none left out'}): give the log "
            "of the time of the test rows, or wait for more"
        )
    gain = served.never_served_gain
    if gain is not None and gain.low is not None and gain.low > 0:
        return (
            f"leans on {', '.join(served.never_served)}, which no server has logged: {metric} is lower by "
            f"{format_estimate(gain)} with the values of the training set, and nobody knows whether they are known "
            "before the click; a person who does may name them in trusted_features"
        )
    if is_skewed(served, config):
        worst = ", ".join(f"{name} ({gain:.4f})" for name, gain in served.skew_by_feature.items())
        return (
            f"training-serving skew: from features as trained to features as served its {metric} rises by "
            f"{format_estimate(served.skew_difference, signed=True)} more than that of what serves, most by "
            f"{worst or 'no one feature'}"
        )
    if served.click_rate_ratio is not None and _is_off(served.click_rate_ratio, config):
        return f"with features as served, it {_words_of_calibration(served.click_rate_ratio, config)}"
    if served.difference is None:
        return None
    words = f"with features as served, {metric} differs by {format_estimate(served.difference, signed=True)}"
    if served.verdict is Verdict.WORSE:
        return f"{words}: worse"
    if served.verdict is Verdict.TIED and config.must_beat:
        return f"{words}: not better outside the interval"
    return None


def _is_off(ratio: Estimate, config: GateConfig) -> bool:
    most = config.max_click_rate_ratio
    return ratio.low is not None and ratio.high is not None and (ratio.low > most or ratio.high < 1 / most)


def _words_of_calibration(ratio: Estimate, config: GateConfig) -> str:
    return (
        f"predicts {format_estimate(ratio)} times the clicks that came: more than {config.max_click_rate_ratio:g} "
        "times off"
    )


def _estimate(bootstrap: Bootstrap, name: str, metric: str) -> Estimate:
    return as_estimate(bootstrap.interval(f"{name} {metric}"))


@dataclass(frozen=True)
class _Facts:
    """`ModelFacts` under a name of ours: both may be of the same kind of model."""

    name: str
    kind: LogKind
    snapshot_id: str
    as_of: datetime


class _Named:
    """A model under another name."""

    def __init__(self, name: str, package: Scorer) -> None:
        self._package = package
        self.info = _Facts(name, package.info.kind, package.info.snapshot_id, package.info.as_of)
        self.version = package.version
        self.encoder = package.encoder

    def scores_of_encoded(self, rows: Any) -> NDArray[np.floating[Any]]:
        return self._package.scores_of_encoded(rows)

    def predict_encoded(self, rows: Any, positions: NDArray[np.int32] | None = None) -> NDArray[np.floating[Any]]:
        return self._package.predict_encoded(rows, positions)

    def predict(self, table: Any) -> NDArray[np.floating[Any]]:
        return self._package.predict(table)
