"""What came of a backtest: a file that the terminal's table and the benchmarks read.

results.json   BacktestResults
"""

from __future__ import annotations

from datetime import timedelta

from pydantic import AwareDatetime, Field

from evergreen.contracts.artifact import JsonModel
from evergreen.contracts.decision import TriggerName, Verdict
from evergreen.contracts.evaluation import Estimate
from evergreen.contracts.evaluation import Verdict as Comparison
from evergreen.contracts.mapping import LogKind

RESULTS_FILE = "results.json"


class BacktestConfig(JsonModel):
    """How a log is replayed."""

    model: str = "logistic_regression"
    """A name of the model registry."""
    seed: int = 0
    """Of drawn negatives, training and resampling."""
    warm_up: timedelta = Field(default=timedelta(days=14), gt=timedelta(0))
    """From the log's first midnight on; then the first model is trained, and is every policy's."""
    window: timedelta = Field(default=timedelta(days=28), gt=timedelta(0))
    """Time before its moment that a model learns from; shorter where the log has not begun."""
    step: timedelta = Field(default=timedelta(days=1), gt=timedelta(0))
    """Between two moments of decision; whole days."""
    validation: timedelta = Field(default=timedelta(days=1), gt=timedelta(0))
    """The newest time before a model's test rows: chooses and calibrates it, and is not learned from."""
    test: timedelta = Field(default=timedelta(days=1), gt=timedelta(0))
    """The newest time of all: what the monitors compare windows with."""
    stale: float = Field(default=0.02, gt=0)
    """Relative loss against a fresh model from which a step is stale; `DecisionConfig.quality_effect`, with reasons."""
    patience: int = Field(default=2, ge=1)
    """Stale steps in a row after which a retraining was missed; `DecisionConfig.quality_windows`."""
    horizon: timedelta = Field(default=timedelta(days=7), gt=timedelta(0))
    """Over which time a retraining must pay."""
    num_replicates: int = Field(default=200, ge=20)
    """Of the bootstrap."""


class Step(JsonModel):
    """The log between two moments of decision, [start, end)."""

    start: AwareDatetime
    end: AwareDatetime
    rows: int
    positives: int
    fresh: float | None
    """Metric of a model trained as of its start. None: all labels are alike, so there is no figure."""


class PolicyStep(JsonModel):
    """A step under a policy."""

    model_version: str
    trained_as_of: AwareDatetime
    value: float | None
    """Metric of the policy's model; None as in `Step.fresh`."""
    auc: float | None
    """None: as there, or the log is one of ratings."""
    verdict: Verdict | None
    """At its start; None: the first step."""
    reason: str
    raised: tuple[TriggerName, ...] = ()
    """Triggers, fired or held back."""
    failed: bool = False
    """A training was asked for and could not be done; the reason says why."""


class Retraining(JsonModel):
    """A training that a policy has asked for, and whether it was worth it."""

    as_of: AwareDatetime
    model_version: str
    replaced: str
    cpu_seconds: float
    until: AwareDatetime
    """End of the time over which both models are compared."""
    change: Estimate
    """Metric of the new model relative to the old one on the same rows: -0.02 is 2 % better. Users resampled."""
    comparison: Comparison | None
    """Whether the interval lies below 0 (better), above it, or around; None: there was nothing to compare on."""

    @property
    def is_false(self) -> bool:
        """Whether it brought nothing that can be told from chance: the model before would have done."""
        return self.comparison is not None and self.comparison is not Comparison.BETTER


class MissedRetraining(JsonModel):
    """A stretch of steps [start, end) in which the policy kept a model that a fresh one would have beaten."""

    start: AwareDatetime
    end: AwareDatetime
    loss: Estimate
    """Metric of the policy's model relative to that of the fresh ones; users resampled."""


class PolicyResults(JsonModel):
    """A log under one policy."""

    policy: str
    steps: tuple[PolicyStep, ...]
    retrainings: tuple[Retraining, ...]
    """Without the first training, which all policies share."""
    missed: tuple[MissedRetraining, ...]
    lost: Estimate
    """Mean over the steps of its metric relative to that of a fresh model, minus 1; steps resampled."""
    wall_seconds: float

    @property
    def training_cpu_seconds(self) -> float:
        """Of its retrainings."""
        return sum(retraining.cpu_seconds for retraining in self.retrainings)

    @property
    def false_retrainings(self) -> int:
        """How many retrainings were not worth it."""
        return sum(retraining.is_false for retraining in self.retrainings)

    def count(self, verdict: Verdict) -> int:
        """How often it came to a verdict."""
        return sum(step.verdict is verdict for step in self.steps)


class BacktestResults(JsonModel):
    """One log under several policies."""

    mapping: str
    kind: LogKind
    snapshot_id: str
    config: BacktestConfig
    metric: str
    """`normalized_entropy`, or `rmse` for ratings; lower is better."""
    steps: tuple[Step, ...]
    policies: tuple[PolicyResults, ...]
    fresh_cpu_seconds: float
    """Of training before each step but the first: what the freshest models cost."""
    notes: tuple[str, ...]
    """What cannot be measured on this log, and what was left out."""
    wall_seconds: float

    def policy(self, name: str) -> PolicyResults:
        """The log under a policy.

        Raises:
            KeyError: it was not replayed.
        """
        for policy in self.policies:
            if policy.policy == name:
                return policy
        raise KeyError(name)
