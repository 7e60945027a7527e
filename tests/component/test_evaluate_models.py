"""The step `evaluate_models`, run as the function that it is, between artifacts on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from kfp import dsl

from components.evaluate_models import evaluate_models
from evergreen.contracts.mapping import Mapping
from evergreen.features.store import FeatureStore
from evergreen.features.tables import build_feature_tables
from evergreen.ingest.log import ingest_log
from evergreen.models.package import ModelPackage
from evergreen.simulator.config import SimulatorConfig
from evergreen.simulator.log import simulate_log
from evergreen.training.config import TrainingConfig
from evergreen.training.dataset import build_training_set
from evergreen.training.trainer import train_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with snapshot/, tables/, rows/ and packages by model."""
    folder = tmp_path_factory.mktemp("made")
    simulate_log(SimulatorConfig(num_users=100, num_items=50, num_days=4, events_per_day=800), folder / "log")
    snapshot = ingest_log(Mapping.load("simulated"), str(folder / "log"), folder / "snapshot")
    tables = build_feature_tables(snapshot, folder / "tables")
    store = FeatureStore.create(folder / "store", tables)
    rows = build_training_set(snapshot, tables, store, folder / "rows", seed=0)
    for name in ("popularity", "two_tower"):
        config = TrainingConfig(model=name, max_epochs=1, export_program=False)
        train_model(rows, folder / name, config=config)
    return folder


@pytest.mark.parametrize("models", [("popularity",), ("popularity", "two_tower")], ids=" and ".join)
def test_two_towers_are_handed_out_where_they_were_trained(made: Path, tmp_path: Path, models: tuple[str, ...]) -> None:
    champion, retriever = (dsl.Model(name, uri=str(tmp_path / name)) for name in ("champion", "retriever"))
    outputs = evaluate_models.python_func(
        snapshot=dsl.Dataset("snapshot", uri=str(made / "snapshot")),
        feature_tables=dsl.Dataset("feature_tables", uri=str(made / "tables")),
        training_set=dsl.Dataset("training_set", uri=str(made / "rows")),
        packages=[dsl.Model(name, uri=str(made / name)) for name in models],
        latency_budget_ms=1e6,
        seed=0,
        champion=champion,
        retriever=retriever,
        evaluation=dsl.Artifact("evaluation", uri=str(tmp_path / "evaluation")),
        report=dsl.HTML("report", uri=str(tmp_path / "report")),
        metrics=dsl.Metrics("metrics"),
        roc=dsl.ClassificationMetrics("roc"),
    )
    assert ModelPackage.load(Path(champion.path)).version == outputs.champion_version == champion.metadata["version"]
    if "two_tower" in models:
        assert ModelPackage.load(Path(retriever.path)).info.name == "two_tower"
        assert retriever.metadata["version"] == ModelPackage.load(made / "two_tower").version
    else:
        assert not Path(retriever.path).exists()
        assert not retriever.metadata
