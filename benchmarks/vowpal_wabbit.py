"""Logistic regression from file to model, one pass on one thread: ours against Vowpal Wabbit's on the same log.

    python benchmarks/vowpal_wabbit.py --cache DIR [--rows 1000000] [--repeats 3] [--out benchmarks/vowpal_wabbit.md]

The log is drawn: 26 categorical fields with Zipf-distributed values (10 to a million of them) and 13 counts with gaps;
the truth is a weight for each value. Ours reads it from Parquet, Vowpal Wabbit from its text format (a namespace for
each field, counts as their logarithm, which ours takes by itself). The clock is the CPU time of the process, from
opening the file to the model on disk, imports and compilation left out; the two take turns. Vowpal Wabbit gets an
environment of its own in the cache directory, and its learning rate, which is the best of a few on the holdout rows.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import textwrap
import venv
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

VOWPAL_WABBIT = "vowpalwabbit==9.11.9"
CARDINALITIES = np.geomspace(10, 1_000_000, 26).astype(int)
NUM_COUNTS = 13
CATEGORIES = [f"C{i}" for i in range(1, 27)]
COUNTS = [f"I{i}" for i in range(1, NUM_COUNTS + 1)]
CHUNK = 250_000
# The mean loss of a batch of 8192 has gradients of 1e-5 in a row of the table: that is what Adagrad starts from.
SETTINGS = {"batch_size": 8192, "embedding_learning_rate": 0.1, "initial_accumulator": 1e-8}
VALIDATION_ROWS = 20_000

OURS = textwrap.dedent("""\
    import json, sys, time
    from pathlib import Path
    import numpy as np, pyarrow as pa, pyarrow.csv as pa_csv, torch
    from safetensors.torch import save_file
    from evergreen.contracts.mapping import LogKind
    from evergreen.contracts.training_set import ColumnKind, Feature, FeatureOrigin
    from evergreen.models.base import score_rows
    from evergreen.models.encoding import Encoder, open_parquet
    from evergreen.models.registry import build_model, model_config
    from evergreen.training.config import TrainingConfig
    from evergreen.training.fitting import fit_by_gradient
    from evergreen.training.task import Examples

    pa.set_cpu_count(1)
    torch.set_num_threads(1)
    folder, source = Path(sys.argv[1]), sys.argv[2]
    kinds = {"C": ColumnKind.CATEGORICAL, "I": ColumnKind.NUMERIC}
    names = [f"C{i}" for i in range(1, 27)] + [f"I{i}" for i in range(1, 14)]
    features = [Feature(name=n, kind=kinds[n[0]], origin=FeatureOrigin.CONTEXT) for n in names]
    config = TrainingConfig(
        model="logistic_regression", max_epochs=1, evaluations_per_epoch=1, id_dropout=0.0,
        **json.loads(sys.argv[3]),
    )

    def columns_of(name):
        if source == "Parquet":
            file = open_parquet(folder / f"{name}.parquet", features)
            return lambda column: file.read([column], use_threads=False)[column]
        types = {n: pa.dictionary(pa.int32(), pa.string()) if n[0] == "C" else pa.float64() for n in names}
        options = pa_csv.ConvertOptions(column_types=types | {"label": pa.float32()})
        read = pa_csv.ReadOptions(use_threads=False, block_size=1 << 26)
        return pa_csv.read_csv(folder / f"{name}.csv", read_options=read, convert_options=options).column

    def examples(encoder, column, rows=None):
        rows = encoder.transform(pa.table({name: column(name) for name in names})) if rows is None else rows
        return Examples(rows, column("label").to_numpy().copy())

    def train(name):
        phases = [time.process_time()]
        column = columns_of(name)
        encoder, rows = Encoder.fit_transform(column, features, config.encoder)
        train, validation = examples(encoder, column, rows), examples(encoder, columns_of("validation"))
        phases.append(time.process_time())
        torch.manual_seed(0)
        model = build_model("logistic_regression", model_config("logistic_regression", {}), encoder.spec)
        rate = float(train.labels.mean())
        model.set_output(bias=float(np.log(rate / (1 - rate))), scale=1.0)
        fit_by_gradient(model, train, validation, config, kind=LogKind.IMPRESSIONS)
        phases.append(time.process_time())
        encoder.write(folder / "encoder.json")
        save_file(model.state_dict(), folder / "weights.safetensors")
        phases.append(time.process_time())
        return encoder, model, dict(zip(["read and encode", "train", "write"], np.diff(phases)))

    train("validation")  # what torch and numba import and compile at the first step is not timed
    encoder, model, phases = train("train")
    scores = score_rows(model, examples(encoder, columns_of("holdout")).rows).astype(np.float64)
    np.save(folder / "ours.npy", 1 / (1 + np.exp(-scores)))
    print(json.dumps({"cpu_s": sum(phases.values()), "phases": phases}))
    """)
THEIRS = textwrap.dedent("""\
    import json, sys, time
    import vowpalwabbit
    folder, options = sys.argv[1], sys.argv[2].split()
    model = f"{folder}/vw.model"
    started = time.process_time()
    learner = vowpalwabbit.Workspace(
        arg_list=["-d", f"{folder}/train.vw", "-f", model, "--loss_function", "logistic", "--quiet", *options]
    )
    learner.finish()
    seconds = time.process_time() - started
    vowpalwabbit.Workspace(
        arg_list=["-d", f"{folder}/holdout.vw", "-t", "-i", model, "--link", "logistic", "--quiet",
                  "-p", f"{folder}/vw.predictions"]
    ).finish()
    print(json.dumps({"cpu_s": seconds}))
    """)


class Log:
    """A log whose clicks follow a logistic regression on categories and counts."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)
        self._shares = [np.cumsum(1 / np.arange(1, n + 1) ** 1.1) for n in CARDINALITIES]
        self._weights = [self._generator.normal(scale=0.35, size=n).astype(np.float32) for n in CARDINALITIES]
        self._words = [
            pa.array([f"{word:08x}" for word in self._generator.integers(0, 1 << 32, size=n)]) for n in CARDINALITIES
        ]
        self._slopes = self._generator.normal(scale=0.15, size=NUM_COUNTS)

    def draw(self, num_rows: int) -> pa.Table:
        """Rows in no particular order: label, categories (5 % null) and counts (10 % null)."""
        generator, logit = self._generator, np.full(num_rows, -1.6)
        columns: dict[str, pa.Array] = {}
        for name, shares, weights, words in zip(CATEGORIES, self._shares, self._weights, self._words, strict=True):
            value = np.searchsorted(shares, generator.random(num_rows) * shares[-1])
            present = generator.random(num_rows) >= 0.05
            logit += np.where(present, weights[value], 0)
            columns[name] = words.take(pa.array(value, mask=~present))
        for name, slope in zip(COUNTS, self._slopes, strict=True):
            count = np.floor(generator.lognormal(1.5, 1.5, num_rows))
            present = generator.random(num_rows) >= 0.1
            logit += np.where(present, slope * (np.log1p(count) - 1.5), 0)
            columns[name] = pa.array(count, mask=~present)
        label = (generator.random(num_rows) < 1 / (1 + np.exp(-logit))).astype(np.float32)
        return pa.table({"label": label, **columns})


