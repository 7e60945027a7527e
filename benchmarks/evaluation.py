"""Evaluating models on a log of interactions: what ranking whole catalogues costs, and joining each query only once.

    python benchmarks/evaluation.py --mapping deskdrop --data DIR [--out benchmarks/evaluation.md]

Features of queries and candidates are joined and encoded in two ways, on one thread: a row for each candidate, and what
a query's candidates have in common once a query. Both must give the same rows. Then two models are evaluated as the
pipeline does it.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from unittest import mock

import duckdb
import numpy as np
import torch

from evergreen.contracts.feature_tables import FeatureTables
from evergreen.contracts.mapping import Mapping
from evergreen.contracts.snapshot import Snapshot
from evergreen.contracts.training_set import TrainingSet
from evergreen.evaluation.evaluate import EvaluationConfig, evaluate_models
from evergreen.evaluation.pairs import PairFeatures
from evergreen.evaluation.queries import Catalogue, find_queries
from evergreen.evaluation.ranking import candidates_of
from evergreen.features import point_in_time
from evergreen.features.store import FeatureStore
from evergreen.features.tables import build_feature_tables
from evergreen.ingest.log import ingest_log
from evergreen.models.encoding import Encoder
from evergreen.models.inputs import EncodedRows
from evergreen.training.config import TrainingConfig
from evergreen.training.dataset import build_training_set
from evergreen.training.trainer import train_model

MODELS = ("popularity", "logistic_regression")
QUERIES_AT_A_TIME = 80
T = TypeVar("T")


def timed(action: Callable[[], T], seconds: list[float]) -> T:
    """Run, and add the CPU seconds that it took to `seconds[0]`."""
    started = time.process_time()
    result = action()
    seconds[0] += time.process_time() - started
    return result


def same(one: EncodedRows, other: EncodedRows) -> bool:
    """Whether rows are equal to the bit."""
    return (
        np.array_equal(one.categorical, other.categorical)
        and np.array_equal(one.numeric, other.numeric)
        and all(
            np.array_equal(a.values, b.values) and np.array_equal(a.offsets, b.offsets)
            for a, b in zip(one.bags, other.bags, strict=True)
        )
    )


def measure_pairs(snapshot: Snapshot, tables: FeatureTables, training_set: TrainingSet, num_queries: int) -> list[str]:
    """Lines of the table: joining and encoding both ways."""
    split = training_set.manifest.splits["test"]
    queries = find_queries(snapshot, tables, start=split.start, end=split.end, max_queries=num_queries, seed=0).queries
    catalogue = Catalogue(tables)
    encoder = Encoder.fit(training_set.read("train"), training_set.manifest.features)
    seconds = {name: [0.0] for name in ("read", "join", "encode", "join_each", "encode_each")}
    features = timed(lambda: PairFeatures(queries, tables, snapshot.mapping), seconds["read"])
    num_rows, equal = 0, True
    for first in range(0, len(queries), QUERIES_AT_A_TIME):
        asked = queries[first : first + QUERIES_AT_A_TIME]
        candidates = [candidates_of(query, catalogue) for query in asked]
        size = sum(table.num_rows for table in candidates)
        pairs = timed(lambda asked=asked, of=candidates: features.join(asked, of), seconds["join"])
        each = timed(lambda asked=asked, of=candidates, n=size: features.whole_rows(asked, of, n), seconds["join_each"])
        encoded = timed(lambda pairs=pairs: pairs.encode(encoder), seconds["encode"])
        encoded_each = timed(lambda each=each: encoder.transform(each), seconds["encode_each"])
        equal &= same(encoded, encoded_each)
        num_rows += size
    read, join, encode, join_each, encode_each = (value for (value,) in seconds.values())
    return [
        f"{len(queries):,} queries, {num_rows:,} candidates; the rows are {'equal' if equal else 'NOT EQUAL'}.",
        "",
        "| | a row for each candidate, CPU s | once a query, CPU s | ratio |",
        "|---|---:|---:|---:|",
        f"| join features | {join_each:.1f} | {read + join:.1f} | {join_each / (read + join):.1f} |",
        f"| encode | {encode_each:.1f} | {encode:.1f} | {encode_each / encode:.1f} |",
        f"| both | {join_each + encode_each:.1f} | {read + join + encode:.1f} "
        f"| {(join_each + encode_each) / (read + join + encode):.1f} |",
    ]


@contextlib.contextmanager
def one_thread():
    """DuckDB and torch on one thread: the CPU seconds of two are not comparable."""
    torch.set_num_threads(1)
    connect = duckdb.connect

    def connect_one(*arguments, **options):
        db = connect(*arguments, **options)
        db.execute("SET threads = 1")
        return db

    with mock.patch.object(point_in_time.duckdb, "connect", connect_one):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mapping", default="deskdrop")
    parser.add_argument("--data", required=True)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        snapshot = ingest_log(Mapping.load(arguments.mapping), arguments.data, work / "snapshot")
        tables = build_feature_tables(snapshot, work / "tables")
        store = FeatureStore.create(work / "store", tables)
        training_set = build_training_set(snapshot, tables, store, work / "training_set")
        with one_thread():
            lines = measure_pairs(snapshot, tables, training_set, arguments.queries)
            packages = [
                train_model(
                    training_set, work / name, config=TrainingConfig(model=name, max_epochs=1, export_program=False)
                )
                for name in MODELS
            ]
            spent = [0.0]
            config = EvaluationConfig(max_queries=arguments.queries)
            timed(
                lambda: evaluate_models(
                    training_set, packages, work / "evaluation", tables=tables, snapshot=snapshot, config=config
                ),
                spent,
            )
    lines = [
        f"# Ranking whole catalogues: {arguments.mapping}, {platform.machine()}, Python {platform.python_version()}, "
        "one thread",
        "",
        *lines,
        "",
        f"The whole evaluation of {' and '.join(MODELS)}, with intervals, latencies and report: {spent[0]:.1f} CPU s.",
    ]
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
