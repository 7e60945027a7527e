"""The drift gate: what it costs, how often it is wrong, and what it sees; Evidently's default preset on the same rows.

    python benchmarks/loop/drift_gate.py [--out benchmarks/loop/drift_gate.md]

Rows are simulated: 30 columns (20 numbers, of which 5 are skewed and 5 have missing values and a pile of zeros, and 10
categories), 10 rows a user on average, some users with a hundred. Half of a number's variance lies between users, and
each user has favourite categories. A world without drift draws other users for each window.
"""

from __future__ import annotations

import argparse
import platform
import time
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa

from evergreen.contracts.monitoring_report import DriftStatus
from evergreen.monitoring.gate import TRAINING, drift_gate
from evergreen.monitoring.profile import Profile, fit_cells, make_profile

NUM_NUMBERS, NUM_CATEGORIES = 20, 10
ROWS_A_USER = 10
BETWEEN_USERS = 0.5
REFERENCE_ROWS = 100_000
SHIFT, NUM_SHIFTED = 0.3, 3


def draw(rows: int, rng: np.random.Generator, shifted: tuple[int, ...] = ()) -> pa.Table:
    """Rows of other users; the numbers in `shifted` lie SHIFT standard deviations higher."""
    sizes = np.minimum(rng.geometric(0.5, rows) * rng.choice([2, 4, 20], rows, p=[0.5, 0.35, 0.15]), 100)
    users = np.repeat(np.arange(rows), sizes)[:rows]
    num_users = users[-1] + 1
    columns: dict[str, np.ndarray | pa.Array] = {
        "user_id": pa.array([f"u{rng.integers(2**40)}" for _ in range(num_users)])
    }
    columns["user_id"] = columns["user_id"].take(pa.array(users))
    for place in range(NUM_NUMBERS):
        of_user = rng.normal(size=num_users)[users]
        values = np.sqrt(BETWEEN_USERS) * of_user + np.sqrt(1 - BETWEEN_USERS) * rng.normal(size=rows)
        values += SHIFT * (place in shifted)
        if place % 4 == 1:
            values = np.exp(values)
        if place % 4 == 2:
            values = np.where(values < -0.5, 0.0, values)
            columns[f"number_{place}"] = pa.array(values, mask=rng.random(rows) < 0.1)
        else:
            columns[f"number_{place}"] = values
    for place in range(NUM_CATEGORIES):
        num_values = (3, 10, 40)[place % 3]
        favourite = rng.integers(num_values, size=num_users)[users]
        other = np.minimum(rng.geometric(3 / num_values, rows) - 1, num_values - 1)
        codes = np.where(rng.random(rows) < 0.4, favourite, other)
        columns[f"category_{place}"] = pa.array([f"v{i}" for i in range(num_values)]).take(pa.array(codes))
    return pa.table(columns)


def judge(window: pa.Table, reference: Profile) -> DriftStatus:
    """What the gate says of a window."""
    return drift_gate(make_profile([window], reference.cells), {TRAINING: reference}).status


def evidently_columns(window: pa.Table, reference: pa.Table) -> int:
    """How many columns Evidently's preset, as it comes, calls drifted."""
    from evidently import DataDefinition, Dataset, Report
    from evidently.presets import DataDriftPreset

    names = [name for name in window.column_names if name != "user_id"]
    definition = DataDefinition(
        numerical_columns=[name for name in names if name.startswith("number")],
        categorical_columns=[name for name in names if name.startswith("category")],
    )
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        snapshot = Report([DataDriftPreset()]).run(
            *(Dataset.from_pandas(t.select(names).to_pandas(), data_definition=definition) for t in (window, reference))
        )
    count = next(m for m in snapshot.dict()["metrics"] if "DriftedColumnsCount" in m["metric_name"])
    return int(count["value"]["count"])


