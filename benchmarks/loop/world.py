"""What fourteen days of a world cost apart from the server, by requests a day and by size of the catalogue.

    python benchmarks/loop/world.py [--out benchmarks/loop/world.md]

The days are lived and written by `simulator.days`; everybody is shown the same items, so no model takes part. Every
world runs in a process of its own, on one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

WORLDS = ((500, 1_000), (500, 3_000), (500, 12_000), (5_000, 3_000))
"""Items, requests a day."""
LIVE = textwrap.dedent("""\
    import json, resource, sys, time
    from pathlib import Path
    import pyarrow as pa
    from evergreen.simulator.asking import Served
    from evergreen.simulator.config import SimulatorConfig
    from evergreen.simulator.days import Day, write_day
    from evergreen.simulator.visits import VisitPlan, Visits
    pa.set_cpu_count(1)
    items, requests, out = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    plan = VisitPlan(log=SimulatorConfig(num_items=items, num_users=4 * items), requests_per_day=requests)
    begun = time.process_time()
    visits = Visits(plan, num_days=14)
    made = time.process_time() - begun
    oldest = visits.world.items.published.argsort()[:plan.k]
    shown = tuple(visits.world.items.ids[oldest].tolist())
    asked = days = truth = 0.0
    for day in range(14):
        start = time.process_time()
        requests = visits.day(day)
        served = [Served(ask.request_id, ask.candidates or shown, "fixed") for ask in requests.asks]
        pages = [answer.item_ids for answer in served]
        before = time.process_time()
        outcomes = visits.respond(requests, pages)
        first = time.process_time() - before
        lived = time.process_time() - start
        visits.respond(requests, pages)  # the truth of a day is there now
        truth += first - (time.process_time() - start - lived)
        start = time.process_time()
        write_day(visits, Day(requests, served, outcomes), out)
        days += lived + time.process_time() - start
        asked += len(served)
    print(json.dumps({
        "requests": asked,
        "made_s": made,
        "days_s": days,
        "truth_s": truth,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }))
    """)
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def measure(num_items: int, requests_per_day: int) -> dict[str, float]:
    """Live in one world in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", LIVE, str(num_items), str(requests_per_day), f"{folder}/world"]
        run = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | ONE_THREAD)
    result: dict[str, float] = json.loads(run.stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    lines = [
        f"# Fourteen days of a world, ten items a page, four users an item, one thread, {platform.machine()}, "
        f"Python {platform.python_version()}",
        "",
        "Of the CPU of the days, the truth to compare with (the best page and a random one for each request) takes the "
        "share named; it grows with the catalogue, the rest does not.",
        "",
        "| items at first | requests a day | CPU s to make it | CPU s of 14 days | of it truth | CPU ms a request | "
        "against the first | peak RSS MiB |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    first: float | None = None
    for num_items, requests_per_day in WORLDS:
        result = measure(num_items, requests_per_day)
        each = 1_000 * result["days_s"] / result["requests"]
        first = each if first is None else first
        lines.append(
            f"| {num_items:,} | {requests_per_day:,} | {result['made_s']:.1f} | {result['days_s']:.1f} | "
            f"{result['truth_s'] / result['days_s']:.0%} | {each:.2f} | {each / first:.2f} | "
            f"{result['peak_mib']:.0f} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    if out is not None:
        out.write_text(text)


if __name__ == "__main__":
    main()
