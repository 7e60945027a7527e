"""The feature stage on DuckDB and on Spark: CPU, time and memory of a whole log, and of its last day anew.

    python benchmarks/spark.py [--events 1000000] [--master local[2]] [--driver-memory 4g] [--out benchmarks/spark.md]

Both engines run `evergreen features` on the same simulated log, one after the other, each in a process of its own;
figures are of that process and all that it starts, Java too. The tables must be equal.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow.dataset as ds

from evergreen.contracts.feature_tables import JOIN_KEYS, FeatureTables
from evergreen.contracts.mapping import Mapping
from evergreen.contracts.snapshot import Snapshot
from evergreen.ingest.log import ingest_log
from evergreen.simulator.config import SimulatorConfig
from evergreen.simulator.log import simulate_log

NUM_DAYS = 30
SAMPLES_A_SECOND = 10


@dataclass(frozen=True)
class Cost:
    wall_s: float
    cpu_s: float
    peak_mib: float


def run(arguments: list[str]) -> Cost:
    """Run a command, and watch it and its children: those that nobody waits for are in no one's accounts."""
    started = time.perf_counter()
    seconds: dict[int, float] = {}
    peak = 0
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL) as process:
        tree = psutil.Process(process.pid)
        while process.poll() is None:
            memory = 0
            try:
                members = [tree, *tree.children(recursive=True)]
            except psutil.NoSuchProcess:
                break
            for member in members:
                try:
                    times = member.cpu_times()
                    memory += member.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
                seconds[member.pid] = times.user + times.system
            peak = max(peak, memory)
            time.sleep(1 / SAMPLES_A_SECOND)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)}: exit status {process.returncode}")
    return Cost(time.perf_counter() - started, sum(seconds.values()), peak / 2**20)


def make_snapshot(num_events: int, work: Path) -> Snapshot:
    scale = max(1, num_events // 300_000)
    config = SimulatorConfig(
        num_users=2_000 * scale, num_items=500 * scale, num_days=NUM_DAYS, events_per_day=num_events // NUM_DAYS
    )
    simulate_log(config, work / "log")
    return ingest_log(Mapping.load("simulated"), str(work / "log"), work / "snapshot")


def equal(left: FeatureTables, right: FeatureTables) -> bool:
    for name, keys in JOIN_KEYS.items():
        order = [(key, "ascending") for key in (*keys, "event_timestamp")]
        one, other = (
            ds.dataset(tables.table(name), format="parquet", schema=tables.schema(name)).to_table().sort_by(order)
            for tables in (left, right)
        )
        if not one.equals(other):
            return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--master", default="local[2]")
    parser.add_argument("--driver-memory", default="4g")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    engines = {
        "duckdb": ["--engine", "duckdb"],
        "spark": [
            *("--engine", "spark", "--master", arguments.master),
            *("--spark-setting", f"spark.driver.memory={arguments.driver_memory}"),
        ],
    }
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        snapshot = make_snapshot(arguments.events, work)
        last_day = str(snapshot.manifest.last_event.date())
        costs: dict[tuple[str, str], Cost] = {}
        for engine, options in engines.items():
            command = [sys.executable, "-m", "evergreen.cli", "features", "--snapshot", str(snapshot.path), *options]
            command += ["--out", str(work / engine)]
            costs[engine, "all"] = run(command)
            costs[engine, "last"] = run([*command, "--from", last_day, "--to", last_day])
        tables = {engine: FeatureTables.load(work / engine) for engine in engines}
        same = equal(*tables.values())
        rows = sum(tables["duckdb"].manifest.rows.values())
    names = {"duckdb": "DuckDB", "spark": f"Spark {arguments.master}"}
    lines = [
        f"# The feature stage by engine, {psutil.cpu_count()} cores, {platform.machine()}, "
        f"Python {platform.python_version()}",
        "",
        f"{snapshot.manifest.rows:,} events of {NUM_DAYS} days, {rows:,} rows of features; "
        f"the tables are {'equal' if same else 'NOT EQUAL'}.",
        "",
        "| | dates | wall s | CPU s | peak MiB | CPU against DuckDB, all dates |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for (engine, dates), cost in costs.items():
        ratio = cost.cpu_s / costs["duckdb", "all"].cpu_s
        lines.append(
            f"| {names[engine]} | {dates} | {cost.wall_s:.1f} | {cost.cpu_s:.1f} | {cost.peak_mib:,.0f} | {ratio:.1f} |"
        )
    lines += ["", "With the start of the process, of Java and of Spark; `last` computes the last day of the log anew."]
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
