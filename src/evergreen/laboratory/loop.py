"""A loop in virtual time: people ask, the evening measures and decides, and the morning may have another model.

It does in one process what the pipelines do in steps, with the same functions in the same order, for days that take
seconds. An evening: the day's log is ingested, filtered and made features of, what serves gets them, clicks are joined
to what was shown, the window is watched, the policy decides, and what it decides is done.

    arm/
      data/events/     the click logs of the newest days, as many as the log before the world had: features are made of
                       them, or counts over 30 days would grow for a month, and be called drift
      world/           simulator.days: what happened, and the truth
      impressions/     what was served
      state/           contracts.loop_state
      work/            of the last evening
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from evergreen.contracts.artifact import JsonModel
from evergreen.contracts.decision import DecisionConfig, RetrainDecision, Verdict
from evergreen.contracts.feature_tables import FeatureTables
from evergreen.contracts.gate import GateReport
from evergreen.contracts.impressions import read_impressions
from evergreen.contracts.loop_state import LoopState, name_of, put
from evergreen.contracts.mapping import Mapping
from evergreen.contracts.monitoring_report import MonitoringReport
from evergreen.contracts.release import CanaryReport
from evergreen.contracts.snapshot import Snapshot
from evergreen.contracts.training_set import FeatureOrigin, TrainingSet
from evergreen.evaluation.config import GateConfig
from evergreen.evaluation.gate import gate_challenger
from evergreen.features.store import FeatureStore
from evergreen.features.tables import build_feature_tables
from evergreen.fraud.filter import filter_events, without_suspicious
from evergreen.fraud.share import suspicious_share
from evergreen.ingest.log import ingest_log
from evergreen.laboratory.policies import Choice, Policy
from evergreen.laboratory.results import LoopDay, Retraining
from evergreen.laboratory.shop import ShopMaker, client
from evergreen.models.package import ModelPackage
from evergreen.monitoring.decision import changed_at
from evergreen.monitoring.outcomes import join_outcomes
from evergreen.monitoring.watch import keep_reference, loop_history, watch
from evergreen.release.canary import CanaryConfig, run_canary
from evergreen.release.replay import logged_requests
from evergreen.release.store import ReleaseStore
from evergreen.simulator.days import DaySummary, run_day
from evergreen.simulator.log import simulate_log
from evergreen.simulator.scenarios import break_features, lost_requests
from evergreen.simulator.visits import VisitPlan, Visits
from evergreen.training.dataset import build_training_set
from evergreen.training.retrain import retrain
from evergreen.training.trainer import TrainingConfig, train_model

_FEATURE_TABLES = "feature_tables"
_LATENCY_BUDGET_MS = 1000.0
"""A laboratory lives several worlds on one machine at a time: how fast a model is, is not seen there."""


class LoopConfig(JsonModel):
    """A world, a model for it, and how the loop learns."""

    plan: VisitPlan
    num_days: int
    training: TrainingConfig = TrainingConfig(model="factorization_machine", export_program=False)
    """Of every model of the loop."""
    training_days: int = 7
    """How many days are learned from, unless the world has changed in between. The log has more, so that the first of
    them has a history, too: its rows would have other features than those that are served."""
    window: timedelta = timedelta(days=1)
    """That is watched every evening; features are materialized as often, and models are trained for that."""
    test_span: timedelta = timedelta(hours=4)
    """The newest rows: the gate's, and as much again before them is for validation."""
    filter_bots: bool = True
    pages: bool = False
    """Whether Evidently's pages are written, which takes some seconds an evening."""
    canary_requests: int = 0
    """Newest logged requests that a challenger is asked beside what serves; 0: there is no canary."""
    seed: int = 0

    @property
    def decision(self) -> DecisionConfig:
        """Of the policy `ours`."""
        return DecisionConfig(training_window=timedelta(days=self.training_days))

    @property
    def mapping(self) -> Mapping:
        """Of the simulated log, with splits of the newest hours."""
        shipped = Mapping.load("simulated")
        spans = {"validation_span": self.test_span, "test_span": self.test_span}
        return shipped.model_copy(update={"split": shipped.split.model_copy(update=spans)})


@dataclass(frozen=True)
class Start:
    """What every policy begins with: the log, and the first model with its features."""

    path: Path

    @property
    def events(self) -> Path:
        """The click log."""
        return self.path / "log" / "events"

    @property
    def work(self) -> Path:
        """Feature tables, training set, package."""
        return self.path / "work"


def prepare(config: LoopConfig, out: Path) -> Start:
    """Make the log of a world, and train the first model on it."""
    start = Start(Path(out))
    simulate_log(config.plan.log, start.path / "log", scenario=config.plan.scenario)
    work, as_of = start.work, config.plan.date(0)
    snapshot = ingest_log(config.mapping, str(start.path / "log"), work / "snapshot", as_of=as_of)
    tables = build_feature_tables(snapshot, work / _FEATURE_TABLES)
    store = FeatureStore.create(work / "feature_store", tables)
    training_set = build_training_set(
        snapshot,
        tables,
        store,
        work / "training_set",
        seed=config.seed,
        start=as_of - timedelta(days=config.training_days),
        batch=config.window,
    )
    train_model(training_set, work / "model", config=config.training)
    return start


