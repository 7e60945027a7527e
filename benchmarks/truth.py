"""How near do models come to the truth? On the simulated log the true probability of every click is known.

    .venv/bin/python benchmarks/truth.py --rows 5000000 --models dlrm --out benchmarks/truth.md

Simulates a log, goes the way of the training pipeline (ingest, feature tables, training set, training), and compares
the normalized entropy of each model on the test split with that of the true click probabilities of the same rows. Both
know the position at which a row was shown. Tastes are of the users' own, drift, and show in few clicks: two lines tell
how near anybody could come who knows all else of the world (attainable.py).
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from attainable import floors

from evergreen.contracts.mapping import Mapping
from evergreen.contracts.training_set import TrainingSet
from evergreen.features.store import FeatureStore
from evergreen.features.tables import build_feature_tables
from evergreen.ingest.log import ingest_log
from evergreen.metrics.binary import auc, normalized_entropy
from evergreen.models.package import ModelPackage
from evergreen.simulator.config import SimulatorConfig
from evergreen.simulator.log import simulate_log
from evergreen.training.config import TrainingConfig
from evergreen.training.dataset import build_training_set
from evergreen.training.trainer import train_model

DAYS = 30
_TEST_CHUNK = 200_000


def main() -> None:
    """Run and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5_000_000, help="impressions to simulate")
    parser.add_argument("--models", default="logistic_regression,deepfm,dlrm")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--world", type=json.loads, default={}, help="JSON settings of the simulated world")
    parser.add_argument("--training", type=json.loads, default={}, help="JSON settings of the training")
    parser.add_argument("--work", type=Path, help="keep artifacts here, and take those that are there")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="evergreen-truth-"))
    try:
        text = report(
            work, arguments.rows, arguments.models.split(","), arguments.seed, arguments.world, arguments.training
        )
    finally:
        if arguments.work is None:
            shutil.rmtree(work)
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


def report(work: Path, rows: int, models: list[str], seed: int, world: dict[str, Any], training: dict[str, Any]) -> str:
    """Markdown of the whole run."""
    seconds: dict[str, float] = {}
    if not (work / "training_set").exists():
        make_training_set(
            work, SimulatorConfig(num_days=DAYS, events_per_day=rows // DAYS, seed=seed, **world), seconds
        )
    training_set = TrainingSet.load(work / "training_set")
    truth = true_probabilities(training_set, work / "log" / "truth")
    labels = training_set.read("test", ["label"])["label"].to_numpy().astype(np.float64)
    floor = normalized_entropy(labels, truth)
    lines = [
        f"# Models against the truth: {rows:,} simulated impressions",
        "",
        f"2 cores, {platform.machine()}, Python {platform.python_version()}, one thread; "
        f"{training_set.manifest.splits['train'].rows:,} training rows, {len(labels):,} test rows with "
        f"{int(labels.sum()):,} clicks in the days after them; simulator seed {seed}. World: {_words(world)}. "
        f"Training: {_words(training)}.",
        "",
        "| probabilities | normalized entropy | against the truth's | AUC | training s | peak RSS MiB |",
        "|---|---:|---:|---:|---:|---:|",
        f"| true | {floor:.4f} | 1.000 | {auc(labels, truth):.4f} | | |",
    ]
    with timed(seconds, "floors"):
        frozen, fresh = floors(work / "log")
    lines.append(f"| the best with all clicks up to the end of training | | {frozen:.3f} | | | |")
    lines.append(f"| the best with all clicks up to midnight | | {fresh:.3f} | | | |")
    for name in models:
        with timed(seconds, name):
            config = TrainingConfig(model=name, seed=seed, export_program=False, **training)
            package = train_model(training_set, work / "models" / name, config=config)
        predicted = predict(package, training_set)
        entropy = normalized_entropy(labels, predicted)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        lines.append(
            f"| {name} | {entropy:.4f} | {entropy / floor:.3f} | {auc(labels, predicted):.4f} | "
            f"{seconds[name]:.0f} | {peak:.0f} |"
        )
        print(lines[-1], flush=True)
    stages = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items() if name not in models)
    return "\n".join([*lines, "", *([f"Before training: {stages}."] if stages else []), ""])


def make_training_set(work: Path, config: SimulatorConfig, seconds: dict[str, float]) -> None:
    """Simulate, ingest, build feature tables and join them."""
    with timed(seconds, "simulation"):
        simulate_log(config, work / "log")
    with timed(seconds, "ingest"):
        snapshot = ingest_log(Mapping.load("simulated"), str(work / "log"), work / "snapshot")
    with timed(seconds, "feature tables"):
        tables = build_feature_tables(snapshot, work / "feature_tables")
    with timed(seconds, "training set"):
        build_training_set(snapshot, tables, FeatureStore.create(work / "store", tables), work / "training_set")


def true_probabilities(training_set: TrainingSet, truth: Path) -> np.ndarray:
    """(num_test_rows,) the click probability that the simulator drew each click from."""
    keys = ["request_id", "item_id"]
    rows = training_set.read("test", keys)
    rows = rows.append_column("row", pa.array(np.arange(rows.num_rows)))
    known = ds.dataset(truth, format="parquet").to_table(columns=[*keys, "click_probability"])
    joined = rows.join(known, keys=keys).sort_by("row")
    probabilities: np.ndarray = joined["click_probability"].to_numpy()
    assert len(probabilities) == rows.num_rows, "an item occurs twice in a request"
    return probabilities


def predict(package: ModelPackage, training_set: TrainingSet) -> np.ndarray:
    """(num_test_rows,) predictions at the positions where rows were shown."""
    parts = []
    with pq.ParquetFile(training_set.file("test")) as file:
        for batch in file.iter_batches(batch_size=_TEST_CHUNK):
            rows = package.encoder.transform_batches([batch], num_rows=batch.num_rows)
            positions = batch.column("position").fill_null(0).to_numpy(zero_copy_only=False)
            parts.append(package.predict_encoded(rows, positions))
    return np.concatenate(parts)


def _words(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in settings.items()) or "the defaults"


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Note how long the block took, and say so."""
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started
    print(f"{name}: {seconds[name]:.0f} s", flush=True)


if __name__ == "__main__":
    main()
