"""The evaluation: every model on the same test rows, with intervals, and which of them should serve.

evaluation/
  metrics.json   EvaluationResult
  curves.json    Curves: ROC points, calibration bins, confusion matrix of each model
  report.html    the same for people: one file, no script, nothing from the network
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from pydantic import AwareDatetime, Field

from evergreen.contracts.artifact import JsonModel
from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.mapping import LogKind

BASE_RATE = "base_rate"
"""Name of the baseline that knows only the mean label of the training rows (for rankings: a random order)."""


class Estimate(JsonModel):
    """A metric with its 95 % bootstrap interval; all null, with a reason, where it is undefined."""

    value: float | None
    low: float | None = None
    high: float | None = None
    reason: str | None = None


class Verdict(StrEnum):
    """What a paired interval says about a model against another."""

    BETTER = "better"
    TIED = "tied"
    WORSE = "worse"


class Difference(JsonModel):
    """The primary metric of a model minus that of another, paired on the same resampled users."""

    against: str
    estimate: Estimate
    verdict: Verdict
    """`better` and `worse` only when the whole interval lies on one side of 0; which side depends on the metric."""


class Latency(JsonModel):
    """Milliseconds that one request's candidates take to score, on one thread."""

    rows: int
    repetitions: int
    p50_ms: float
    p99_ms: float
    within_budget: bool


class SliceEstimate(JsonModel):
    """The primary metric on a part of the test rows, for every model."""

    dimension: str
    """"user", "item", or "day", "week" or "month": the shortest in which most parts can be measured."""
    name: str
    rows: int
    """Rows, or queries for a ranking."""
    positives: int
    """Clicks, or relevant items for a ranking; 0 for ratings."""
    models: dict[str, Estimate]
    skipped: str | None = None
    """Why there is no metric, e.g. too few rows; then `models` is empty."""


class ModelEvaluation(JsonModel):
    """One model, or the base rate, on the test rows."""

    name: str
    version: str | None = None
    """The package's version; null for what is no package: the base rate, and recent popularity in rankings."""
    metrics: dict[str, Estimate]
    latency: Latency | None = None
    against_baseline: Difference | None = None
    against_champion: Difference | None = None
    beats_baseline: bool | None = None
    """Better than the baseline outside the interval; null for the baseline itself."""


class RankingQueries(JsonModel):
    """The queries of a whole-catalogue ranking, and what became of those that are not evaluated."""

    unit: str
    """What one query is: "request" (the log has request ids) or "user and day"."""
    found: int
    """Queries in the test period, of rows with a user and an item."""
    without_new_items: int
    """Left out: every item was known to the user already, so there is nothing that could be recommended."""
    unreachable: int
    """Left out: no relevant item was in the catalogue at the query's time."""
    sampled_out: int
    """Left out by the seed: more than `max_queries` were left."""
    evaluated: int
    relevant_items: int
    """Relevant items of the evaluated queries that were in the catalogue."""
    unreachable_items: int
    """Relevant items of the evaluated queries that were not in it yet; no model could have shown them."""
    mean_candidates: float
    max_candidates: int


class EvaluationResult(JsonModel):
    """metrics.json: what was evaluated, on which rows, and the verdict."""

    snapshot_id: str
    mapping: str
    kind: LogKind
    as_of: AwareDatetime
    test_start: AwareDatetime
    test_end: AwareDatetime
    test_rows: int
    test_positives: int
    primary_metric: str
    lower_is_better: bool
    baseline: str
    resampled: str
    """What the bootstrap draws: "users", or where there are too few "requests", "rows" or "queries"."""
    num_clusters: int
    num_replicates: int
    latency_budget_ms: float
    champion: str
    champion_version: str
    reason: str
    any_beats_baseline: bool
    models: tuple[ModelEvaluation, ...]
    """The base rate first, then the packages in the order of their complexity."""
    slices: tuple[SliceEstimate, ...]
    queries: RankingQueries | None = None


class CurveBin(JsonModel):
    """Rows of similar predicted probability, and how often they were positive."""

    rows: int
    predicted: float
    actual: float


class Curve(JsonModel):
    """ROC curve, reliability and confusion of one model on the test rows."""

    false_positive_rate: tuple[float, ...]
    true_positive_rate: tuple[float, ...]
    thresholds: tuple[float, ...]
    calibration: tuple[CurveBin, ...]
    confusion_threshold: float
    """The mean label of the training rows: known before the test rows were."""
    confusion: tuple[tuple[int, int], tuple[int, int]]
    """((true negatives, false positives), (false negatives, true positives))."""


class Curves(JsonModel):
    """curves.json. Empty for ratings, and where the test rows have one class only."""

    models: dict[str, Curve] = Field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """An evaluation on disk."""

    path: Path
    result: EvaluationResult

    METRICS = "metrics.json"
    CURVES = "curves.json"
    REPORT = "report.html"

    @classmethod
    def load(cls, path: Path) -> Evaluation:
        """Open an evaluation.

        Raises:
            ArtifactError: not an evaluation, or written by another version of Evergreen.
        """
        path = Path(path)
        return cls(path, EvaluationResult.read(path / cls.METRICS))

    @property
    def champion(self) -> str:
        """Name of the model that should serve."""
        return self.result.champion

    @property
    def reason(self) -> str:
        """Why it should, in a sentence or two."""
        return self.result.reason

    @property
    def report(self) -> Path:
        """Path of the HTML report."""
        return self.path / self.REPORT

    def curves(self) -> Curves:
        """Curves of all models."""
        return Curves.read(self.path / self.CURVES)

    def model(self, name: str) -> ModelEvaluation:
        """The evaluation of one model.

        Raises:
            ArtifactError: no model of that name was evaluated.
        """
        for model in self.result.models:
            if model.name == name:
                return model
        raise ArtifactError(f"{self.path}: {name!r} was not evaluated, only {[m.name for m in self.result.models]}")
