"""What a policy has lost by old models, which of its retrainings were for nothing, and which it has missed.

All of it is computed from scores of the same rows by several models, so what makes a day hard cancels. A *fresh* model
of a step is one that was trained as of the step's start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import pyarrow as pa

from evergreen.contracts.evaluation import Estimate
from evergreen.contracts.evaluation import Verdict as Comparison
from evergreen.contracts.mapping import LogKind
from evergreen.evaluation.rows import row_clusters
from evergreen.laboratory.backtest_results import BacktestConfig, MissedRetraining, Retraining
from evergreen.laboratory.models import TrainedModel, score
from evergreen.laboratory.replay import ReplayedStep
from evergreen.laboratory.replayed_log import ReplayedLog
from evergreen.metrics.binary import Auc, NormalizedEntropy
from evergreen.metrics.bootstrap import CONFIDENCE, cluster_bootstrap
from evergreen.metrics.regression import RootMeanSquaredError
from evergreen.metrics.statistic import FloatArray, Statistic, evaluate

METRICS: dict[LogKind, tuple[str, Callable[[FloatArray, FloatArray], Statistic]]] = {
    LogKind.IMPRESSIONS: ("normalized_entropy", NormalizedEntropy),
    LogKind.INTERACTIONS: ("normalized_entropy", NormalizedEntropy),
    LogKind.RATINGS: ("rmse", RootMeanSquaredError),
}
"""What models are compared by; lower is better."""


@dataclass(frozen=True)
class _Rows:
    """Rows of a step."""

    labels: FloatArray
    keys: pa.Table
    """user_id and request_id: what the bootstrap draws."""


class ScoreMatrix:
    """Scores of the log's steps by models; each is computed once, when it is asked for."""

    def __init__(self, log: ReplayedLog, moments: Sequence[datetime]) -> None:
        """Compute nothing yet.

        Args:
            log: the rows.
            moments: step n lies between moments n and n + 1.
        """
        self._log, self._moments = log, moments
        _, self._metric = METRICS[log.snapshot.kind]
        # Labels of the last rows are not final.
        self._end = log.snapshot.as_of - log.snapshot.mapping.split.attribution_window
        self._known: dict[int, _Rows] = {}
        self._scores: dict[tuple[str, int], FloatArray] = {}

    def __len__(self) -> int:
        return len(self._moments) - 1

    def labels(self, step: int) -> FloatArray:
        """(num_rows,) labels of a step."""
        return self._rows(step).labels

    def scores(self, model: TrainedModel, step: int) -> FloatArray:
        """(num_rows,) of a step by a model, where each row was shown."""
        key = (model.version, step)
        if key not in self._scores:
            self._scores[key] = score(model.package, self._read(step)).shown
        return self._scores[key]

    def value(self, model: TrainedModel, step: int) -> float | None:
        """The metric of a model on a step; None where it is undefined."""
        return self._evaluate(self._metric, model, step)

    def auc(self, model: TrainedModel, step: int) -> float | None:
        """Area under the ROC curve of a model on a step; None where it is undefined, as for ratings."""
        return None if self._log.snapshot.kind is LogKind.RATINGS else self._evaluate(Auc, model, step)

    def change(
        self, new: Sequence[TrainedModel], old: Sequence[TrainedModel], steps: Sequence[int], config: BacktestConfig
    ) -> Estimate:
        """Metric of some models relative to others on the rows of some steps together, minus 1; users are resampled.

        Args:
            new: the model of each step.
            old: the other model of each step.
            steps: their numbers.
            config: how often users are drawn.
        """
        labels = np.concatenate([self.labels(step) for step in steps])
        if len(np.unique(labels)) < 2:
            return Estimate(value=None, reason=f"{len(labels)} rows, and all labels are alike")
        statistics = {
            name: self._metric(labels, np.concatenate([self.scores(m, s) for m, s in zip(models, steps, strict=True)]))
            for name, models in (("new", new), ("old", old))
        }
        clusters = row_clusters(pa.concat_tables([self._rows(step).keys for step in steps])).codes
        drawn = cluster_bootstrap(statistics, clusters, num_replicates=config.num_replicates, seed=config.seed)
        return _estimate(
            drawn.values["new"] / drawn.values["old"] - 1, drawn.replicates["new"] / drawn.replicates["old"] - 1
        )

    def _read(self, step: int) -> pa.Table:
        return self._log.read(self._moments[step], min(self._moments[step + 1], self._end))

    def _rows(self, step: int) -> _Rows:
        if step not in self._known:
            rows = self._read(step)
            self._known[step] = _Rows(
                rows["label"].to_numpy().astype(np.float64), rows.select(["user_id", "request_id"])
            )
        return self._known[step]

    def _evaluate(
        self, metric: Callable[[FloatArray, FloatArray], Statistic], model: TrainedModel, step: int
    ) -> float | None:
        labels = self.labels(step)
        value = evaluate(metric(labels, self.scores(model, step))) if len(labels) else float("nan")
        return value if np.isfinite(value) else None