def cost(num_rows: int, rng: np.random.Generator, with_evidently: bool) -> str:
    """A line of the table of costs."""
    reference, window = draw(num_rows, rng), draw(num_rows, rng)
    started = time.process_time()
    profile = make_profile([reference], fit_cells(reference.drop_columns(["user_id"])))
    fitted = time.process_time()
    drift_gate(make_profile([window], profile.cells), {TRAINING: profile})
    judged = time.process_time()
    evidently = "not run"
    if with_evidently:
        evidently_columns(window, reference)
        seconds = time.process_time() - judged
        evidently = f"{seconds:.1f} ({seconds / (judged - fitted):.0f} ×)"
    return f"| {num_rows:,} | {fitted - started:.2f} | {judged - fitted:.2f} | {evidently} |"


def error_rates(num_rows: int, num_windows: int, num_evidently: int, rng: np.random.Generator) -> list[str]:
    """Lines of the tables of alarms: the gate and Evidently without drift, and with it."""
    rows = draw(REFERENCE_ROWS, rng)
    reference = make_profile([rows], fit_cells(rows.drop_columns(["user_id"])))
    small = draw(num_rows, rng)
    without, pairs = [], []
    theirs: dict[bool, list[int]] = {False: [], True: []}
    for number in range(num_windows):
        window = draw(num_rows, rng)
        without.append(judge(window, reference))
        if number < num_evidently:
            theirs[False].append(evidently_columns(window, small))
        if number % 5 == 0:  # a fifth as many pairs of windows with drift
            shifted = tuple(rng.choice(NUM_NUMBERS, NUM_SHIFTED, replace=False))
            windows = [draw(num_rows, rng, shifted) for _ in range(2)]
            pairs.append([judge(window, reference) is DriftStatus.DRIFTED for window in windows])
            if len(theirs[True]) < num_evidently:
                theirs[True].append(evidently_columns(windows[0], small))
    seen = np.array(pairs)
    head = f"| {num_rows:,} rows, {len(small['user_id'].unique()):,} users |"
    false, undecided = (np.mean([s is kind for s in without]) for kind in (DriftStatus.DRIFTED, DriftStatus.UNKNOWN))
    lines = [
        f"{head} the gate | {false:.1%} of {num_windows:,} | {undecided:.0%} | {seen[:, 0].mean():.1%} of {len(seen)} "
        f"| {seen.any(axis=1).mean():.1%} |"
    ]
    if not num_evidently:
        return lines
    half = (NUM_NUMBERS + NUM_CATEGORIES) / 2
    for name, least in (("Evidently, any column", 1), ("Evidently, half of the columns", half)):
        no_drift, drift = (np.mean(np.array(theirs[kind]) >= least) for kind in (False, True))
        lines.append(f"{head} {name} | {no_drift:.0%} of {num_evidently} | | {drift:.0%} of {len(theirs[True])} | |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=1000)
    parser.add_argument("--evidently-windows", type=int, default=6)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    evidently_columns(draw(300, rng), draw(300, rng))  # its import is not what is measured
    lines = [
        f"# The drift gate: {NUM_NUMBERS + NUM_CATEGORIES} columns, {platform.machine()}, "
        f"Python {platform.python_version()}",
        "",
        "CPU seconds. The reference is profiled once and kept; a window is profiled and compared.",
        "",
        "| rows of each | reference | window | Evidently's preset |",
        "|---:|---:|---:|---:|",
        *(cost(rows, rng, rows <= 100_000) for rows in (10_000, 100_000, 1_000_000)),
        "",
        f"Windows of other users against a reference of {REFERENCE_ROWS:,} rows. Drift: {NUM_SHIFTED} of the "
        f"{NUM_NUMBERS} numbers moved by {SHIFT} standard deviations. Evidently's "
        "reference is as large as the window.",
        "",
        "| window | method | alarms without drift | undecided | drift seen at once | within two windows |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for num_rows, share, with_evidently in (
        (1_000, 10, True),
        (2_500, 4, False),
        (5_000, 1, True),
        (20_000, 10, False),
    ):
        num_evidently = arguments.evidently_windows if with_evidently else 0
        lines += error_rates(num_rows, arguments.windows // share, num_evidently, rng)
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
