"""A minute of load, and two hundred thousand requests.

    python -m benchmarks.serving.endurance --work DIR [--seconds 60] [--requests 200000] [--out …/endurance.md]

The minute: 8 clients, 100 candidates, other users and candidates each time; how many requests fail, and how far the
slow ones are from the middle.

The many: 8 clients, in parts. A part holds V1, V2 JSON and V2 binary calls with candidates, some without (the whole
catalogue), and users that nobody has seen, a new one each time, so that whatever the server keeps by user or by item
gets its chance to grow. After each part the server's resident memory is read. Its slope is fitted to the last three
quarters: what a server takes when it is young is no leak.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.quality.hardware import hardware
from benchmarks.serving.load import Measured, closed_loop
from benchmarks.serving.requests import Asked, make_requests
from benchmarks.serving.setting import Setting, open_setting

CLIENTS = 8
PART = 5_000
P99_OF_P50 = 6.0


def minute(setting: Setting, seconds: float) -> list[str]:
    """Steady load."""
    world = setting.world
    requests = [asked.v1() for asked in make_requests(world.users(500), world.items(), 100, 2_000, world.as_of)]
    closed_loop(setting.server.port, requests, clients=CLIENTS, number=500)
    measured = closed_loop(setting.server.port, requests, clients=CLIENTS, seconds=seconds)
    p50, p99 = measured.percentile_ms(50), measured.percentile_ms(99)
    met = measured.failures == 0 and p99 <= P99_OF_P50 * p50
    return [
        f"{CLIENTS} clients for {seconds:.0f} s, 100 candidates: {len(measured.seconds):,} requests, "
        f"{measured.per_second:,.0f} a second, {measured.failures} failed. p50 {p50:.2f} ms, p99 {p99:.2f} ms: "
        f"{p99 / p50:.1f} times (wanted: none failed, at most {P99_OF_P50:g} times: {'met' if met else '**missed**'}); "
        f"slowest {measured.percentile_ms(100):.0f} ms.",
        *_told(measured),
    ]


def parts(setting: Setting, number: int) -> Iterator[list[bytes]]:
    """Requests of every kind, none of them twice."""
    world = setting.world
    users, items = world.users(10_000), world.items()
    writers = (Asked.v1, Asked.v2_json, Asked.v2_binary)
    for part in range(-(-number // PART)):
        asked = make_requests(users, items, 100, PART, world.as_of, seed=part)
        for place in range(0, PART, 10):  # a stranger
            asked[place] = replace(asked[place], user_id=f"stranger-{part}-{place}")
        for place in range(5, PART, 50):  # the whole catalogue
            asked[place] = replace(asked[place], candidates=None, k=20)
        yield [writers[place % len(writers)](request) for place, request in enumerate(asked)]


def many(setting: Setting, number: int) -> list[str]:
    """Memory over many requests."""
    server = setting.server
    counts, rss, failures, refused = [0], [server.rss_mib], 0, []
    medians = []
    for requests in parts(setting, number):
        measured = closed_loop(server.port, requests, clients=CLIENTS, number=len(requests))
        failures += measured.failures
        refused += _told(measured)
        medians.append(measured.percentile_ms(50))
        counts.append(counts[-1] + len(requests))
        rss.append(server.rss_mib)
    late = len(counts) // 4
    slope, _ = np.polyfit(np.array(counts[late:]) / 1e5, rss[late:], 1)
    quarter = [f"{counts[place]:,}: {rss[place]:.1f}" for place in range(0, len(counts) - 1, max(1, len(counts) // 8))]
    return [
        f"{counts[-1]:,} requests of all kinds: {failures} failed; p50 {medians[0]:.2f} ms in the first "
        f"{PART:,}, {medians[-1]:.2f} in the last. Resident memory over the last three quarters: "
        f"{slope:+.2f} MiB in 100,000 requests, between {min(rss[late:]):.1f} and {max(rss[late:]):.1f} MiB.",
        "",
        f"MiB after so many requests: {'; '.join(quarter)}; {counts[-1]:,}: {rss[-1]:.1f}.",
        *refused[:5],
    ]


def _told(measured: Measured) -> list[str]:
    return [f"Failed: {reply.status} {reply.body[:200]!r}" for reply in measured.refused]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="keeps the simulated world for the next run")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with open_setting(arguments.work) as setting:
        lines = [f"# Endurance: {hardware()}", "", *minute(setting, arguments.seconds), ""]
        lines += many(setting, arguments.requests)
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
