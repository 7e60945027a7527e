"""Ingest of a CSV log of ten columns: wall time, peak memory and rows per second, by size and by order of the rows.

    python benchmarks/ingest.py [--rows 1000000 10000000] [--out benchmarks/ingest.md]

Every ingest runs in a process of its own, so that its peak resident memory is its own.
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

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

MAPPING = textwrap.dedent("""\
    name = "bench"
    kind = "impressions"
    [timestamp]
    column = "timestamp"
    unit = "ms"
    [columns]
    user_id = "user"
    item_id = "item"
    request_id = "request"
    category = "category"
    position = "position"
    [label]
    column = "click"
    [item_features]
    price = "numeric"
    [context_features]
    device = "categorical"
    country = "categorical"
    """)
INGEST = textwrap.dedent("""\
    import json, resource, sys, time
    from pathlib import Path
    from evergreen.contracts.mapping import Mapping
    from evergreen.ingest.log import ingest_log
    mapping, data, out = sys.argv[1:]
    wall, cpu = time.perf_counter(), time.process_time()
    snapshot = ingest_log(Mapping.load(mapping), data, Path(out))
    print(json.dumps({
        "rows": snapshot.manifest.rows,
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "snapshot": snapshot.id,
    }))
    """)
CHUNK = 500_000


def write_log(path: Path, num_rows: int, *, shuffled: bool) -> None:
    """Write a log of a month, in a stream; shuffled: any row may have any time."""
    generator = np.random.default_rng(0)
    words = {
        "category": np.array([f"category-{i}" for i in range(30)]),
        "device": np.array(["phone", "tablet", "desktop"]),
        "country": np.array(["DE", "FR", "US", "JP", "BR"]),
    }
    writer = None
    for start in range(0, num_rows, CHUNK):
        n = min(CHUNK, num_rows - start)
        when = generator.integers(0, num_rows, n) if shuffled else np.arange(start, start + n)
        rows = pa.table(
            {
                "timestamp": 1_700_000_000_000 + when * (30 * 86_400_000 // num_rows),
                "request": [f"r{i}" for i in range(start // 5, start // 5 + n)],
                "user": [f"u{i}" for i in generator.integers(0, 500_000, n)],
                "item": [f"i{i}" for i in generator.integers(0, 50_000, n)],
                "position": generator.integers(0, 10, n),
                "click": (generator.random(n) < 0.02).astype(np.int8),
                "price": np.round(generator.random(n) * 100, 2),
                **{name: pa.array(values[generator.integers(0, len(values), n)]) for name, values in words.items()},
            }
        )
        options = pa_csv.WriteOptions(quoting_style="needed", include_header=start == 0)
        if writer is None:
            writer = path.open("wb")
        pa_csv.write_csv(rows, writer, options)
    if writer is not None:
        writer.close()


def measure(folder: Path, num_rows: int, *, shuffled: bool) -> dict[str, float]:
    """Ingest one log in a fresh process."""
    log, mapping = folder / "log.csv", folder / "mapping.toml"
    write_log(log, num_rows, shuffled=shuffled)
    mapping.write_text(MAPPING)
    command = [sys.executable, "-c", INGEST, str(mapping), str(log), str(folder / "snapshot")]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {"order": "shuffled" if shuffled else "by time", "csv_mib": log.stat().st_size / 2**20, **result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    lines = [
        f"# Ingest, {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "",
        "| rows | order | CSV MiB | wall s | CPU s | rows/s wall | rows/s CPU | peak RSS MiB |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    print("\n".join(lines))
    for num_rows in arguments.rows:
        for shuffled in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                r = measure(Path(folder), num_rows, shuffled=shuffled)
            lines.append(
                f"| {r['rows']:,} | {r['order']} | {r['csv_mib']:.0f} | {r['wall_s']:.1f} | {r['cpu_s']:.1f} "
                f"| {r['rows'] / r['wall_s']:,.0f} | {r['rows'] / r['cpu_s']:,.0f} | {r['peak_mib']:.0f} |"
            )
            print(lines[-1], flush=True)
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
