"""A small simulated log and all that training makes of it, for tests that need every real part."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from evergreen.contracts.feature_tables import FeatureTables
from evergreen.contracts.mapping import Mapping
from evergreen.contracts.snapshot import Snapshot
from evergreen.contracts.training_set import TrainingSet
from evergreen.features.store import FeatureStore
from evergreen.features.tables import build_feature_tables
from evergreen.ingest.log import ingest_log
from evergreen.models.package import ModelPackage
from evergreen.simulator.config import SimulatorConfig
from evergreen.simulator.log import simulate_log
from evergreen.training.config import TrainingConfig
from evergreen.training.dataset import build_training_set
from evergreen.training.trainer import train_model

CONFIG = SimulatorConfig(num_users=60, num_items=50, num_days=8, events_per_day=600, seed=3, click_rate=0.1)


@dataclass(frozen=True)
class SmallWorld:
    """The artifacts of one small run. Whoever changes one copies it first."""

    root: Path
    snapshot: Snapshot
    tables: FeatureTables
    training_set: TrainingSet

    @classmethod
    def make(cls, root: Path, config: SimulatorConfig = CONFIG) -> SmallWorld:
        simulate_log(config, root / "log")
        return cls.of_log(root, Mapping.load("simulated"))

    @classmethod
    def of_log(cls, root: Path, mapping: Mapping) -> SmallWorld:
        """From a log that is there, in `root / "log"`."""
        snapshot = ingest_log(mapping, str(root / "log"), root / "snapshot")
        tables = build_feature_tables(snapshot, root / "feature_tables")
        store = FeatureStore.create(root / "feature_store", tables)
        store.materialize(snapshot.as_of)
        return cls(root, snapshot, tables, build_training_set(snapshot, tables, store, root / "training_set"))

    @property
    def log(self) -> Path:
        return self.root / "log"

    @property
    def feature_store(self) -> Path:
        """Materialized as of the end of the log."""
        return self.root / "feature_store"

    def package(self, model: str, *, seed: int = 0) -> ModelPackage:
        """A model of one epoch, trained when it is first asked for."""
        path = self.root / f"{model}-{seed}"
        if path.exists():
            return ModelPackage.load(path)
        config = TrainingConfig(model=model, max_epochs=1, seed=seed, export_program=False)
        return train_model(self.training_set, path, config=config)
