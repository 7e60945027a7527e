"""Evergreen's DeepFM trainer against FuxiCTR's DeepFM: samples per CPU-second on the same rows, one thread.

    python benchmarks/trainer.py --cache DIRECTORY [--table-rows 1000000 10000000] [--out benchmarks/trainer.md]

26 categorical fields, vectors of 16, layers of 128 and 64, batches of 8192, one epoch over synthetic rows: ids follow
Zipf's law, labels a factorization machine's truth. Each training runs in a process of its own, ours and theirs in
turn. The time is that of the training loop; ours holds its evaluations and its copies of the best weights as well,
theirs neither those nor its data loader. Ours has its default learning rates. FuxiCTR has the best of 0.001 (its
default), 0.002, 0.003, 0.005 and 0.01 for the log loss of these very validation rows, tables of a million rows. After
one epoch our deep part adds next to nothing to the scores: the log losses compare how tables are trained.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evergreen.contracts.mapping import LogKind
from evergreen.contracts.training_set import Side
from evergreen.metrics.binary import log_loss
from evergreen.models.base import score_rows
from evergreen.models.deepfm import DeepFM, DeepFMConfig
from evergreen.models.inputs import CategoricalInput, EncodedRows, InputSpec
from evergreen.training.config import TrainingConfig
from evergreen.training.fitting import fit_by_gradient
from evergreen.training.task import Examples

NUM_FIELDS = 26
FUXICTR = ("fuxictr==2.3.10", "torch==2.15.0", "numpy<2.5")
FUXICTR_LEARNING_RATE = 2e-3
CONFIG = TrainingConfig(id_dropout=0.0, max_epochs=1, min_steps_per_epoch=1, evaluations_per_epoch=1)
Result = dict[str, Any]


def write_rows(folder: Path, table_rows: int, train_rows: int, validation_rows: int) -> None:
    """Rows of ids by field and their labels: first the training rows, then those of validation."""
    generator = np.random.default_rng(0)
    field_rows, num_rows = table_rows // NUM_FIELDS, train_rows + validation_rows
    # Exponent 1: the k-th most frequent id is seen 1/k times as often as the first.
    ids = (field_rows ** generator.random((num_rows, NUM_FIELDS)) - 1).astype(np.int32)
    logit, total, squares = np.full(num_rows, -1.5), np.zeros((num_rows, 4)), np.zeros((num_rows, 4))
    for column in ids.T:
        logit += generator.normal(scale=0.2, size=field_rows)[column]
        vectors = generator.normal(scale=0.2, size=(field_rows, 4))[column]
        total += vectors
        squares += vectors**2
    logit += 0.5 * (total**2 - squares).sum(axis=1)
    np.save(folder / "ids.npy", ids)
    np.save(folder / "labels.npy", (generator.random(num_rows) < 1 / (1 + np.exp(-logit))).astype(np.float32))
    shape = {"fields": NUM_FIELDS, "field_rows": field_rows, "train_rows": train_rows}
    (folder / "shape.json").write_text(json.dumps(shape))


def new_model(field_rows: int) -> DeepFM:
    spec = InputSpec(
        categorical=tuple(
            CategoricalInput(name=f"field_{i}", side=Side.USER, start=1 + i * field_rows, num_rows=field_rows)
            for i in range(NUM_FIELDS)
        ),
        numeric=(),
        num_indicators=0,
        bags=(),
        num_embeddings=1 + NUM_FIELDS * field_rows,
        untrained_rows=(0,),
    )
    torch.manual_seed(0)
    return DeepFM(DeepFMConfig(embedding_dim=16, hidden=(128, 64), dropout=0.0, numeric_interactions=False), spec)


def examples(model: DeepFM, ids: np.ndarray, labels: np.ndarray) -> Examples:
    starts = np.array([field.start for field in model.spec.categorical], np.int32)
    rows = EncodedRows(model.spec, ids + starts, np.empty((len(ids), 0), np.float32), ())
    return Examples(rows, labels)


def train_ours(folder: Path, batch_size: int) -> Result:
    """Train on the rows of a folder, in this process."""
    torch.set_num_threads(1)
    shape = json.loads((folder / "shape.json").read_text())
    ids, labels, split = np.load(folder / "ids.npy"), np.load(folder / "labels.npy"), shape["train_rows"]
    config = CONFIG.model_copy(update={"batch_size": batch_size})

    small = new_model(100)
    warm_up = examples(small, ids[:1000] % 100, labels[:1000])
    fit_by_gradient(small, warm_up, warm_up, config, kind=LogKind.IMPRESSIONS)
    model = new_model(shape["field_rows"])
    mean = float(labels[:split].mean())
    model.set_output(bias=float(np.log(mean / (1 - mean))), scale=1.0)
    train, validation = (examples(model, ids[part], labels[part]) for part in (slice(split), slice(split, None)))
    watched = Examples(
        validation.rows.take(np.arange(min(batch_size, len(validation)))), validation.labels[:batch_size]
    )
    started = time.process_time()
    fit_by_gradient(model, train, watched, config, kind=LogKind.IMPRESSIONS)
    cpu_s = time.process_time() - started
    p = 1 / (1 + np.exp(-score_rows(model, validation.rows).astype(np.float64)))
    return {"cpu_s": cpu_s, "log_loss": log_loss(validation.labels.astype(np.float64), p), "torch": torch.__version__}


def run(command: list[str]) -> Result:
    """The JSON that a process of one thread prints last."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    result: Result = json.loads(output.splitlines()[-1])
    return result