def vw_lines(table: pa.Table) -> pa.ChunkedArray:
    """The rows as text: `1 |n I1:0.69 … |C1 68fd1e64 …`, absent values left out."""
    pieces: list[Any] = [pc.if_else(pc.equal(table["label"], 1), "1", "-1"), "|n"]
    for name in COUNTS:
        text = pc.cast(pc.round(pc.ln(pc.add(table[name], 1.0)), 4), pa.string())
        pieces.append(pc.binary_join_element_wise(name, text, ":"))
    for name in CATEGORIES:
        pieces.append(pc.binary_join_element_wise(f"|{name}", table[name], " "))
    return pc.binary_join_element_wise(*pieces, " ", null_handling="skip")


def write_log(folder: Path, name: str, log: Log, num_rows: int) -> None:
    """Write a log as Parquet, CSV and text for Vowpal Wabbit."""
    parts = [log.draw(min(CHUNK, num_rows - start)) for start in range(0, num_rows, CHUNK)]
    table = pa.concat_tables(parts)
    pq.write_table(table, folder / f"{name}.parquet")
    pa_csv.write_csv(table, folder / f"{name}.csv", pa_csv.WriteOptions(quoting_style="needed"))
    with (folder / f"{name}.vw").open("w") as file:
        for part in parts:
            file.write("\n".join(vw_lines(part).to_pylist()) + "\n")


