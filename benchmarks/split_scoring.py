"""Scoring a request in halves: what the items' half ahead of the request, and the user's half once, save.

    python benchmarks/split_scoring.py --training-set DIR [--packages DIR] [--out benchmarks/split_scoring.md]

Each model is trained for an epoch (or read from --packages). Then requests of one user and 100 or 500 candidates are
scored on one thread by `ModelPackage.predict`, which is given the assembled table, and by `SplitScorer.score`, which is
given what a server holds: the user's values, the features of the user in each category, and the ages of items. The two
take turns, 40 requests each.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from evergreen.contracts.training_set import FeatureOrigin, Side, TrainingSet
from evergreen.models.numeric import numeric_values
from evergreen.models.package import ModelPackage
from evergreen.models.registry import MODEL_NAMES
from evergreen.models.split.halves import half_of
from evergreen.models.split.request import PairColumns
from evergreen.models.split.scorer import SplitScorer
from evergreen.training.config import TrainingConfig
from evergreen.training.trainer import train_model

SIZES = (100, 500)
BLOCK = 40
WARM_UP = 5


@dataclass(frozen=True)
class Request:
    """One request, both ways."""

    whole: pa.Table
    user: dict[str, Any]
    pairs: list[PairColumns]
    rows: NDArray[np.int64]


def make_requests(package: ModelPackage, items: pa.Table, test: pa.Table, size: int, count: int) -> list[Request]:
    """Requests of users that the test rows hold; the features of pairs are those of other test rows."""
    rng = np.random.default_rng(0)
    features = package.info.features
    by_half = {side: [f for f in features if half_of(f) is side] for side in Side}
    moment = [f.name for f in by_half[Side.PAIR] if f.origin is FeatureOrigin.ON_DEMAND]
    shared = [f.name for f in by_half[Side.PAIR] if f.origin is not FeatureOrigin.ON_DEMAND]
    category = items["item_category"].combine_chunks().dictionary_encode()
    num_categories, category_of = len(category.dictionary), category.indices.to_numpy()
    requests = []
    for _ in range(count):
        rows = rng.integers(items.num_rows, size=size)
        user = test.slice(int(rng.integers(test.num_rows)), 1)
        ages = test.take(rng.integers(test.num_rows, size=size)).select(moment)
        in_category = test.take(rng.integers(test.num_rows, size=num_categories)).select(shared)
        of_pair = in_category.take(category_of[rows])
        columns = {f.name: user[f.name].take(pa.array(np.zeros(size, np.int64))) for f in by_half[Side.USER]}
        columns |= {f.name: items[f.name].take(rows) for f in by_half[Side.ITEM]}
        columns |= {name: ages[name] for name in moment} | {name: of_pair[name] for name in shared}
        pairs = [part(in_category, category_of[rows]), part(ages, None)]
        values = user.select([f.name for f in by_half[Side.USER]]).to_pylist()[0]
        whole = pa.table({f.name: columns[f.name] for f in features}).combine_chunks()
        requests.append(Request(whole, values, pairs, rows))
    return requests


def part(table: pa.Table, of: NDArray[np.integer] | None) -> PairColumns:
    """Numbers of pairs as arrays."""
    values = np.column_stack([numeric_values(name, table[name]) for name in table.column_names])
    return PairColumns(tuple(table.column_names), values, None if of is None else of.astype(np.int64))


def last_rows(table: pa.Table) -> pa.Table:
    """The last row of each item."""
    numbered = pa.table({"item_id": table["item_id"], "row": np.arange(table.num_rows)})
    last = numbered.group_by("item_id").aggregate([("row", "max")])["row_max"]
    return table.take(last)


def cpu_milliseconds(action: Callable[[], object]) -> float:
    started = time.thread_time_ns()
    action()
    return (time.thread_time_ns() - started) / 1e6


def measure(package: ModelPackage, items: pa.Table, test: pa.Table, count: int) -> str:
    """A line of the table."""
    started = time.process_time()
    scorer = SplitScorer.prepare(package, items)
    prepared = (time.process_time() - started) * 1e6 / items.num_rows
    bytes_an_item = sum(t.element_size() * t[0].numel() for t in scorer.item_half) + 4
    cells, worst = [], 0.0
    for size in SIZES:
        plain, split = [], []
        requests = make_requests(package, items, test, size, count)
        for first in range(0, count, BLOCK):
            block = requests[first : first + BLOCK]
            expected = [package.predict(request.whole) for request in block[:WARM_UP]]
            plain += [cpu_milliseconds(lambda request=request: package.predict(request.whole)) for request in block]
            scores = [scorer.score(request.user, request.pairs, request.rows) for request in block[:WARM_UP]]
            split += [
                cpu_milliseconds(lambda request=request: scorer.score(request.user, request.pairs, request.rows))
                for request in block
            ]
            worst = max(worst, float(np.abs(np.stack(scores) - np.stack(expected)).max()))
        one, other = np.median(plain), np.median(split)
        cells.append(f"{one:.2f} | {other:.2f} | {one / other:.1f}")
    return f"| {package.info.name} | {' | '.join(cells)} | {worst:.0e} | {bytes_an_item:,} | {prepared:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--training-set", type=Path, required=True)
    parser.add_argument("--packages", type=Path, help="folder of packages by model; those that it lacks are trained")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    training_set = TrainingSet.load(arguments.training_set)
    test = training_set.read("test").combine_chunks()
    items = last_rows(test)
    lines = [
        f"# Scoring a request in halves: {training_set.manifest.mapping.name}, {platform.machine()}, "
        f"Python {platform.python_version()}, one thread",
        "",
        f"{items.num_rows:,} items, {len(training_set.manifest.features)} features; medians of {arguments.requests} "
        "requests, milliseconds of CPU. Plain: `ModelPackage.predict` of the assembled table, whose assembly is not "
        "counted. Split: `SplitScorer.score`. The two take turns, 40 requests each.",
        "",
        "| model | plain, 100 | split, 100 | ratio | plain, 500 | split, 500 | ratio | largest difference "
        "| bytes an item | µs an item, ahead |",
        "|---|" + "---:|" * 9,
    ]
    with tempfile.TemporaryDirectory() as folder:
        packages = arguments.packages or Path(folder)
        for name in MODEL_NAMES:
            if not (packages / name).exists():
                config = TrainingConfig(model=name, max_epochs=1, export_program=False)
                train_model(training_set, packages / name, config=config)
            lines.append(measure(ModelPackage.load(packages / name), items, test, arguments.requests))
            print(lines[-1], flush=True)
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
