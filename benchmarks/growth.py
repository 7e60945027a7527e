"""How the data path grows: ingest → feature tables → training set → materialize, at one size of the log after another.

    python benchmarks/growth.py [--events 1000000 3000000 10000000] [--engine duckdb|spark] [--work DIR]
        [--out benchmarks/growth.md]

A log of ten times the events has ten times the users over the same month. Every stage runs in a process of its own:
CPU and wall seconds are those of its work, without imports; the peak is that of the whole process. With `--engine
spark` the feature tables are built by `evergreen features --engine spark`, measured from outside with all its
processes, start of the Java machine included. A size that is in --work already is not simulated again.
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
import time
from pathlib import Path

import psutil

NUM_DAYS, EVENTS_A_USER, NUM_ITEMS = 30, 150, 2_000
SIMULATE = f"""
    from evergreen.simulator.config import SimulatorConfig
    from evergreen.simulator.log import simulate_log
    def run(events={{events}}, days={NUM_DAYS}):
        config = SimulatorConfig(
            num_days=days, events_per_day=events // days, num_users=events // {EVENTS_A_USER}, num_items={NUM_ITEMS}
        )
        simulate_log(config, work / "log")
    """
STAGES = {
    "ingest": """
        from evergreen.contracts.mapping import Mapping
        from evergreen.ingest.log import ingest_log
        mapping = Mapping.load("simulated")
        run = lambda: ingest_log(mapping, str(work / "log"), work / "snapshot").manifest.rows
        """,
    "features": """
        from evergreen.contracts.snapshot import Snapshot
        from evergreen.features.tables import build_feature_tables
        snapshot = Snapshot.load(work / "snapshot")
        run = lambda: sum(build_feature_tables(snapshot, work / "tables").manifest.rows.values())
        """,
    "training set": """
        from evergreen.contracts.feature_tables import FeatureTables
        from evergreen.contracts.snapshot import Snapshot
        from evergreen.features.store import FeatureStore
        from evergreen.training.dataset import build_training_set
        snapshot, tables = Snapshot.load(work / "snapshot"), FeatureTables.load(work / "tables")
        store = FeatureStore.create(work / "store", tables)
        def run():
            manifest = build_training_set(snapshot, tables, store, work / "training_set").manifest
            return sum(split.rows for split in manifest.splits.values())
        """,
    "materialize": """
        from evergreen.features.store import FeatureStore
        store = FeatureStore.open(work / "store")
        run = lambda: store.materialize(store.tables.manifest.as_of)
        """,
}
MEASURE = """
import json, resource, sys, time
from pathlib import Path
work = Path(sys.argv[1])
{stage}
wall, cpu = time.perf_counter(), time.process_time()
rows = run()
print(json.dumps(dict(
    wall_s=time.perf_counter() - wall,
    cpu_s=time.process_time() - cpu,
    peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    rows=rows if isinstance(rows, int) else None,
)))
"""
Result = dict[str, float | None]


def run_stage(code: str, work: Path) -> Result:
    """Run a stage in a fresh process; it measures itself."""
    command = [sys.executable, "-W", "ignore", "-c", MEASURE.format(stage=textwrap.dedent(code)), str(work)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return result


def run_spark(work: Path) -> Result:
    """Build the feature tables by Spark, and watch all processes of the command."""
    command = [sys.executable, "-W", "ignore", "-m", "evergreen.cli", "features", "--engine", "spark"]
    started = time.perf_counter()
    process = psutil.Popen([*command, "--snapshot", str(work / "snapshot"), "--out", str(work / "tables")])
    cpu: dict[int, float] = {}
    peak = 0.0
    while process.poll() is None:
        held = 0
        for one in [process, *process.children(recursive=True)]:
            try:
                times = one.cpu_times()
                held += one.memory_info().rss
            except psutil.Error:
                continue  # it ended since it was listed
            cpu[one.pid] = times.user + times.system
        peak = max(peak, held / 2**20)
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"evergreen features --engine spark ended with status {process.returncode}")
    rows = json.loads((work / "tables" / "manifest.json").read_text())["rows"]
    return {
        "wall_s": time.perf_counter() - started,
        "cpu_s": sum(cpu.values()),
        "peak_mib": peak,
        "rows": sum(rows.values()),
    }


def measure(work: Path, events: int, engine: str) -> dict[str, Result]:
    """All stages at one size."""
    if not (work / "log" / "events").exists():
        run_stage(SIMULATE.format(events=events), work)
    results = {}
    for name, code in STAGES.items():
        results[name] = run_spark(work) if (name, engine) == ("features", "spark") else run_stage(code, work)
        print(f"{events:,} {name}", {k: v and round(v, 1) for k, v in results[name].items()}, flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, nargs="+", default=[1_000_000, 3_000_000, 10_000_000])
    parser.add_argument("--engine", choices=["duckdb", "spark"], default="duckdb", help="of the feature tables")
    parser.add_argument("--work", type=Path, help="where the logs and artifacts go; kept. Default: a scratch folder")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    lines = [
        f"# Growth of the data path, features by {arguments.engine}, {os.cpu_count()} cores, {platform.machine()}, "
        f"Python {platform.python_version()}",
        "",
        f"{NUM_DAYS} days, {EVENTS_A_USER} events a user, {NUM_ITEMS:,} items. Growth is against the first size.",
        "",
        "| events | stage | rows out | CPU s | growth | wall s | growth | peak RSS MiB |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    print("\n".join(lines))
    first: dict[str, Result] = {}
    for events in arguments.events:
        with tempfile.TemporaryDirectory() as scratch:
            work = (arguments.work or Path(scratch)) / f"{events}"
            work.mkdir(parents=True, exist_ok=True)
            results = measure(work, events, arguments.engine)
        results["all"] = {
            "cpu_s": sum(of["cpu_s"] for of in results.values()),
            "wall_s": sum(of["wall_s"] for of in results.values()),
            "peak_mib": max(of["peak_mib"] for of in results.values()),
        }
        first = first or results
        for name, of in results.items():
            rows = f"{of['rows']:,}" if of.get("rows") else ""
            growth = {what: of[what] / first[name][what] for what in ("cpu_s", "wall_s")}
            lines.append(
                f"| {events:,} | {name} | {rows} | {of['cpu_s']:.1f} | {growth['cpu_s']:.1f} | {of['wall_s']:.1f} "
                f"| {growth['wall_s']:.1f} | {of['peak_mib']:.0f} |"
            )
            print(lines[-1], flush=True)
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