def run(python: Path | str, code: str, *arguments: str) -> dict[str, Any]:
    """Run a measurement in a process of its own, on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [str(python), "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{python} failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def log_loss(labels: np.ndarray, probabilities: np.ndarray) -> float:
    p = np.clip(probabilities, 1e-7, 1 - 1e-7)
    return float(-(labels * np.log(p) + (1 - labels) * np.log1p(-p)).mean())


def vw_python(cache: Path) -> Path:
    """Interpreter of an environment with Vowpal Wabbit."""
    environment = cache / "vowpalwabbit"
    python = environment / "bin" / "python"
    if not python.exists():
        venv.create(environment, with_pip=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", VOWPAL_WABBIT], check=True)
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="directory for the log and the other environment")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vw-bits", type=int, default=22, help="size of Vowpal Wabbit's table")
    parser.add_argument("--vw-rates", type=float, nargs="+", default=[1.0, 0.5, 0.25])
    parser.add_argument("--settings", default="{}", help="JSON of other settings of TrainingConfig, for ours")
    parser.add_argument("--csv", action="store_true", help="measure ours from CSV, too")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    settings = SETTINGS | json.loads(arguments.settings)
    folder = arguments.cache / f"{arguments.rows}"
    if not (folder / "holdout.vw").exists():
        folder.mkdir(parents=True, exist_ok=True)
        log = Log(seed=0)
        write_log(folder, "train", log, arguments.rows)
        write_log(folder, "validation", log, VALIDATION_ROWS)
        write_log(folder, "holdout", log, max(10_000, arguments.rows // 10))
    python = vw_python(arguments.cache)
    labels = pq.read_table(folder / "holdout.parquet", columns=["label"])["label"].to_numpy()

    def ours(source: str) -> tuple[float, dict[str, Any]]:
        result = run(sys.executable, OURS, str(folder), source, json.dumps(settings))
        return log_loss(labels, np.load(folder / "ours.npy")), result

    def theirs(rate: float) -> tuple[float, dict[str, Any]]:
        result = run(python, THEIRS, str(folder), f"-b {arguments.vw_bits} -l {rate}")
        return log_loss(labels, np.loadtxt(folder / "vw.predictions")), result

    losses = {rate: theirs(rate)[0] for rate in arguments.vw_rates}
    rate = min(losses, key=losses.__getitem__)
    runs: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    for _ in range(arguments.repeats):
        runs.setdefault("Vowpal Wabbit, text", []).append(theirs(rate))
        for source in ["Parquet", "CSV"][: 1 + arguments.csv]:
            runs.setdefault(f"ours, {source}", []).append(ours(source))
    baseline = np.median([result["cpu_s"] for _, result in runs["Vowpal Wabbit, text"]])
    lines = [
        f"# Logistic regression against Vowpal Wabbit, {os.cpu_count()} cores, {platform.machine()}, "
        f"Python {platform.python_version()}, torch {version('torch')}, {VOWPAL_WABBIT}",
        "",
        f"{arguments.rows:,} rows of 26 categories and 13 counts, one pass, one thread; median CPU time of "
        f"{arguments.repeats} runs from file to model, in turns; log loss of {len(labels):,} rows that neither saw. "
        f"Vowpal Wabbit: -b {arguments.vw_bits} -l {rate:g}, the best of "
        + ", ".join(f"{rate:g} ({loss:.4f})" for rate, loss in losses.items())
        + f". Ours: {', '.join(f'{name} {value:g}' for name, value in settings.items())}; it also reads and scores "
        f"{VALIDATION_ROWS:,} rows of validation.",
        "",
        "| from | CPU s | rows/s CPU | against Vowpal Wabbit | log loss |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, results in runs.items():
        seconds = float(np.median([result["cpu_s"] for _, result in results]))
        lines.append(
            f"| {name} | {seconds:.2f} | {arguments.rows / seconds:,.0f} | {baseline / seconds:.2f} | "
            f"{results[-1][0]:.4f} |"
        )
    phases = runs["ours, Parquet"][-1][1]["phases"]
    lines += [
        "",
        "Ours from Parquet by phase, CPU s: "
        + ", ".join(f"{name} {value:.2f}" for name, value in phases.items())
        + ".",
    ]
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
