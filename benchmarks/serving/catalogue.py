"""A hundred thousand items: retrieving and ranking 500 of them, against ranking 500 that the request brings.

    python -m benchmarks.serving.catalogue --work DIR [--items 100000] [--out benchmarks/serving/catalogue.md]

One server, one catalogue (the simulated one again and again under other ids, so that it has the size and the numbers of
a large one). The two kinds of request take turns, and of each the best round's median counts.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from benchmarks.quality.hardware import hardware
from benchmarks.serving.load import sequential
from benchmarks.serving.requests import make_requests
from benchmarks.serving.setting import Setting, open_setting

SIZE = 500
WANTED = 2.0


def measure(setting: Setting, rounds: int, number: int) -> list[str]:
    """The page's table."""
    world, server = setting.world, setting.server
    users, items = world.users(300), world.items()
    asked = {
        f"{SIZE} candidates given": make_requests(users, items, SIZE, number, world.as_of),
        f"none given, the best {SIZE} returned": make_requests(users, items, None, number, world.as_of, k=SIZE),
    }
    requests = {name: [request.v1() for request in some] for name, some in asked.items()}
    p50: dict[str, list[float]] = {name: [] for name in requests}
    cpu = dict.fromkeys(requests, 0.0)
    for some in requests.values():
        sequential(server.port, some, 50)
    for _ in range(rounds):
        for name, some in requests.items():
            before = server.cpu_seconds
            measured = sequential(server.port, some, number)
            if measured.failures:
                raise RuntimeError(f"{name}: {measured.failures} requests failed: {measured.refused[:1]}")
            cpu[name] += server.cpu_seconds - before
            p50[name].append(measured.percentile_ms(50))
    lines = ["| request | p50, ms | CPU, ms |", "|---|---:|---:|"]
    for name in requests:
        lines.append(f"| {name} | {min(p50[name]):.2f} | {cpu[name] / (rounds * number) * 1e3:.2f} |")
    given, retrieved = (min(p50[name]) for name in requests)
    ratio = retrieved / given
    return [
        *lines,
        "",
        f"Retrieving from {len(items):,} items and ranking {SIZE} takes {ratio:.2f} times as long as ranking {SIZE} "
        f"given (wanted: at most {WANTED:g}: {'met' if ratio <= WANTED else '**missed**'}). Best of {rounds} rounds of "
        f"{number} requests. The server's memory: {server.rss_mib:,.0f} MiB.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="keeps the simulated world for the next run")
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--model", default="deepfm")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    begun = time.monotonic()
    with open_setting(
        arguments.work, model=arguments.model, retriever="two_tower", num_items=arguments.items
    ) as setting:
        lines = [
            f"# A large catalogue: {arguments.model} behind two_tower, {hardware()}",
            "",
            *measure(setting, arguments.rounds, arguments.requests),
        ]
    print("\n".join(lines), f"\n{time.monotonic() - begun:.0f} s in all")
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
