"""Backtest: a log is lived through under several policies of retraining, and what each has lost and cost is compared.

    OUT/
      results.json    backtest_results.BacktestResults
      log/            laboratory.replayed_log
      models/         laboratory.models; kept, so that a second run trains nothing that it has trained before
      policies/       laboratory.replay

Prequential: a model is scored only on rows of after the moment that it was trained as of (Gama et al. 2013).
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from evergreen.contracts.errors import InputError, TrainingError
from evergreen.contracts.mapping import LogKind, Mapping
from evergreen.laboratory.backtest_results import (
    RESULTS_FILE,
    BacktestConfig,
    BacktestResults,
    PolicyResults,
    PolicyStep,
    Step,
)
from evergreen.laboratory.models import Models, TrainedModel
from evergreen.laboratory.policies import Policy
from evergreen.laboratory.replay import Replay
from evergreen.laboratory.replayed_log import ReplayedLog, prepare_log
from evergreen.laboratory.staleness import METRICS, ScoreMatrix, find_missed, judge_retrainings, lost_to_staleness

_DAY = timedelta(days=1)

_NOTES = (
    "People saw what the log's own recommender showed them; what a policy's model would have made of it is not known.",
    "Retraining starts from scratch, takes no time, and goes out without a gate or a canary.",
)
_NOTES_OF_KIND = {
    LogKind.IMPRESSIONS: (),
    LogKind.INTERACTIONS: (
        "What people were shown is not known: negatives are drawn from the items of the moment, and normalized entropy "
        "tells how well clicks are told from these.",
        "For that reason click rates, positions, label drift and a release that is worse by its click rate cannot be "
        "measured.",
    ),
    LogKind.RATINGS: ("There are no clicks: quality is not monitored, and `ours` goes by drift, new items and age.",),
}


def backtest(
    mapping: Mapping,
    data: str,
    out: Path,
    policies: Sequence[Policy],
    *,
    config: BacktestConfig | None = None,
    on_progress: Callable[[str], None] = lambda line: None,
) -> BacktestResults:
    """Live through a log under each policy, and write the results.

    Args:
        mapping: of the log.
        data: path or fsspec URL of the log.
        out: folder to write; that of an earlier backtest is gone on from.
        policies: with different names.
        config: how.
        on_progress: told how it is getting on.

    Raises:
        InputError: the log cannot be read, or is too short; or `out` holds something else.
        TrainingError: there is too little before some step to train a model on.
    """
    config, out, began = config or BacktestConfig(), Path(out), time.perf_counter()
    _check(config, policies, out)
    log = prepare_log(mapping, data, out / "log", seed=config.seed)
    moments = moments_of(log, config)
    manifest = log.snapshot.manifest
    on_progress(
        f"{manifest.rows:,} events from {manifest.first_event:%Y-%m-%d} on; {len(moments) - 1} steps of "
        f"{config.step.days} d from {moments[0]:%Y-%m-%d} to {moments[-1]:%Y-%m-%d}"
    )
    with tempfile.TemporaryDirectory(prefix=".training-sets-", dir=out) as scratch:
        models = Models(
            log,
            config,
            out / "models",
            first=_midnight(manifest.first_event),
            scratch=Path(scratch),
            on_progress=on_progress,
        )
        matrix = ScoreMatrix(log, moments)
        fresh = [_train(models, moment, config) for moment in moments[:-1]]
        steps = [_step(matrix, moments, fresh, number) for number in range(len(matrix))]
        shutil.rmtree(out / "policies", ignore_errors=True)
        results = BacktestResults(
            mapping=mapping.name,
            kind=log.snapshot.kind,
            snapshot_id=log.snapshot.id,
            config=config,
            metric=METRICS[log.snapshot.kind][0],
            steps=tuple(steps),
            policies=tuple(
                _replay(policy, log, models, matrix, moments, fresh, steps, config, out, on_progress)
                for policy in policies
            ),
            fresh_cpu_seconds=sum(model.cpu_seconds for model in fresh[1:]),
            notes=(*_NOTES, *_NOTES_OF_KIND[log.snapshot.kind], *_left_out(log, moments)),
            wall_seconds=time.perf_counter() - began,
        )
    results.write(out / RESULTS_FILE)
    return results


def moments_of(log: ReplayedLog, config: BacktestConfig) -> list[datetime]:
    """Moments of decision and the end of the last step: midnights in UTC, as many whole steps as the log has.

    Raises:
        InputError: there are fewer than two steps.
    """
    manifest = log.snapshot.manifest
    first = _midnight(manifest.first_event) + config.warm_up
    number = (manifest.as_of - first) // config.step
    if number < 2:
        raise InputError(
            f"the log ends at {manifest.as_of}: {max(number, 0)} steps of {config.step.days} days after "
            f"{config.warm_up.days} days to start with, at least 2 are needed: give a longer log, or smaller "
            "--start-days and --step"
        )
    return [first + n * config.step for n in range(number + 1)]


def _check(config: BacktestConfig, policies: Sequence[Policy], out: Path) -> None:
    for name, value in (("step", config.step), ("start-days", config.warm_up)):
        if value % _DAY:
            raise InputError(f"{name}={value}: must be whole days, for files of a log are by date")
    if config.validation + config.test >= min(config.window, config.warm_up):
        raise InputError(
            f"validation and test take {config.validation + config.test}, the first window has "
            f"{min(config.window, config.warm_up)}: nothing is left to learn from"
        )
    names = [policy.name for policy in policies]
    if not names or len(set(names)) < len(names):
        raise InputError(f"policies {', '.join(names) or 'none'}: name at least one, each once")
    if out.exists() and any(out.iterdir()) and not ((out / "log").is_dir() or (out / RESULTS_FILE).exists()):
        raise InputError(f"{out}: holds something else; name a new or empty folder, or that of an earlier backtest")
    out.mkdir(parents=True, exist_ok=True)


def _train(models: Models, moment: datetime, config: BacktestConfig) -> TrainedModel:
    try:
        return models.at(moment)
    except TrainingError as error:
        raise TrainingError(
            f"as of {moment:%Y-%m-%d}: {error}; a later --start-days, longer --window-days or a longer --step give it "
            f"more than the {config.window.days} days before"
        ) from error


def _step(matrix: ScoreMatrix, moments: Sequence[datetime], fresh: Sequence[TrainedModel], number: int) -> Step:
    labels = matrix.labels(number)
    return Step(
        start=moments[number],
        end=moments[number + 1],
        rows=len(labels),
        positives=int((labels > 0).sum()),
        fresh=matrix.value(fresh[number], number),
    )


def _replay(
    policy: Policy,
    log: ReplayedLog,
    models: Models,
    matrix: ScoreMatrix,
    moments: Sequence[datetime],
    fresh: Sequence[TrainedModel],
    steps: Sequence[Step],
    config: BacktestConfig,
    out: Path,
    on_progress: Callable[[str], None],
) -> PolicyResults:
    began = time.perf_counter()
    replayed = Replay(log, models, policy, out / "policies" / policy.name, on_progress=on_progress).run(moments)
    values = [matrix.value(step.model, number) for number, step in enumerate(replayed)]
    retrainings = judge_retrainings(replayed, matrix, config)
    missed = find_missed(replayed, fresh, matrix, moments, config)
    on_progress(f"{policy.name}: {len(retrainings)} retrainings in {len(steps)} steps")
    return PolicyResults(
        policy=policy.name,
        steps=tuple(
            PolicyStep(
                model_version=step.model.version,
                trained_as_of=step.model.record.as_of,
                value=value,
                auc=matrix.auc(step.model, number),
                verdict=step.choice.verdict if step.choice else None,
                reason=step.choice.reason if step.choice else "The first model.",
                raised=step.raised,
                failed=step.failed,
            )
            for number, (step, value) in enumerate(zip(replayed, values, strict=True))
        ),
        retrainings=tuple(retrainings),
        missed=tuple(missed),
        lost=lost_to_staleness(values, [step.fresh for step in steps], config),
        wall_seconds=time.perf_counter() - began,
    )


def _left_out(log: ReplayedLog, moments: Sequence[datetime]) -> list[str]:
    notes = [f"{count:,} events left out: {reason}" for reason, count in log.left_out.items()]
    if log.snapshot.as_of > moments[-1]:
        notes.append(f"the log after {moments[-1]:%Y-%m-%d} is not a whole step, and was left out")
    return notes


def _midnight(moment: datetime) -> datetime:
    """Of its date in UTC."""
    return moment.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
