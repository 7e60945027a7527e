"""The impression log: what a request pays, what the writer pays, and what a row takes.

    python benchmarks/impressions.py [--requests 2000] [--rounds 5] [--out benchmarks/impressions.md]

Requests show 10 of 100 candidates, with every feature of a simulated log, as the recommender has them: values of one
user, numbers of the pairs, and the table of all items, which the requests share. The reference for a request is what it
would pay to build its rows itself; the floor is `queue.Queue.put_nowait` of the same object. CPU time of the calling
thread, the best of the rounds; the ways take turns.
"""

from __future__ import annotations

import argparse
import io
import platform
import queue
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from evergreen.contracts.impressions import impression_schema, to_messages
from evergreen.contracts.mapping import Mapping
from evergreen.contracts.training_set import ColumnKind, Feature, Side
from evergreen.features.columns import feature_columns
from evergreen.models.split.halves import half_of
from evergreen.models.split.request import PairColumns
from evergreen.serving.answer import Answer
from evergreen.serving.impressions import ImpressionLog, PairValues, Rows, Served, encode

SHOWN, CANDIDATES, ITEMS, CATEGORIES, BATCH = 10, 100, 10_000, 20, 200
AT = datetime(2026, 3, 9, 12, tzinfo=UTC)


class Nowhere:
    """A sink that keeps nothing."""

    def write(self, name: str, rows: pa.Table) -> int:
        return 0

    def close(self) -> None:
        pass


def columns(features: list[Feature], num_rows: int, random: np.random.Generator) -> pa.Table:
    """Random features."""
    makers: dict[ColumnKind, Callable[[], pa.Array]] = {
        ColumnKind.NUMERIC: lambda: pa.array(random.random(num_rows).round(3)),
        ColumnKind.CATEGORICAL: lambda: pa.array([f"c{n}" for n in random.integers(0, 20, num_rows)]),
        ColumnKind.MULTI: lambda: pa.array([[f"t{n}"] for n in random.integers(0, 20, num_rows)]),
        ColumnKind.SEQUENCE: lambda: pa.array([[f"item-{n}" for n in random.integers(0, ITEMS, 50)]] * num_rows),
    }
    return pa.table({feature.name: makers[feature.kind]() for feature in features})


def requests(number: int, features: tuple[Feature, ...]) -> list[Served]:
    """Answered requests, as `ImpressionLog.record` gets them."""
    random = np.random.default_rng(0)
    side = {s: [f for f in features if half_of(f) is s and f.name not in ("user_id", "item_id")] for s in Side}
    catalogue = columns(side[Side.ITEM], ITEMS, random)
    pair_names = tuple(feature.name for feature in side[Side.PAIR])
    made = []
    for n in range(number):
        rows = random.integers(0, ITEMS, CANDIDATES)
        best = random.permutation(CANDIDATES)[:SHOWN]
        user = columns(side[Side.USER], 1, random).to_pylist()[0]
        pairs = PairColumns(pair_names, random.random((CATEGORIES, len(pair_names))), rows % CATEGORIES)
        answer = Answer(
            request_id=f"request-{n:08d}",
            user_id=f"u{n}",
            known_user=True,
            model_version="m",
            event_timestamp=AT,
            value_name="probability",
            item_ids=[f"item-{row}" for row in rows[best]],
            scores=np.full(SHOWN, 0.1),
        )
        made.append(Served(answer, features, [user, PairValues.of(pairs, best), Rows(catalogue, rows[best])], n, 1.0))
    return made


def cpu(work: Callable[[], object]) -> float:
    """Seconds of this thread."""
    started = time.thread_time()
    work()
    return time.thread_time() - started


def record_all(served: list[Served]) -> float:
    """Leave requests with a log."""
    calls = [(s.answer, s.features, s.sources) for s in served]
    with ImpressionLog(Nowhere(), flush_rows=len(served) * SHOWN, capacity_rows=len(served) * SHOWN) as log:

        def work() -> None:
            for answer, features, sources in calls:
                log.record(answer, features, sources)

        return cpu(work)


def put_all(served: list[Served]) -> float:
    """The floor."""
    waiting: queue.Queue[Served] = queue.Queue()
    return cpu(lambda: [waiting.put_nowait(request) for request in served])


def batches(served: list[Served], size: int) -> list[list[Served]]:
    """As the writer takes them from the queue."""
    return [served[start : start + size] for start in range(0, len(served), size)]


def measure(served: list[Served], rounds: int) -> dict[str, float]:
    """Microseconds a request, by what is done."""
    best: dict[str, float] = {}
    for _ in range(rounds):
        tables: list[pa.Table] = []
        few = served[: len(served) // 10]
        spent = {
            "record": record_all(served) / len(served),
            "put": put_all(served) / len(served),
            "inline": cpu(lambda: [encode([request]) for request in few]) / len(few),  # noqa: B023
            "encode": cpu(lambda: tables.extend(encode(b) for b in batches(served, BATCH))) / len(served),  # noqa: B023
        }
        rows = pa.concat_tables(tables)
        spent["parquet"] = cpu(lambda: pq.write_table(rows, io.BytesIO(), compression="zstd")) / len(served)  # noqa: B023
        spent["messages"] = cpu(lambda: to_messages(rows)) / len(served)  # noqa: B023
        best = {name: min(seconds * 1e6, best.get(name, np.inf)) for name, seconds in spent.items()}
    return best


def sizes(served: list[Served]) -> tuple[float, float, float]:
    """Bytes a row: in memory, in Parquet, and in messages."""
    rows = pa.concat_tables(encode(batch) for batch in batches(served, BATCH))
    pq.write_table(rows, buffer := io.BytesIO(), compression="zstd")
    messages = sum(len(value) for _, value in to_messages(rows))
    return tuple(size / rows.num_rows for size in (rows.nbytes, len(buffer.getvalue()), messages))  # type: ignore[return-value]


def report(figures: dict[str, float], size: tuple[float, float, float], num_requests: int, width: int) -> str:
    """The page."""
    lines = [
        f"# The impression log: {platform.machine()}, Python {platform.python_version()}, one thread",
        "",
        f"{num_requests:,} requests that show {SHOWN} of {CANDIDATES} candidates with {width} features; microseconds "
        "of CPU a request.",
        "",
        "| | |",
        "|---|---:|",
    ]
    names = {
        "record": "a request leaves its answer (`record`)",
        "put": "floor: `queue.Queue.put_nowait`",
        "inline": "the request builds its own rows instead",
        "encode": f"writer: rows, {BATCH} requests at once",
        "parquet": "writer: Parquet, zstd",
        "messages": "writer: Kafka messages",
    }
    lines += [f"| {name} | {figures[key]:.1f} |" for key, name in names.items()]
    lines += [
        "",
        f"A request pays {figures['record'] / figures['inline']:.3f} times what building its rows would cost it, "
        f"{figures['record'] / figures['put']:.1f} times the floor. Building them together costs "
        f"{figures['encode'] / figures['inline']:.2f} times building them alone.",
        "",
        f"A row takes {size[0]:.0f} bytes in memory, {size[1]:.0f} in Parquet and {size[2]:.0f} in a message. "
        "The values are random: real ones compress better.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    pa.set_cpu_count(1)
    features = feature_columns(Mapping.load("simulated"))
    served = requests(args.requests, features)
    figures = measure(served, args.rounds)
    width = len(impression_schema(features).field("features").type)
    page = report(figures, sizes(served), args.requests, width)
    print(page)
    if args.out:
        args.out.write_text(page)


if __name__ == "__main__":
    main()