def fuxictr_python(cache: Path) -> Path:
    """Python of an environment with FuxiCTR; made on first use."""
    python = cache / "fuxictr" / "bin" / "python"
    if not python.exists():
        subprocess.run(["uv", "venv", "--python", "3.11", str(cache / "fuxictr")], check=True)
        subprocess.run(["uv", "pip", "install", "--python", str(python), *FUXICTR], check=True)
    return python


def measure(
    folder: Path, table_rows: int, python: Path, options: argparse.Namespace
) -> tuple[list[Result], list[Result]]:
    """Results of our trainings and of FuxiCTR's, which took turns."""
    write_rows(folder, table_rows, options.train_rows, options.validation_rows)
    batch_size = str(options.batch_size)
    theirs_command = [str(python), str(Path(__file__).with_name("fuxictr_worker.py"))]
    ours, theirs = [], []
    for _ in range(options.rounds):
        ours.append(run([sys.executable, __file__, "--worker", str(folder), "--batch-size", batch_size]))
        theirs.append(run([*theirs_command, str(folder), str(FUXICTR_LEARNING_RATE), batch_size]))
    return ours, theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, help="directory for FuxiCTR's environment (6 GB)")
    parser.add_argument("--table-rows", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--train-rows", type=int, default=60 * 8192)
    parser.add_argument("--validation-rows", type=int, default=100_000)
    parser.add_argument("--batch-size", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(train_ours(options.worker, options.batch_size)))
        return
    if options.cache is None:
        parser.error("--cache: name a directory for FuxiCTR's environment")
    python = fuxictr_python(options.cache)
    rows, cost = [], []
    for table_rows in options.table_rows:
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs = measure(Path(folder), table_rows, python, options)
        speed, their_speed = (
            options.train_rows / statistics.median(result["cpu_s"] for result in results) for results in (ours, theirs)
        )
        cost.append(1 / speed)
        rows.append(
            f"| {table_rows:,} | {speed:,.0f} | {their_speed:,.0f} | {speed / their_speed:.1f} "
            f"| {ours[-1]['log_loss']:.4f} | {theirs[-1]['log_loss']:.4f} | {cost[-1] / cost[0]:.2f} |"
        )
        print(rows[-1], flush=True)
    text = "\n".join([*head(options, ours[-1], theirs[-1]), *rows]) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text)


def head(options: argparse.Namespace, ours: Result, theirs: Result) -> list[str]:
    return [
        f"# Trainer, {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "",
        f"DeepFM, {NUM_FIELDS} fields, vectors of 16, layers of 128 and 64, batches of {options.batch_size:,}; one",
        f"epoch over {options.train_rows:,} rows, one thread, median of {options.rounds} rounds in turn.",
        f"torch {ours['torch']}; FuxiCTR {theirs['version']} on torch {theirs['torch']}. Speeds are samples per second",
        f"of CPU, log loss that of {options.validation_rows:,} validation rows; cost is ours a sample against that of",
        "the first line. FuxiCTR's loader is not timed, and its learning rate is the best of five on these rows; ours",
        "is the default.",
        f"Load average towards the end: {os.getloadavg()[1]:.1f}; above 1, other work shared the caches.",
        "",
        "| table rows | ours | FuxiCTR | ratio | log loss, ours | log loss, FuxiCTR | cost |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]


if __name__ == "__main__":
    main()
