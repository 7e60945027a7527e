"""What an impression costs to simulate, by the length of the log: the cost of a row must not grow with it.

    python benchmarks/simulator.py [--rows 100000 1000000] [--out benchmarks/simulator.md]

Every simulation runs in a process of its own, on one thread, after a small one that loads the libraries.
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

SIMULATE = textwrap.dedent("""\
    import json, resource, sys, time
    from pathlib import Path
    import pyarrow as pa
    from evergreen.simulator.config import SimulatorConfig
    from evergreen.simulator.log import simulate_log
    pa.set_cpu_count(1)
    rows, out = int(sys.argv[1]), Path(sys.argv[2])
    simulate_log(SimulatorConfig(num_days=1, events_per_day=1_000), out / "warm_up")
    wall, cpu = time.perf_counter(), time.process_time()
    simulate_log(SimulatorConfig(num_days=30, events_per_day=rows // 30), out / "log")
    print(json.dumps({
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }))
    """)
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def measure(num_rows: int) -> dict[str, float]:
    """Simulate one log in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", SIMULATE, str(num_rows), folder]
        run = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | ONE_THREAD)
    result: dict[str, float] = json.loads(run.stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000], help="the first is the measure")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    lines = [
        f"# Simulating a log of 2,000 users over 30 days, one thread, {platform.machine()}, "
        f"Python {platform.python_version()}",
        "",
        "| rows | wall s | CPU s | rows/s CPU | CPU a row, against the first | peak RSS MiB |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    print("\n".join(lines))
    first = 0.0
    for num_rows in arguments.rows:
        result = measure(num_rows)
        first = first or result["cpu_s"] / num_rows
        lines.append(
            f"| {num_rows:,} | {result['wall_s']:.1f} | {result['cpu_s']:.1f} | {num_rows / result['cpu_s']:,.0f} "
            f"| {result['cpu_s'] / num_rows / first:.2f} | {result['peak_mib']:.0f} |"
        )
        print(lines[-1], flush=True)
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