class Arm:
    """One world under one policy."""

    def __init__(self, config: LoopConfig, start: Start, policy: Policy, out: Path, shop: ShopMaker) -> None:
        """Release the first model.

        Args:
            config: the world and the loop.
            start: what `prepare` has made.
            policy: decides.
            out: folder of this arm; what it holds is removed.
            shop: makes what people ask.
        """
        self.config, self.start, self.policy, self.path = config, start, policy, Path(out)
        shutil.rmtree(self.path, ignore_errors=True)
        self.events.mkdir(parents=True)
        self.state = LoopState(self.path / "state")
        for file in sorted(start.events.iterdir()):
            os.link(file, self.events / file.name)
        self._visits = Visits(config.plan, num_days=config.num_days)
        self._shop = shop(self.state, self.impressions)
        package = ModelPackage.load(start.work / "model")
        self._features(config.plan.date(0), day=0)
        keep_reference(self.state, TrainingSet.load(start.work / "training_set"), package, seed=config.seed)
        self._releases = ReleaseStore(self.state.releases)
        self._releases.release(package.path, package.version, as_of=config.plan.date(0), reason="the first model")

    @property
    def events(self) -> Path:
        """The click log of the days before and of the days that were lived."""
        return self.path / "data" / "events"

    @property
    def impressions(self) -> Path:
        """The log of what was served."""
        return self.path / "impressions"

    @property
    def world(self) -> Path:
        """Of `simulator.days`."""
        return self.path / "world"

    def run(self) -> Iterator[LoopDay]:
        """Live day by day; a day is given when its evening is over."""
        for day in range(self.config.num_days):
            before = set(self.impressions.rglob("*.parquet"))
            with self._shop.open() as recommend:
                lived = run_day(self._visits, day, recommend, self.world)
            self._lose_impressions(day, set(self.impressions.rglob("*.parquet")) - before)
            yield self._evening(lived)

    def _lose_impressions(self, day: int, written: set[Path]) -> None:
        """Take out of the day's impression log what the scenario says is not logged: the server knows of no outage."""
        scenario = self.config.plan.scenario
        if scenario.lost_impressions and scenario.is_on(day):
            for file in written:
                rows = pq.ParquetFile(file).read()
                pq.write_table(rows.filter(pa.array(~lost_requests(scenario, day, rows["request_id"]))), file)

    def _evening(self, lived: DaySummary) -> LoopDay:
        as_of = self.config.plan.date(lived.day + 1)
        file = f"{lived.date}.parquet"
        os.link(self.world / "events" / file, self.events / file)
        for old in sorted(self.events.iterdir())[: -self.config.plan.log.num_days]:
            old.unlink()
        suspicious = self._features(as_of, day=lived.day + 1)
        report = None
        if self.policy.reads_reports:
            mapping = self.config.mapping
            join_outcomes(
                str(self.impressions),
                str(self.world / "clicks"),
                self.state.outcomes,
                window=mapping.split.attribution_window,
                as_of=as_of,
                start=as_of - 2 * self.config.window,
                mapping=mapping,
            )
            serving = ModelPackage.load(self._releases.current)
            report = watch(
                self.state,
                str(self.impressions),
                serving,
                as_of=as_of,
                window=self.config.window,
                page=self.config.pages,
                suspicious_share=suspicious,
            )
        choice = self.policy.decide(report, loop_history(self.state), as_of=as_of)
        if choice.decision is not None:
            put(self.state.decision(as_of), choice.decision)
        retraining = None
        if choice.verdict is Verdict.RETRAIN:
            retraining = self._retrain(choice, as_of)
        elif choice.verdict is Verdict.ROLLBACK:
            self._releases.roll_back(as_of=as_of, reason=choice.reason)
        return self._day(lived, as_of, report, choice, retraining)

    def _features(self, as_of: datetime, *, day: int) -> float | None:
        """Bring features up to date, offline and, for the day to come, online; the share of the last window's events
        that look like bots'.
        """
        work, share = self.path / "work", None
        snapshot = ingest_log(self.config.mapping, str(self.path / "data"), work / "snapshot", as_of=as_of)
        if self.config.filter_bots:
            labels = filter_events(snapshot, work / "suspicious", threads=1)
            share = suspicious_share(snapshot, labels, start=as_of - self.config.window, end=as_of)
            snapshot = without_suspicious(snapshot, labels, work / "filtered")
        tables = build_feature_tables(snapshot, work / _FEATURE_TABLES, threads=1)  # arms live side by side
        tables = self._as_the_pipeline_writes_them(tables, day)
        if day == 0:
            store = FeatureStore.create(self.state.feature_store, tables)
        else:
            store = FeatureStore.open(self.state.feature_store).replace_tables(tables)
        store.materialize(as_of)
        return share

    def _as_the_pipeline_writes_them(self, tables: FeatureTables, day: int) -> FeatureTables:
        """The tables that go online for a day: other ones than are learned from, where the scenario breaks them."""
        scenario = self.config.plan.scenario
        if not (scenario.broken_features and scenario.is_on(day)):
            return tables
        broken = tables.path.with_name("broken_tables")
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(tables.path, broken)
        for file in broken.glob("*.parquet"):
            pq.write_table(break_features(scenario, pq.read_table(file), day), file)
        return FeatureTables.load(broken)

    def _retrain(self, choice: Choice, as_of: datetime) -> Retraining:
        state, config, work = self.state, self.config, self.path / "work"
        run = state.start_run(name_of(as_of), as_of)
        incumbent = ModelPackage.load(self._releases.current.resolve())
        started = time.process_time()
        training_set = self._training_set(choice.decision, as_of)
        trained = retrain(
            training_set,
            work / "model",
            config=config.training,
            # A schedule trains anew and releases what comes of it, which is what it is compared for.
            incumbent=incumbent if choice.decision is not None else None,
            changed_at=changed_at(choice.decision) if choice.decision is not None else None,
        )
        cpu_seconds = time.process_time() - started
        gate = canary = None
        passed = True
        if choice.decision is not None:
            gate = gate_challenger(
                training_set,
                trained.package,
                incumbent,
                config=GateConfig(latency_budget_ms=_LATENCY_BUDGET_MS, seed=config.seed),
                served=read_impressions(str(self.impressions)),
            )
            put(state.gate(as_of), gate)
            passed = gate.passed
        if passed and config.canary_requests:
            canary = self._canary(trained.package, incumbent, gate)
            put(state.canary(as_of), canary)
            passed = canary.passed
        if passed:
            keep_reference(state, training_set, trained.package, seed=config.seed)
            self._releases.release(
                trained.package.path, trained.package.version, as_of=as_of, reason=choice.reason, canary=canary
            )
        state.finish_run(run.run_id, as_of)
        return Retraining(
            as_of=as_of,
            model_version=trained.package.version,
            train_rows=trained.package.info.train_rows,
            way=trained.way,
            cpu_seconds=cpu_seconds,
            gate=gate,
            canary=canary,
            released=passed,
            package=self._link(state.package(trained.package.version)) if passed else None,
        )

    def _training_set(self, decision: RetrainDecision | None, as_of: datetime) -> TrainingSet:
        work = self.path / "work"
        tables = FeatureTables.load(work / _FEATURE_TABLES)
        snapshot = Snapshot.load(work / ("filtered" if self.config.filter_bots else "snapshot"))
        repository = work / "repository"
        shutil.rmtree(repository, ignore_errors=True)
        broken = decision.broken_windows if decision is not None else ()
        return build_training_set(
            snapshot,
            tables,
            FeatureStore.create(repository, tables),
            work / "training_set",
            seed=self.config.seed,
            start=as_of - timedelta(days=self.config.training_days),
            leave_out=[(window.start, window.end) for window in broken],
            batch=self.config.window,
            changed_at=changed_at(decision) if decision is not None else None,
        )

    def _canary(self, challenger: ModelPackage, incumbent: ModelPackage, gate: GateReport | None) -> CanaryReport:
        context = [feature.name for feature in challenger.info.features if feature.origin is FeatureOrigin.CONTEXT]
        asked = logged_requests(str(self.impressions), context=context, limit=self.config.canary_requests)
        with ExitStack() as stack:
            ours, theirs = (
                stack.enter_context(client(package.path, self.state.feature_store))
                for package in (challenger, incumbent)
            )
            return run_canary(
                ours,
                theirs,
                asked,
                expected_ratio=(gate.mean_prediction_ratio if gate is not None else None) or 1.0,
                config=CanaryConfig(latency_budget_ms=_LATENCY_BUDGET_MS),
            )

    def _day(
        self,
        lived: DaySummary,
        as_of: datetime,
        report: MonitoringReport | None,
        choice: Choice,
        retraining: Retraining | None,
    ) -> LoopDay:
        quality = report.quality.model(report.model_version) if report is not None and report.quality else None
        return LoopDay(
            day=lived.day,
            date=lived.date,
            model_versions=lived.model_versions,
            requests=lived.requests,
            click_rate=lived.click_rate,
            expected_rate=lived.expected_rate,
            oracle_rate=lived.oracle_rate,
            random_rate=lived.random_rate,
            failures=lived.failures,
            verdict=choice.verdict,
            reason=choice.reason,
            raised=tuple(choice.decision.record().raised) if choice.decision is not None else (),
            drift={
                name: finding.status
                for name, finding in (
                    ("features", report.feature_drift),
                    ("predictions", report.prediction_drift),
                    ("labels", report.label_drift),
                )
            }
            if report is not None
            else {},
            entropy_change=quality.entropy_change.value if quality is not None else None,
            calibration_change=quality.calibration_change.value if quality is not None else None,
            retraining=retraining,
            report=self._link(self.state.report(as_of)),
            page=self._link(self.state.page(as_of)),
            decision=self._link(self.state.decision(as_of)),
        )

    def _link(self, path: Path) -> str | None:
        """From the folder of all arms; None: there is no such file."""
        return str(path.relative_to(self.path.parent)) if path.exists() else None
