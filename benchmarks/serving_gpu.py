"""Scoring on a GPU against a CPU core: requests a second and their latency, one by one and collected by `ScoreBatcher`.

    python -m benchmarks.serving_gpu --training-set DIR --packages DIR [--models deepfm,dcn_v2,transformer]
        [--num-items 100000] [--seconds 2] [--out benchmarks/serving_gpu.md]

Without HTTP: clients are coroutines of one event loop, each of which asks again as soon as it has its scores. "One by
one" is `SplitScorer.score` in the event loop, as the server does on a CPU; "collected" is `ScoreBatcher`, as it does on
a GPU. The CPU has one thread of torch. Both must give the same scores. Where torch finds no GPU, the CPU alone is
measured and the page says so.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.quality.hardware import hardware
from benchmarks.retrieval import draw_items
from benchmarks.split_scoring import last_rows, make_requests
from evergreen.contracts.training_set import TrainingSet
from evergreen.models.devices import choose_device, prepare_on
from evergreen.models.package import ModelPackage
from evergreen.models.split.scorer import SplitScorer
from evergreen.serving.batcher import ScoreBatcher

SIZES = (100, 500)
CLIENTS = (1, 8, 64)
WINDOWS_MS = (0.0, 2.0)
NUM_REQUESTS = 200

Request = tuple[dict[str, Any], Any, NDArray[np.int64]]
Ask = Callable[[Request], Awaitable[NDArray[np.float64]]]


async def load(ask: Ask, requests: Sequence[Request], *, clients: int, seconds: float) -> tuple[float, list[float]]:
    """Requests a second, and the milliseconds that each took."""
    queue = itertools.cycle(requests)
    for request in itertools.islice(queue, 5):
        await ask(request)
    taken: list[float] = []
    started = time.perf_counter()

    async def client() -> None:
        while time.perf_counter() - started < seconds:
            asked = time.perf_counter()
            await asyncio.sleep(0)  # its turn comes after the other clients', and counts
            await ask(next(queue))
            taken.append((time.perf_counter() - asked) * 1e3)

    await asyncio.gather(*(client() for _ in range(clients)))
    return len(taken) / (time.perf_counter() - started), taken


async def measure(scorer: SplitScorer, requests: Sequence[Request], *, clients: int, seconds: float) -> list[str]:
    """Cells: one by one, then collected by each window."""

    async def alone(request: Request) -> NDArray[np.float64]:
        return scorer.score(*request)

    ways: list[tuple[str, Ask, ScoreBatcher | None]] = [("one by one", alone, None)]
    for window in WINDOWS_MS:
        batcher = ScoreBatcher(window_seconds=window / 1e3)

        async def collected(request: Request, batcher: ScoreBatcher = batcher) -> NDArray[np.float64]:
            return await batcher.score(scorer, *request)

        ways.append((f"collected, {window:g} ms", collected, batcher))
    lines = []
    for name, ask, batcher in ways:
        rate, taken = await load(ask, requests, clients=clients, seconds=seconds)
        p50, p99 = np.quantile(taken, [0.5, 0.99])
        lines.append(f"{name} | {rate:,.0f} | {p50:.2f} | {p99:.2f} |")
        if batcher is not None:
            await batcher.close()
    return lines


def compare(packages: Iterable[ModelPackage], training_set: TrainingSet, num_items: int, seconds: float) -> list[str]:
    """The table."""
    test = training_set.read("test").combine_chunks()
    items = draw_items(last_rows(test), num_items)
    devices = dict.fromkeys([choose_device("cpu"), choose_device("auto")])
    lines = ["| model | candidates | clients | device | how | requests/s | p50, ms | p99, ms |", "|---|" + "---:|" * 7]
    for package in packages:
        scorers = {device: prepare_on(device, SplitScorer.prepare, package, items) for device in devices}
        for size in SIZES:
            made = make_requests(package, items, test, size, NUM_REQUESTS)
            requests = [(request.user, request.pairs, request.rows) for request in made]
            check(list(scorers.values()), requests[:20])
            for clients in CLIENTS:
                for device, scorer in scorers.items():
                    cells = asyncio.run(measure(scorer, requests, clients=clients, seconds=seconds))
                    start = f"| {package.info.name} | {size} | {clients} | {device.type} | "
                    lines += [start + cell for cell in cells]
                    print(*lines[-len(cells) :], sep="\n", flush=True)
    return lines


def check(scorers: Sequence[SplitScorer], requests: Sequence[Request]) -> None:
    """Raise unless all devices and both ways give the same scores."""
    expected = [scorers[0].score(*request) for request in requests]
    for scorer in scorers:
        for one, other, own in zip(
            scorer.score_many(requests), (scorer.score(*request) for request in requests), expected, strict=True
        ):
            np.testing.assert_allclose(one, own, atol=1e-5)
            np.testing.assert_allclose(other, own, atol=1e-5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--training-set", type=Path, required=True)
    parser.add_argument("--packages", type=Path, required=True, help="folder of packages by model")
    parser.add_argument("--models", default="deepfm,dcn_v2,transformer")
    parser.add_argument("--num-items", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: the CPU alone was measured"
    packages = (ModelPackage.load(arguments.packages / name) for name in arguments.models.split(","))
    training_set = TrainingSet.load(arguments.training_set)
    lines = [
        f"# Scoring on a GPU and on a CPU core: {gpu}; {hardware()}",
        "",
        f"{arguments.num_items:,} items; {arguments.seconds:g} s each. Requests a second of `clients` coroutines, "
        "without HTTP.",
        "",
        *compare(packages, training_set, arguments.num_items, arguments.seconds),
    ]
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
