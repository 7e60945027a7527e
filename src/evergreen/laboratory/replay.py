"""A log lived through under one policy: what its models would have said is reported, judged and acted upon.

    policies/<name>/
      state/         contracts.loop_state, as the monitoring pipeline leaves it
      impressions/   the log's rows as the policy's models would have scored them

Monitors, decision and release store are those of the pipeline. What differs from a loop in service: people saw what the
log's own recommender showed them, whatever the policy's model says; a retraining takes no time, starts from scratch,
and goes out without a gate, so that policies differ in nothing but when they retrain.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from evergreen.contracts.decision import TriggerName, Verdict, Window
from evergreen.contracts.errors import TrainingError
from evergreen.contracts.impressions import impression_schema, impression_table
from evergreen.contracts.loop_state import LoopState, name_of, put
from evergreen.contracts.monitoring_report import MonitoringReport
from evergreen.laboratory.models import Models, TrainedModel, score
from evergreen.laboratory.policies import Choice, Policy
from evergreen.laboratory.replayed_log import ReplayedLog, request_ids
from evergreen.metrics.statistic import FloatArray
from evergreen.models.package import ModelPackage
from evergreen.monitoring.outcomes import join_outcomes
from evergreen.monitoring.watch import loop_history, watch
from evergreen.release.store import ReleaseStore


@dataclass(frozen=True)
class ReplayedStep:
    """A step of the log under a policy."""

    model: TrainedModel
    """That served in it."""
    choice: Choice | None
    """At its start; None: the first."""
    retrained: bool = False
    failed: bool = False
    """A training was asked for, and could not be done."""

    @property
    def raised(self) -> tuple[TriggerName, ...]:
        """Triggers of the decision, fired or held back."""
        return self.choice.decision.record().raised if self.choice and self.choice.decision else ()


class Replay:
    """One policy on a log."""

    def __init__(
        self, log: ReplayedLog, models: Models, policy: Policy, path: Path, *, on_progress: Callable[[str], None]
    ) -> None:
        """Begin anew: what an earlier replay has left is removed.

        Args:
            log: to live through.
            models: of it.
            policy: that decides.
            path: its folder.
            on_progress: told of each verdict but keep.
        """
        shutil.rmtree(path, ignore_errors=True)
        self._log, self._models, self._policy, self._tell = log, models, policy, on_progress
        self._state = LoopState(path / "state")
        self._store = ReleaseStore(self._state.releases)
        self._impressions = path / "impressions"
        self._served: dict[str, TrainedModel] = {}

    def run(self, moments: Sequence[datetime]) -> list[ReplayedStep]:
        """Live through the steps between moments; the first model is trained at the first of them.

        Args:
            moments: of decision, ascending, at midnight UTC.

        Returns:
            One entry for each step.

        Raises:
            TrainingError: there is too little to train the first model on.
        """
        model = self._models.at(moments[0])
        self._release(model, moments[0], "the first")
        steps = [ReplayedStep(model, None)]
        for start, as_of in itertools.pairwise(moments[:-1]):
            report = self._report(model, start, as_of) if self._policy.reads_reports else None
            choice = self._policy.decide(report, loop_history(self._state), as_of=as_of)
            if choice.decision is not None:
                put(self._state.decision(as_of), choice.decision)
            step = self._act(model, choice, as_of)
            if step.choice is not None and choice.verdict is not Verdict.KEEP:
                self._tell(f"{self._policy.name}: {as_of:%Y-%m-%d} {choice.verdict}: {step.choice.reason}")
            model = step.model
            steps.append(step)
        return steps

    def _act(self, model: TrainedModel, choice: Choice, as_of: datetime) -> ReplayedStep:
        if choice.verdict is Verdict.ROLLBACK:
            release = self._store.roll_back(as_of=as_of, reason=choice.reason)
            return ReplayedStep(self._served[release.version], choice)
        if choice.verdict is not Verdict.RETRAIN:
            return ReplayedStep(model, choice)
        run_id = name_of(as_of)
        broken: Sequence[Window] = choice.decision.broken_windows if choice.decision else ()
        self._state.start_run(run_id, as_of)
        try:
            fresh = self._models.at(as_of, broken)
        except TrainingError as error:
            self._state.finish_run(run_id, as_of)
            failed = replace(choice, reason=f"{choice.reason} The training failed: {error}")
            return ReplayedStep(model, failed, failed=True)
        self._release(fresh, as_of, choice.reason)
        self._state.finish_run(run_id, as_of)
        return ReplayedStep(fresh, choice, retrained=True)

    def _release(self, model: TrainedModel, as_of: datetime, reason: str) -> None:
        if self._policy.reads_reports:
            reference = self._models.reference(model)
            for file in (reference.reference(model.version), reference.reference_rows(model.version)):
                target = self._state.path / file.relative_to(reference.path)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
        self._store.release(model.package.path, model.version, as_of=as_of, reason=reason)
        self._served[model.version] = model

    def _report(self, model: TrainedModel, start: datetime, as_of: datetime) -> MonitoringReport:
        """What the monitors find in the step that ends at `as_of`."""
        rows = self._log.read(start, as_of)
        served = score(model.package, rows).served
        _write_impressions(rows, request_ids(rows, self._log.snapshot.kind), served, model.package, self._impressions)
        window = self._log.attribution
        # Dates with labels that were open at the last join are joined again, and all of their rows are needed.
        open_since = _midnight(start - window)
        join_outcomes(
            str(self._impressions),
            str(self._log.clicks),
            self._state.outcomes,
            window=window,
            as_of=as_of,
            start=start,
            served_since=open_since - window,
            mapping=self._log.snapshot.mapping,
        )
        return watch(
            self._state,
            str(self._impressions),
            model.package,
            as_of=as_of,
            window=as_of - start,
            page=False,
            served_since=start,
        )


def _write_impressions(
    rows: pa.Table, requests: pa.ChunkedArray, scores: FloatArray, package: ModelPackage, path: Path
) -> None:
    """The impression log of rows that a model has scored, a file a date."""
    features = package.info.features
    num_rows = rows.num_rows
    columns = {
        "request_id": requests,
        "event_timestamp": rows["event_timestamp"],
        "served_at": rows["event_timestamp"],
        "user_id": rows["user_id"],
        "known_user": pc.is_valid(rows["user_id"]),
        "model_version": pa.array([package.version] * num_rows),
        "degraded": pa.array([False] * num_rows),
        "sampling_rate": pa.array([1.0] * num_rows),
        "item_id": rows["item_id"],
        "category": rows["category"],
        "position": rows["position"],
        "score": pa.array(scores),
    }
    named = {f.name: rows[f.name].combine_chunks() for f in features}
    table = impression_table(
        {name: c.combine_chunks() if isinstance(c, pa.ChunkedArray) else c for name, c in columns.items()},
        named,
        impression_schema(features),
    )
    dates = pc.strftime(table["event_timestamp"], format="%Y-%m-%d")
    for date in pc.unique(dates).to_pylist():
        folder = path / f"date={date}"
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.filter(pc.equal(dates, date)), folder / "impressions.parquet", compression="zstd")


def _midnight(moment: datetime) -> datetime:
    """Of its date in UTC."""
    return moment.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
