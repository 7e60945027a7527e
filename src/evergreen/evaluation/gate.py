"""The gate: a challenger goes out only if it beats what serves on the newest rows, is calibrated, and quick enough.

Both models predict the test split of the challenger's training set: the newest rows whose labels are final. The
challenger has not seen them. What serves may have, if it was trained on a window that reaches into them: then it is
harder to beat, and the gate errs on the side of what serves. The difference is paired and users are resampled, so that
the same hard day does not count twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from evergreen.contracts.artifact import JsonModel
from evergreen.contracts.evaluation import Estimate, Latency, Verdict
from evergreen.contracts.gate import GateReport
from evergreen.contracts.mapping import LogKind
from evergreen.contracts.training_set import TrainingSet
from evergreen.evaluation.champion import format_estimate
from evergreen.evaluation.config import EvaluationConfig, Scorer
from evergreen.evaluation.latency import measure_latency
from evergreen.evaluation.rows import predict_test_rows, row_clusters, row_statistics
from evergreen.evaluation.slices import as_estimate
from evergreen.metrics.bootstrap import Bootstrap, Interval, cluster_bootstrap

_CHALLENGER, _INCUMBENT = "challenger", "incumbent"


class GateConfig(JsonModel):
    """What a challenger must hold."""

    min_positives: int = Field(default=100, ge=1)
    """Of the test rows; below it an interval of normalized entropy says too little."""
    max_click_rate_ratio: float = Field(default=1.25, gt=1)
    """By which factor predicted clicks may lie above or below what was observed, beyond the interval. Auctions and
    blends of several models read probabilities, so a better order with wrong numbers is no better model."""
    latency_budget_ms: float = Field(default=50.0, gt=0)
    """p99 of scoring 500 candidates."""
    must_beat: bool = True
    """Whether being as good is not enough. A model that is no better costs a release and brings nothing."""
    seed: int = 0


def gate_challenger(
    training_set: TrainingSet, challenger: Scorer, incumbent: Scorer | None, *, config: GateConfig | None = None
) -> GateReport:
    """Compare a challenger with what serves.

    Args:
        training_set: of the challenger; its test split is compared on.
        challenger: the model that was trained on it.
        incumbent: what serves, of an earlier snapshot; None where nothing does: then it need not be beaten.
        config: what must hold.

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
    passed, reason = _judge(
        challenger.version, incumbent, metric, difference, calibration, latency, split.positives, kind, config
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
        verdict=_verdict(difference) if difference is not None else None,
        click_rate_ratio=as_estimate(calibration) if calibration is not None else None,
        latency=latency,
        passed=passed,
        reason=reason,
    )


def _judge(
    version: str,
    incumbent: Scorer | None,
    metric: str,
    difference: Interval | None,
    calibration: Interval | None,
    latency: Latency,
    positives: int,
    kind: LogKind,
    config: GateConfig,
) -> tuple[bool, str]:
    """Whether it passes, and why in words: the first thing that stands against it, or what speaks for it."""
    if kind is not LogKind.RATINGS and positives < config.min_positives:
        return False, f"{positives} clicks in the test rows, {config.min_positives} needed to tell models apart"
    if not latency.within_budget:
        return False, f"p99 of {latency.p99_ms:.1f} ms is over the budget of {config.latency_budget_ms:g} ms"
    if calibration is not None:
        most = config.max_click_rate_ratio
        if calibration.low > most or calibration.high < 1 / most:
            words = format_estimate(as_estimate(calibration))
            return False, f"predicts {words} times the clicks that came: more than {most:g} times off"
    if incumbent is None or difference is None:
        return True, f"{version} is the first: there is nothing to beat"
    words = f"{metric} differs by {format_estimate(as_estimate(difference), signed=True)} from {incumbent.version}"
    verdict = _verdict(difference)
    if verdict is Verdict.BETTER:
        return True, f"{words}: better outside the interval"
    if verdict is Verdict.TIED and not config.must_beat:
        return True, f"{words}: as good within the interval"
    return False, f"{words}: {'worse' if verdict is Verdict.WORSE else 'not better outside the interval'}"


def _verdict(difference: Interval) -> Verdict:
    if not difference.excludes_zero:
        return Verdict.TIED
    return Verdict.BETTER if difference.high < 0 else Verdict.WORSE


def _estimate(bootstrap: Bootstrap, name: str, metric: str) -> Estimate:
    return as_estimate(bootstrap.interval(f"{name} {metric}"))


@dataclass(frozen=True)
class _Facts:
    """`ModelFacts` under a name of ours: both may be of the same kind of model."""

    name: str
    kind: LogKind
    snapshot_id: str


class _Named:
    """A model under another name."""

    def __init__(self, name: str, package: Scorer) -> None:
        self._package = package
        self.info = _Facts(name, package.info.kind, package.info.snapshot_id)
        self.version = package.version
        self.encoder = package.encoder

    def scores_of_encoded(self, rows: Any) -> NDArray[np.floating[Any]]:
        return self._package.scores_of_encoded(rows)

    def predict_encoded(self, rows: Any, positions: NDArray[np.int32] | None = None) -> NDArray[np.floating[Any]]:
        return self._package.predict_encoded(rows, positions)

    def predict(self, table: Any) -> NDArray[np.floating[Any]]:
        return self._package.predict(table)
