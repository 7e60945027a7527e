"""Ten thousand bad requests: each answered with 4xx, soon, and the process none the worse.

    python -m benchmarks.serving.bad_requests --work DIR [--count 10000] [--out benchmarks/serving/bad_requests.md]

The calls are `bad_calls`', one after the other. Between them go connections that are cut off in the middle of a
request, which nobody can answer.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import uvloop

from benchmarks.quality.hardware import hardware
from benchmarks.serving.bad_calls import KINDS, BadCall, bad_calls
from benchmarks.serving.load import ANSWER_SECONDS, NO_ANSWER, Connection, Reply, sequential
from benchmarks.serving.requests import make_requests
from benchmarks.serving.setting import Setting, open_setting

WITHIN_SECONDS = 0.1


@dataclass
class Outcome:
    """What became of the calls.

    Attributes:
        seconds: by kind, how long each answer took.
        statuses: by kind, how many answers of each status.
        wrong: calls that were answered as none may be, with the answer; the first of each kind.
        num_wrong: how many.
        slow: calls that took longer than WITHIN_SECONDS.
    """

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    statuses: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    wrong: dict[str, tuple[BadCall, Reply]] = field(default_factory=dict)
    num_wrong: int = 0
    slow: int = 0

    def add(self, call: BadCall, reply: Reply, seconds: float) -> None:
        """Take note of an answer."""
        self.seconds[call.kind].append(seconds)
        self.statuses[call.kind][reply.status] += 1
        self.slow += seconds > WITHIN_SECONDS
        if not call.is_answered_rightly(reply.status):
            self.num_wrong += 1
            self.wrong.setdefault(call.kind, (call, reply))


async def fire(port: int, calls: Iterable[BadCall]) -> Outcome:
    """Send calls one after the other, over a connection that is kept as long as the server keeps it."""
    outcome = Outcome()
    connection: Connection | None = None
    for call in calls:
        if connection is None or connection.closed:
            connection = await Connection.open("127.0.0.1", port)
        started = time.perf_counter()
        try:
            reply = await asyncio.wait_for(connection.send(call.data), ANSWER_SECONDS)
        except TimeoutError:
            reply = Reply(NO_ANSWER, b"")
            connection.close()
            connection = None
        outcome.add(call, reply, time.perf_counter() - started)
        # Hanging up is seen a turn of the event loop after the answer.
        await asyncio.sleep(0)
    if connection is not None:
        connection.close()
    return outcome


def hang_up(port: int, data: bytes, rng: random.Random) -> None:
    """Send a part of a request and close the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(data[: rng.randrange(1, len(data))])


def measure(setting: Setting, count: int, hang_ups: int) -> list[str]:
    """Fire all of them and look at the server before, between and after."""
    server, users, items = setting.server, setting.world.users(50), setting.world.items()
    good = [asked.v1() for asked in make_requests(users, items, 100, 100, setting.world.as_of)]
    # What a server takes once, for its first bad requests, is no growth.
    uvloop.run(fire(server.port, bad_calls(10 * len(KINDS), seed=1, users=users, items=items)))
    before, sound = server.rss_mib, sequential(server.port, good, 300)
    rng = random.Random(0)
    total, rss = Outcome(), []
    calls = bad_calls(count, users=users, items=items)
    while some := list(itertools.islice(calls, max(1, count // 10))):
        outcome = uvloop.run(fire(server.port, some))
        for kind, seconds in outcome.seconds.items():
            total.seconds[kind] += seconds
            total.statuses[kind] += outcome.statuses[kind]
        total.wrong |= outcome.wrong
        total.num_wrong += outcome.num_wrong
        total.slow += outcome.slow
        for _ in range(hang_ups // 10):
            hang_up(server.port, rng.choice(good), rng)
        rss.append(server.rss_mib)
    after = sequential(server.port, good, 300)
    every = np.concatenate([np.array(seconds) for seconds in total.seconds.values()])
    traces = server.log.read_text().count("Traceback")
    lines = [
        f"{len(every):,} calls of {len(KINDS)} kinds, {hang_ups:,} connections cut off in the middle of a request. "
        f"Answered wrongly: {total.num_wrong}. Later than {WITHIN_SECONDS * 1e3:.0f} ms: {total.slow}; the slowest "
        f"took {every.max() * 1e3:.0f} ms, the median {np.median(every) * 1e3:.2f}.",
        "",
        f"The process is {'alive and ready' if server.alive and server.is_ready() else '**dead**'}; stack traces in "
        f"its log: {traces}. Its memory was {before:.0f} MiB before and {', '.join(f'{mib:.0f}' for mib in rss)} after "
        f"each tenth. Good requests before and after: p50 {sound.percentile_ms(50):.2f} and "
        f"{after.percentile_ms(50):.2f} ms, {sound.failures + after.failures} failed.",
        "",
        "| kind | calls | statuses | p50, ms | slowest, ms |",
        "|---|---:|---|---:|---:|",
    ]
    for kind in KINDS:
        seconds = np.array(total.seconds[kind]) * 1e3
        told = ", ".join(f"{status} × {number:,}" for status, number in sorted(total.statuses[kind].items()))
        lines.append(
            f"| {kind.replace('_', ' ')} | {len(seconds):,} | {told} | {np.median(seconds):.2f} | {seconds.max():.1f} |"
        )
    for kind, (call, reply) in total.wrong.items():
        lines += ["", f"**{kind}**: {reply.status} {reply.body[:200]!r} for `{call.data[:600]!r}`"]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="keeps the simulated world for the next run")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--hang-ups", type=int, default=500)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with open_setting(arguments.work) as setting:
        lines = [f"# Bad requests: {hardware()}", "", *measure(setting, arguments.count, arguments.hang_ups)]
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
