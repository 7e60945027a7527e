"""summary.json: one file that tells a whole training run, gathered from what its artifacts say of themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import AwareDatetime

from evergreen.contracts.artifact import JsonModel
from evergreen.contracts.evaluation import Evaluation, ModelEvaluation, RankingQueries
from evergreen.contracts.mapping import LogKind
from evergreen.contracts.snapshot import Snapshot
from evergreen.contracts.training_set import SplitInfo, TrainingSet


class SnapshotSummary(JsonModel):
    """The log: what was read, and what was not."""

    id: str
    mapping: str
    kind: LogKind
    as_of: AwareDatetime
    rows: int
    users: int
    items: int
    positives: int
    first_event: AwareDatetime
    last_event: AwareDatetime
    quarantined: dict[str, int]
    left_out: dict[str, int]


class ChampionSummary(JsonModel):
    """Which model should serve, and why."""

    model: str
    version: str
    reason: str
    beats_baseline: bool | None
    """Outside the interval; null when the champion is the baseline itself."""


class StepUsage(JsonModel):
    """What a step took. Wall time counts from the start of its process, imports included; work is its one call."""

    step: str
    wall_seconds: float
    compute_seconds: float
    cpu_seconds: float
    peak_memory_mb: float


class RunSummary(JsonModel):
    """The whole run."""

    snapshot: SnapshotSummary
    splits: dict[str, SplitInfo]
    embargo_seconds: float
    left_out_of_splits: dict[str, int]
    features: int
    dropped_features: dict[str, str]
    primary_metric: str
    latency_budget_ms: float
    test_rows: int
    ranking_queries: RankingQueries | None
    models: dict[str, ModelEvaluation]
    champion: ChampionSummary
    steps: tuple[StepUsage, ...]


def summarize(
    snapshot: Snapshot, training_set: TrainingSet, evaluation: Evaluation, usages: Sequence[dict[str, Any]]
) -> RunSummary:
    """Gather a run's summary from its artifacts and from what each step measured of itself."""
    log, rows, result = snapshot.manifest, training_set.manifest, evaluation.result
    return RunSummary(
        snapshot=SnapshotSummary(
            id=snapshot.id,
            mapping=log.mapping.name,
            kind=log.mapping.kind,
            as_of=log.as_of,
            rows=log.rows,
            users=log.num_users,
            items=log.num_items,
            positives=log.num_positives,
            first_event=log.first_event,
            last_event=log.last_event,
            quarantined=log.quarantined,
            left_out=log.left_out,
        ),
        splits=rows.splits,
        embargo_seconds=rows.embargo_seconds,
        left_out_of_splits=rows.left_out,
        features=len(rows.features),
        dropped_features=rows.dropped_features,
        primary_metric=result.primary_metric,
        latency_budget_ms=result.latency_budget_ms,
        test_rows=result.test_rows,
        ranking_queries=result.queries,
        models={model.name: model for model in result.models},
        champion=ChampionSummary(
            model=result.champion,
            version=result.champion_version,
            reason=result.reason,
            beats_baseline=evaluation.model(result.champion).beats_baseline,
        ),
        steps=tuple(StepUsage.model_validate(usage) for usage in usages),
    )
