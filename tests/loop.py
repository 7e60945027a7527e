"""A small loop for tests: a world that asked a really served model for some days, and the state that it began with."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from evergreen.contracts.loop_state import LoopState
from evergreen.contracts.mapping import Mapping
from evergreen.contracts.training_set import TrainingSet
from evergreen.features.store import FeatureStore
from evergreen.features.tables import build_feature_tables
from evergreen.ingest.log import ingest_log
from evergreen.models.package import ModelPackage
from evergreen.monitoring.watch import keep_reference
from evergreen.release.store import ReleaseStore
from evergreen.serving.impression_sinks import open_sink
from evergreen.serving.impressions import ImpressionLog
from evergreen.serving.server import opener, serving_in_background
from evergreen.serving.settings import ServeSettings
from evergreen.simulator.config import SimulatorConfig
from evergreen.simulator.days import run_day
from evergreen.simulator.log import simulate_log
from evergreen.simulator.served_model import ServedModel
from evergreen.simulator.visits import VisitPlan, Visits
from evergreen.training.config import TrainingConfig
from evergreen.training.dataset import build_training_set
from evergreen.training.trainer import train_model

DAY = timedelta(days=1)
CONFIG = SimulatorConfig(num_users=80, num_items=50, num_days=6, events_per_day=1_500, seed=3, click_rate=0.15)


@dataclass(frozen=True)
class LivedLoop:
    """Days that were lived, and what is on disk of them."""

    root: Path
    plan: VisitPlan
    package: ModelPackage
    training_set: TrainingSet

    @property
    def state(self) -> LoopState:
        """With the first model, released when the first day began."""
        return LoopState(self.root / "state")

    @property
    def data(self) -> Path:
        """The click log, of before and since."""
        return self.root / "data"

    @property
    def impressions(self) -> str:
        """What the server logged."""
        return str(self.root / "impressions")

    @property
    def clicks(self) -> str:
        """On what it served."""
        return str(self.root / "world" / "clicks")

    def evening(self, day: int) -> datetime:
        """The moment in which a day of the world ends."""
        return self.plan.date(day + 1)

    def fresh_state(self, folder: Path) -> LoopState:
        """A copy of the state, to be written to."""
        shutil.copytree(self.state.path, folder, symlinks=True)
        return LoopState(folder)


def live_loop(
    root: Path, *, days: int, requests_per_day: int = 250, config: SimulatorConfig = CONFIG, **training: Any
) -> LivedLoop:
    """Make a log, train a model on it, release it, and let the world ask it for some days.

    Features stay as they were when the first day began.
    """
    simulate_log(config, root / "log")
    shutil.copytree(root / "log", root / "data")
    snapshot = ingest_log(Mapping.load("simulated"), str(root / "log"), root / "snapshot")
    tables = build_feature_tables(snapshot, root / "feature_tables")
    state = LoopState(root / "state")
    store = FeatureStore.create(state.feature_store, tables)
    store.materialize(snapshot.as_of)
    rows = build_training_set(snapshot, tables, store, root / "training_set")
    training_config = TrainingConfig(model="logistic_regression", export_program=False, **training)
    package = train_model(rows, root / "model", config=training_config)
    plan = VisitPlan(log=config, requests_per_day=requests_per_day, k=6, seed=config.seed)
    keep_reference(state, rows, package)
    releases = ReleaseStore(state.releases)
    releases.release(package.path, package.version, as_of=plan.date(0), reason="the first")
    settings = ServeSettings.of(
        model=releases.current, feature_store=state.feature_store, host="127.0.0.1", port=0, deadline_ms=20_000
    )
    visits = Visits(plan, num_days=days)
    with (
        ImpressionLog(open_sink(str(root / "impressions"))) as impressions,
        serving_in_background(settings, opener(settings, None, impressions)) as server,
        ServedModel(server.url, settings.name) as recommend,
    ):
        for day in range(days):
            run_day(visits, day, recommend, root / "world")
    for file in (root / "world" / "events").iterdir():
        shutil.copyfile(file, root / "data" / "events" / file.name)
    return LivedLoop(root, plan, package, rows)
