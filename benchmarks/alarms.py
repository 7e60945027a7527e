"""Alarms on labelled series of the ad exchange (Numenta Anomaly Benchmark): windows found, false alarms, delay.

    python benchmarks/alarms.py --nab DIR [--out benchmarks/alarms.md]

DIR holds NAB's data/ and labels/. A window counts when the series can raise an alarm by its end, that is after the warm
up. An alarm outside of all windows is false. Delay: hours from the labelled moment to the first score above the
threshold in its window, which may lie before it. Then the same on series in which nothing ever happens.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from evergreen.monitoring.alarms import AlarmConfig, Judgement, find_alarms

WEEK = 7 * 86_400
QUIET_SEEDS, QUIET_WEEKS = 6, 26


@dataclass(frozen=True)
class Result:
    """What was found in one series."""

    found: int
    judged: int
    """Windows that an alarm was possible in."""
    early: int
    """Windows that were over before the first alarm was possible."""
    false_alarms: int
    weeks: float
    """Outside of windows, after the warm up."""
    delays: list[float]
    """Hours, of the windows that were found."""


def read_series(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """(n,) seconds and (n,) values."""
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    return np.array([seconds(row["timestamp"]) for row in rows]), np.array([float(row["value"]) for row in rows])


def seconds(text: str) -> int:
    """Of a time in UTC without an offset."""
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())


def compare(times: np.ndarray, judgement: Judgement, windows: list[list[str]], labels: list[str]) -> Result:
    """Alarms against labelled windows."""
    above, inside = judgement.above, np.zeros(len(times), dtype=bool)
    start = times[np.flatnonzero(np.isfinite(judgement.thresholds))[0]]
    found = judged = early = 0
    delays = []
    for (first, last), label in zip(windows, labels, strict=True):
        within = (times >= seconds(first)) & (times <= seconds(last))
        inside |= within
        if times[within].max() < start:
            early += 1
            continue
        judged += 1
        if (above & within).any():
            found += 1
            delays.append((times[above & within][0] - seconds(label)) / 3_600)
    false_alarms = 0
    for alarm in judgement.alarms:
        stretch = (times >= alarm.start.timestamp()) & (times <= alarm.end.timestamp())
        false_alarms += not (stretch & inside).any()
    weeks = float((~inside & (times >= start)).sum()) * 3_600 / WEEK
    return Result(found, judged, early, false_alarms, weeks, delays)


def quiet_series(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Half a year of hourly click rates with a day, a week, a slow drift and autocorrelated, heavy-tailed noise."""
    rng = np.random.default_rng(seed)
    hours = np.arange(QUIET_WEEKS * 168)
    noise = 0.1 * rng.standard_t(5, len(hours))
    for i in range(1, len(noise)):
        noise[i] += 0.5 * noise[i - 1]
    season = 0.4 * np.sin(2 * np.pi * hours / 24) + 0.15 * (hours // 24 % 7 >= 5)
    drift = np.cumsum(rng.normal(0, 0.004, len(hours)))
    return hours * 3_600, 0.02 * np.exp(season + drift + noise)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nab", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    windows, labels = (
        json.loads((arguments.nab / "labels" / f"combined_{name}.json").read_text()) for name in ("windows", "labels")
    )
    names = sorted(name for name in windows if name.startswith("realAdExchange/"))
    lines = [
        "# Alarms on six ad-exchange series with labelled anomalies (NAB), hourly, ten weeks each",
        "",
        "`benchmarks/alarms.py`. Each value is judged by those before it; no setting was fitted to the labels but the",
        "rate of false alarms, which is what the caller asks for. Promise: at most so many false alarms a week.",
        "",
        "| promise a week | windows found | over before the warm up | false alarms | a week | median delay, hours |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for promise in (0.25, 0.5, 1.0, 2.0):
        config = AlarmConfig(max_false_alarms_per_week=promise)
        results = []
        for name in names:
            times, values = read_series(arguments.nab / "data" / name)
            results.append(compare(times, find_alarms(times, values, config), windows[name], labels[name]))
        lines.append(_row(promise, results))
    lines += [
        "",
        f"## Series in which nothing happens: {QUIET_SEEDS} of {QUIET_WEEKS} weeks",
        "",
        "Day, week, slow drift, and noise with heavy tails that depends on the hour before.",
        "",
        "| promise a week | false alarms a week | CPU ms a value |",
        "|---:|---:|---:|",
    ]
    for promise in (0.5, 1.0):
        config, alarms, weeks = AlarmConfig(max_false_alarms_per_week=promise), 0, 0.0
        started = time.process_time()
        for seed in range(QUIET_SEEDS):
            judgement = find_alarms(*quiet_series(seed), config)
            alarms += len(judgement.alarms)
            weeks += np.isfinite(judgement.thresholds).sum() / 168
        cost = (time.process_time() - started) / (QUIET_SEEDS * QUIET_WEEKS * 168)
        lines.append(f"| {promise} | {alarms / weeks:.2f} | {1000 * cost:.2f} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


def _row(promise: float, results: list[Result]) -> str:
    found, judged, early = (sum(getattr(r, name) for r in results) for name in ("found", "judged", "early"))
    false_alarms, weeks = sum(r.false_alarms for r in results), sum(r.weeks for r in results)
    delay = np.median([delay for r in results for delay in r.delays])
    return f"| {promise} | {found} of {judged} | {early} | {false_alarms} | {false_alarms / weeks:.2f} | {delay:+.1f} |"


if __name__ == "__main__":
    main()
