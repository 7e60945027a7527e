"""Redis killed, restarted and frozen under load: what requests see of it.

    python -m benchmarks.serving.redis_outage --work DIR [--phase-seconds 8] [--out benchmarks/serving/redis_outage.md]

Eight clients ask all the while, 100 candidates a request. Redis (with its append-only file, so that it comes back with
what it held) is killed by `kill -9`, started again, stopped by SIGSTOP, so that it takes connections and answers
nothing, and continued. The server is to answer every request, without the user's features while they cannot be had, to
say so (`degraded`), and to have them again within five seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import redis
import uvloop

from benchmarks.quality.hardware import hardware
from benchmarks.serving.load import Measured, run_load
from benchmarks.serving.requests import make_requests
from benchmarks.serving.setting import Setting, open_setting

CLIENTS = 8
BACK_WITHIN_SECONDS = 5.0
_BUCKET_SECONDS = 0.5
_DEGRADED = b'"degraded":true'


@dataclass(frozen=True)
class Phase:
    """A stretch of the run, in seconds on the monotonic clock. `is_up`: whether Redis answers in it."""

    name: str
    is_up: bool
    start: float


async def run(setting: Setting, phase_seconds: float) -> tuple[Measured, list[Phase]]:
    """Load, and what happens to Redis meanwhile."""
    world, port = setting.world, setting.redis.port
    asked = make_requests(world.users(300), world.items(), 100, 1_000, world.as_of)
    requests = [request.v1() for request in asked]
    await run_load(setting.server.port, requests, clients=CLIENTS, number=500)
    load = asyncio.create_task(
        run_load(setting.server.port, requests, clients=CLIENTS, seconds=5 * phase_seconds, marker=_DEGRADED)
    )
    phases = [Phase("before", True, time.perf_counter())]

    async def wait() -> None:
        await asyncio.sleep(phases[0].start + len(phases) * phase_seconds - time.perf_counter())

    await wait()
    phases.append(Phase("killed", False, time.perf_counter()))
    await asyncio.to_thread(setting.redis.stop)
    await wait()
    await asyncio.to_thread(setting.redis.start)
    phases.append(Phase("started again", True, time.perf_counter()))
    pid = redis.Redis(port=port).info("server")["process_id"]
    await wait()
    phases.append(Phase("frozen", False, time.perf_counter()))
    os.kill(pid, signal.SIGSTOP)
    try:
        await wait()
    finally:
        os.kill(pid, signal.SIGCONT)
    phases.append(Phase("continued", True, time.perf_counter()))
    return await load, phases


def report(measured: Measured, phases: list[Phase]) -> list[str]:
    """By phase, then by half second."""
    ends = [*(phase.start for phase in phases[1:]), float("inf")]
    lines = [
        "| Redis | requests | failed | degraded | p50, ms | p99, ms | slowest, ms | last degraded answer after |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    met = measured.failures == 0
    for phase, end in zip(phases, ends, strict=True):
        ended = measured.started + measured.seconds
        if phase.is_up:
            inside = (measured.started >= phase.start) & (ended < end)
        else:  # what is under way when Redis goes, or comes back, is of the time without it
            inside = (measured.started < end) & (ended >= phase.start)
        seconds, degraded = measured.seconds[inside] * 1e3, measured.marked[inside]
        last = 0.0
        if degraded.any():
            last = float(ended[inside][degraded].max()) - phase.start
        if phase.is_up:
            met &= last <= BACK_WITHIN_SECONDS
        p50, p99, slowest = np.percentile(seconds, [50, 99, 100])
        failed = int((measured.status[inside] != 200).sum())
        lines.append(
            f"| {phase.name} | {len(seconds):,} | {failed} | {degraded.mean():.1%} | {p50:.2f} | {p99:.2f} "
            f"| {slowest:.0f} | {f'{last:.2f} s' if phase.is_up else '–'} |"
        )
    lines += [
        "",
        f"{len(measured.seconds):,} requests, {measured.failures} failed. Wanted: none, and no degraded answer later "
        f"than {BACK_WITHIN_SECONDS:g} s after Redis is back: {'met' if met else '**missed**'}.",
        "",
        "Share of degraded answers by half second: "
        + ", ".join(f"{share:.0%}" for share in _shares(measured, phases[0].start))
        + ".",
    ]
    return [*lines, *(f"\nFailed: {reply.status} {reply.body[:200]!r}" for reply in measured.refused)]


def _shares(measured: Measured, start: float) -> list[float]:
    bucket = ((measured.started - start) // _BUCKET_SECONDS).astype(int)
    return [float(measured.marked[bucket == b].mean()) for b in range(bucket.max() + 1) if (bucket == b).any()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="keeps the simulated world for the next run")
    parser.add_argument("--phase-seconds", type=float, default=8)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    persistent = ("--appendonly", "yes", "--appendfsync", "always")
    with open_setting(arguments.work, redis_options=persistent) as setting:
        measured, phases = uvloop.run(run(setting, arguments.phase_seconds))
    lines = [f"# Redis away: {hardware()}", "", *report(measured, phases)]
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