def lost_to_staleness(
    values: Sequence[float | None], fresh: Sequence[float | None], config: BacktestConfig
) -> Estimate:
    """Mean over the steps of a policy's metric relative to that of fresh models, minus 1; steps are resampled.

    Pairs of one step are drawn together. Steps count as independent, so where a stale model stays for many of them the
    interval is somewhat too short.

    Args:
        values: the policy's, by step.
        fresh: those of fresh models.
        config: how often steps are drawn.
    """
    ratios = np.array([v / f - 1 for v, f in zip(values, fresh, strict=True) if v is not None and f is not None])
    if not len(ratios):
        return Estimate(value=None, reason="no step has a figure")
    rng = np.random.default_rng(config.seed)
    draws = rng.integers(0, len(ratios), (max(config.num_replicates, 1_000), len(ratios)))
    return _estimate(float(ratios.mean()), ratios[draws].mean(axis=1))


def judge_retrainings(steps: Sequence[ReplayedStep], matrix: ScoreMatrix, config: BacktestConfig) -> list[Retraining]:
    """Was each retraining worth it?

    The new model and the one that it replaced are compared on all rows of the `horizon` that follows, or of what the
    log has left of it, whatever the policy did in that time. The retraining was *false* unless the new model is better
    there outside the 95 % interval, users resampled and both models paired.
    """
    found = []
    length = max(config.horizon // config.step, 1)
    for number, step in enumerate(steps):
        if not step.retrained:
            continue
        old, following = steps[number - 1].model, range(number, min(number + length, len(matrix)))
        change = matrix.change([step.model] * len(following), [old] * len(following), following, config)
        found.append(
            Retraining(
                as_of=step.model.record.as_of,
                model_version=step.model.version,
                replaced=old.version,
                cpu_seconds=step.model.cpu_seconds,
                until=step.model.record.as_of + len(following) * config.step,
                change=change,
                comparison=compare(change),
            )
        )
    return found


def find_missed(
    steps: Sequence[ReplayedStep],
    fresh: Sequence[TrainedModel],
    matrix: ScoreMatrix,
    moments: Sequence[datetime],
    config: BacktestConfig,
) -> list[MissedRetraining]:
    """Where should it have retrained?

    A step is *stale* if the policy's model is worse on it than a fresh one by more than `stale`. A retraining was
    *missed* where the policy kept one model through at least `patience` stale steps in a row, and over all of these
    together it was worse outside the 95 % interval. A policy that acts within `patience` misses nothing.
    """
    missed = []
    first = 0
    while first < len(steps):
        end = first
        while (
            end < len(steps) and steps[end].model is steps[first].model and _is_stale(steps, fresh, matrix, end, config)
        ):
            end += 1
        if end - first >= config.patience:
            stretch = range(first, end)
            loss = matrix.change([steps[n].model for n in stretch], [fresh[n] for n in stretch], stretch, config)
            if compare(loss) is Comparison.WORSE:
                missed.append(MissedRetraining(start=moments[first], end=moments[end], loss=loss))
        first = max(end, first + 1)
    return missed


def _is_stale(
    steps: Sequence[ReplayedStep],
    fresh: Sequence[TrainedModel],
    matrix: ScoreMatrix,
    number: int,
    config: BacktestConfig,
) -> bool:
    own, best = matrix.value(steps[number].model, number), matrix.value(fresh[number], number)
    return own is not None and best is not None and own / best - 1 > config.stale


def compare(change: Estimate) -> Comparison | None:
    """What the interval of a relative change says, where lower is better; None: there is none."""
    if change.low is None or change.high is None:
        return None
    if change.high < 0:
        return Comparison.BETTER
    return Comparison.WORSE if change.low > 0 else Comparison.TIED


def _estimate(value: float, replicates: FloatArray) -> Estimate:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(replicates, [tail, 1 - tail])
    return Estimate(value=value, low=float(low), high=float(high))
