"""Does the gate hold? Challengers that must not pass, honest ones that should, and what the log of serving adds.

    python benchmarks/loop/gate.py --work DIR [--seeds 0-19] [--out benchmarks/loop/gate.md]

Each seed is a world of two weeks. The incumbent is an honest model of the day before; its server is asked the pages of
the newest days again, in process, with the store of each midnight, and logs the features that it had. Every challenger
is held against it twice: on the test rows of its own training set alone, and with the log. Finished seeds are kept in
DIR and not made again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import resource
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import torch

from evergreen.contracts.evaluation import Estimate, Verdict
from evergreen.contracts.feature_tables import FeatureTables
from evergreen.contracts.gate import GateReport
from evergreen.contracts.impressions import read_impressions
from evergreen.contracts.instant import from_micros
from evergreen.contracts.mapping import Mapping
from evergreen.contracts.training_set import (
    SPLITS,
    ColumnKind,
    Feature,
    FeatureOrigin,
    SplitInfo,
    TrainingSet,
)
from evergreen.evaluation.config import GateConfig
from evergreen.evaluation.gate import gate_challenger
from evergreen.evaluation.served import find_served, is_skewed
from evergreen.features.point_in_time import join_features
from evergreen.features.schema import feature_table_schema
from evergreen.features.store import FeatureStore
from evergreen.features.tables import build_feature_tables
from evergreen.ingest.log import ingest_log
from evergreen.models.package import ModelPackage
from evergreen.serving.impression_sinks import open_sink
from evergreen.serving.impressions import ImpressionLog
from evergreen.serving.recommender import Recommender
from evergreen.serving.schema import RankingRequest
from evergreen.simulator.config import SimulatorConfig
from evergreen.simulator.log import simulate_log
from evergreen.training.dataset import build_training_set
from evergreen.training.split import split_boundaries
from evergreen.training.trainer import TrainingConfig, train_model

DAYS = 14
MAPPING = Mapping.load("simulated")
MODEL = TrainingConfig(model="logistic_regression", export_program=False)
GATE = GateConfig(latency_budget_ms=1000)  # other work runs beside; latency is not what is measured here
ACTIVITY = ("user_activity", "item_activity", "user_category_activity")
ONE_DAY = timedelta(days=1)
OLDER = "it knows the world until"
LEAKS = ("joined by date", "filled in", "filled in, rarely")
STALE = "a log that ends 7 days before, its test rows too"


def config_of(seed: int) -> SimulatorConfig:
    """Tastes and items age fast, so that a model of last week is a worse one."""
    return SimulatorConfig(
        num_users=1_200,
        num_items=300,
        num_days=DAYS,
        events_per_day=6_000,
        seed=seed,
        click_rate=0.05,
        taste_half_life_days=4,
        item_age_days=4,
    )


@dataclass(frozen=True)
class World:
    """Two weeks, the training set of all of them, and the log of what was served on the newest days."""

    root: Path
    tables: FeatureTables
    training_set: TrainingSet

    @property
    def end(self) -> datetime:
        return self.training_set.manifest.as_of


def split_files(training_set: TrainingSet, tables: dict[str, pa.Table], out: Path, **changes: object) -> TrainingSet:
    """The training set with other rows."""
    out.mkdir(parents=True)
    for split in SPLITS:
        pq.write_table(tables[split], out / f"{split}.parquet")
    training_set.manifest.model_copy(update=changes).write(out / TrainingSet.MANIFEST)
    return TrainingSet.load(out)


def known_at(training_set: TrainingSet, as_of: datetime, out: Path) -> TrainingSet:
    """The training set as it was built at an earlier moment: features are point-in-time, so only the cuts differ."""
    rows = pa.concat_tables(pq.read_table(training_set.file(split)) for split in SPLITS)
    rows = rows.filter(pc.less(rows["event_timestamp"], pa.scalar(as_of, rows["event_timestamp"].type)))
    time = rows["event_timestamp"].cast(pa.int64()).to_numpy()
    boundaries = split_boundaries(time, training_set.manifest.mapping.split, as_of=as_of)
    place = boundaries.assign(time)
    tables = {split: rows.filter(pa.array(place == number)) for number, split in enumerate(SPLITS)}
    splits = {
        split: SplitInfo(
            start=from_micros(boundaries.ranges[split][0]),
            end=from_micros(boundaries.ranges[split][1]),
            rows=table.num_rows,
            positives=int(pc.sum(table["label"]).as_py()),
            label_mean=pc.mean(table["label"]).as_py(),
        )
        for split, table in tables.items()
    }
    return split_files(training_set, tables, out, splits=splits, as_of=as_of)


def changed(
    training_set: TrainingSet,
    change: Callable[[pa.Table], pa.Table],
    out: Path,
    *,
    splits: Sequence[str] = SPLITS,
    new: Feature | None = None,
) -> TrainingSet:
    """The training set with changed rows, and one more feature."""
    tables = {split: pq.read_table(training_set.file(split)) for split in SPLITS}
    tables |= {split: change(tables[split]) for split in splits}
    features = (*training_set.manifest.features, *([new] if new else []))
    return split_files(training_set, tables, out, features=features)


def put(table: pa.Table, name: str, column: pa.ChunkedArray | pa.Array) -> pa.Table:
    if name not in table.column_names:
        return table.append_column(name, column)
    return table.set_column(table.column_names.index(name), name, column)


def shuffled(seed: int, share: float) -> Callable[[pa.Table], pa.Table]:
    """Labels of a share of the rows change places."""

    def change(table: pa.Table) -> pa.Table:
        rng = np.random.default_rng(seed)
        labels = table["label"].to_numpy().copy()
        rows = np.flatnonzero(rng.random(len(labels)) < share)
        labels[rows] = labels[rng.permutation(rows)]
        return put(table, "label", pa.array(labels, pa.float32()))

    return change


def joined_by_date(tables: FeatureTables) -> Callable[[pa.Table], pa.Table]:
    """Activity as it is at the end of the row's day: what a join on the date gives, the row's own click included."""
    names = [field.name for table in ACTIVITY for field in feature_table_schema(table, MAPPING)]

    def change(table: pa.Table) -> pa.Table:
        midnight = pc.ceil_temporal(table["event_timestamp"], unit="day", ceil_is_strictly_greater=True)
        spine = pa.table(
            {
                "event_timestamp": midnight,
                **{name: table[name] for name in ("user_id", "item_id")},
                "category": table["item_category"],
            }
        )
        later = join_features(spine, tables, only=ACTIVITY)
        for name in names:
            if name in later.column_names and name in table.column_names and name not in spine.column_names:
                table = put(table, name, later[name].cast(table.schema.field(name).type))
        return table

    return change


AFTERWARDS = Feature(name="session_value", kind=ColumnKind.NUMERIC, origin=FeatureOrigin.CONTEXT)


def filled_in_afterwards(seed: int, share: float) -> Callable[[pa.Table], pa.Table]:
    """A column that is 0 when the page opens; what is bought is written into it later, for a share of the clicks."""

    def change(table: pa.Table) -> pa.Table:
        rng = np.random.default_rng(seed)
        known = rng.random(table.num_rows) < share
        value = np.where(known, table["label"].to_numpy() * rng.gamma(2.0, 10.0, table.num_rows), 0.0)
        return put(table, AFTERWARDS.name, pa.array(value))

    return change


def serve_again(world: World, model: Path, out: Path) -> None:
    """The incumbent answers the pages of the test rows as they came, with the store of each midnight."""
    store = FeatureStore.create(out / "feature_store", world.tables)
    test = world.training_set.manifest.splits["test"]
    events = ds.dataset(sorted((world.root / "log" / "events").iterdir())).to_table(
        columns=["request_id", "event_timestamp", "user_id", "item_id", "device"]
    )
    day = test.start.replace(hour=0, minute=0, second=0, microsecond=0)
    with ImpressionLog(open_sink(str(out / "impressions")), capacity_rows=1_000_000) as log, asyncio.Runner() as runner:
        while day < test.end:
            store.materialize(day)
            recommender = Recommender.load(model, out / "feature_store", impressions=log, deadline_seconds=20)
            times = events["event_timestamp"]
            within = pc.and_(
                pc.greater_equal(times, pa.scalar(day, times.type)),
                pc.less(times, pa.scalar(day + ONE_DAY, times.type)),
            )
            pages: dict[str, dict] = {}
            for row in events.filter(within).to_pylist():
                page = pages.setdefault(
                    row["request_id"],
                    {
                        "request_id": row["request_id"],
                        "user_id": row["user_id"],
                        "event_timestamp": row["event_timestamp"],
                        "context": {"device": row["device"]},
                        "candidates": [],
                    },
                )
                page["candidates"].append(row["item_id"])
            requests = [RankingRequest.model_validate(page) for page in pages.values()]
            for first in range(0, len(requests), 64):
                runner.run(recommender.answer(requests[first : first + 64]))
            runner.run(recommender.close())
            day += ONE_DAY


def true_losses(world: World, packages: dict[str, ModelPackage]) -> dict[str, float]:
    """Log loss of each model with features as served, against the true click probabilities of the simulator."""
    training_set = world.training_set
    keys = training_set.read("test", ["event_timestamp", "request_id", "user_id", "item_id", "label", "position"])
    served = find_served(training_set, read_impressions(str(world.root / "served" / "impressions")), keys, GATE)
    rows = keys.take(pa.array(served.places))
    truth = ds.dataset(sorted((world.root / "log" / "truth").iterdir())).to_table(
        columns=["request_id", "item_id", "click_probability"]
    )
    key = [pc.binary_join_element_wise(table["request_id"], table["item_id"], "|") for table in (rows, truth)]
    p = truth["click_probability"].take(pc.index_in(key[0], value_set=key[1])).to_numpy()
    positions = rows["position"].to_numpy().astype(np.int32)
    losses = {}
    for name, package in packages.items():
        table = served.table
        for feature in package.info.features:
            if feature.name not in table.column_names:
                table = table.append_column(feature.name, pa.nulls(table.num_rows, pa.float64()))
        q = np.clip(package.predict_encoded(package.encoder.transform(table), positions), 1e-9, 1 - 1e-9)
        losses[name] = float(-(p * np.log(q) + (1 - p) * np.log1p(-q)).mean())
    return losses


def train(training_set: TrainingSet, out: Path) -> ModelPackage:
    return train_model(training_set, out, config=MODEL)


def make_world(seed: int, root: Path) -> World:
    simulate_log(config_of(seed), root / "log")
    snapshot = ingest_log(MAPPING, str(root / "log"), root / "snapshot")
    tables = build_feature_tables(snapshot, root / "tables")
    store = FeatureStore.create(root / "feature_store", tables)
    return World(root, tables, build_training_set(snapshot, tables, store, root / "training_set"))


def run_seed(seed: int, root: Path) -> dict:
    """Every challenger of a world at the gate, without and with the log of what was served."""
    started = cpu_seconds()
    world = make_world(seed, root)
    honest = world.training_set
    sets = {
        "day before": known_at(honest, world.end - ONE_DAY, root / "set-1"),
        "four days before": known_at(honest, world.end - 4 * ONE_DAY, root / "set-4"),
        "seven days before": known_at(honest, world.end - 7 * ONE_DAY, root / "set-7"),
        "first four days": known_at(honest, world.end - 10 * ONE_DAY, root / "set-10"),
        "fresh": honest,
        "shuffled": changed(honest, shuffled(seed, 1.0), root / "set-shuffled", splits=("train", "validation")),
        "half shuffled": changed(honest, shuffled(seed, 0.5), root / "set-half", splits=("train", "validation")),
        "joined by date": changed(honest, joined_by_date(world.tables), root / "set-date"),
        "filled in": changed(honest, filled_in_afterwards(seed, 1.0), root / "set-filled", new=AFTERWARDS),
        "filled in, rarely": changed(honest, filled_in_afterwards(seed, 0.05), root / "set-rarely", new=AFTERWARDS),
    }
    packages = {name: train(rows, root / f"model-{number}") for number, (name, rows) in enumerate(sets.items())}
    incumbent = packages["day before"]
    serve_again(world, incumbent.path, root / "served")
    log = str(root / "served" / "impressions")
    cases = {
        "labels shuffled": ("shuffled", incumbent),
        "half of the labels shuffled": ("half shuffled", incumbent),
        "data of 4 days before": ("four days before", incumbent),
        "data of 7 days before": ("seven days before", incumbent),
        STALE: ("seven days before", incumbent),
        "leak: activity joined by date, the click itself included": ("joined by date", incumbent),
        "leak: a column that is filled in after the click": ("filled in", incumbent),
        "leak: the same for one click of twenty": ("filled in, rarely", incumbent),
        "against a model of the day before": ("fresh", incumbent),
        "against one of 4 days before": ("fresh", packages["four days before"]),
        "against one of 7 days before": ("fresh", packages["seven days before"]),
        "against one of the first 4 days": ("fresh", packages["first four days"]),
        "against one with half of its labels shuffled": ("fresh", packages["half shuffled"]),
        "against one with all of them shuffled": ("fresh", packages["shuffled"]),
    }
    losses = true_losses(world, packages)
    names = {package.version: name for name, package in packages.items()}
    results = {}
    for case, (name, old) in cases.items():
        rows = sets[name] if name in LEAKS or case == STALE else honest
        report = gate_challenger(rows, packages[name], old, config=GATE, served=read_impressions(log))
        served = report.served
        assert served is not None
        results[case] = {
            "alone": better_alone(report),
            "passed": report.passed,
            "reason": report.reason,
            "offline": report.difference.value if report.difference else None,
            "served": served.difference.value if served.difference else None,
            "verdict": served.verdict,
            "skew": served.skew_difference.value,
            "skewed": is_skewed(served, GATE),
            "better": better_with_log(report),
            "skewed_by": list(served.skew_by_feature),
            "true": losses[name] / losses[names[old.version]] - 1,
        }
    return {
        "seed": seed,
        "rows": honest.manifest.splits["test"].rows,
        "clicks": honest.manifest.splits["test"].positives,
        "cpu_seconds": cpu_seconds() - started,
        "cases": results,
    }


def calibrated(ratio: Estimate | None) -> bool:
    assert ratio is not None and ratio.low is not None and ratio.high is not None
    return ratio.low <= GATE.max_click_rate_ratio and ratio.high >= 1 / GATE.max_click_rate_ratio


def better_alone(report: GateReport) -> bool:
    """By the test rows of its own training set."""
    return report.verdict is Verdict.BETTER and calibrated(report.click_rate_ratio)


def better_with_log(report: GateReport) -> bool:
    """By the log of what was served, too."""
    served = report.served
    if served is None or served.verdict is not Verdict.BETTER:
        return False
    gain = served.never_served_gain
    leans = gain is not None and gain.low is not None and gain.low > 0
    return better_alone(report) and calibrated(served.click_rate_ratio) and not leans and not is_skewed(served, GATE)


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def table_of(seeds: list[dict]) -> list[str]:
    """Lines of the result."""
    cases = {case: [seed["cases"][case] for seed in seeds] for case in seeds[0]["cases"]}
    lines = [
        "| challenger | truly worse | log loss against the truth | on its test rows | better there | and as served "
        "| **passes** | held back for |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for case, results in cases.items():
        if case.startswith("against"):
            continue
        worse = sum(one["true"] > 0 for one in results)
        reasons = Counter(reason_of(one) for one in results if not one["passed"])
        lines.append(
            f"| {case} | {worse} of {len(results)} | {np.median([one['true'] for one in results]):+.2%} "
            f"| {np.median([one['offline'] for one in results]):+.4f} | {sum(one['alone'] for one in results)} "
            f"| {sum(one['better'] for one in results)} | **{sum(one['passed'] for one in results)}** "
            f"| {', '.join(f'{reason} ({count})' for reason, count in reasons.most_common())} |"
        )
    lines += [
        "",
        "| an honest model of today | truly better | log loss against the truth | better on its test rows | **passes** "
        "| would pass if to be no worse as served were enough |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for case, results in cases.items():
        if case.startswith("against"):
            lenient = sum(one["alone"] and not one["skewed"] and one["verdict"] != "worse" for one in results)
            lines.append(
                f"| {case} | {sum(one['true'] < 0 for one in results)} of {len(results)} "
                f"| {np.median([one['true'] for one in results]):+.2%} | {sum(one['alone'] for one in results)} "
                f"| **{sum(one['passed'] for one in results)}** | {lenient} |"
            )
    everything = [one for results in cases.values() for one in results]
    lines += ["", "By how much the log loss against the truth is really lower:", ""]
    lines += ["| lower by | challengers | **pass** |", "|---|---:|---:|"]
    edges = [-np.inf, -0.05, -0.02, -0.01, -0.005, 0.0, np.inf]
    names = ["5 % and more", "2 % to 5 %", "1 % to 2 %", "0.5 % to 1 %", "up to 0.5 %", "it is higher"]
    for low, high, name in zip(edges[:-1], edges[1:], names, strict=True):
        within = [one for one in everything if low <= one["true"] < high]
        lines.append(f"| {name} | {len(within)} | {sum(one['passed'] for one in within)} |")
    return lines


def reason_of(one: dict) -> str:
    """What held a challenger back, in a word or two."""
    if one["skewed"] and one["reason"].startswith("training-serving skew"):
        return "training-serving skew"
    if one["reason"].startswith(OLDER):
        return "older than what serves"
    if one["reason"].startswith("leans on"):
        return "leans on what was never served"
    return "no better" if "not better" in one["reason"] else one["reason"].split(": ")[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", default="0-19")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    first, last = (int(seed) for seed in arguments.seeds.split("-"))
    arguments.work.mkdir(parents=True, exist_ok=True)
    seeds = []
    for seed in range(first, last + 1):
        file = arguments.work / f"seed-{seed}.json"
        if not file.exists():
            root = arguments.work / f"world-{seed}"
            shutil.rmtree(root, ignore_errors=True)
            root.mkdir()
            file.write_text(json.dumps(run_seed(seed, root), indent=1))
            shutil.rmtree(root)
        seeds.append(json.loads(file.read_text()))
        print(f"seed {seed}: {seeds[-1]['cpu_seconds']:.0f} CPU s", flush=True)
    rows, clicks = (int(np.mean([seed[name] for seed in seeds])) for name in ("rows", "clicks"))
    text = "\n".join(
        [
            f"# Challengers at the gate, {len(seeds)} worlds, {platform.machine()}, Python {platform.python_version()}",
            "",
            f"Two weeks, 1,200 users, 300 items, about {rows:,} test rows with {clicks:,} clicks in each world; "
            "logistic regression. The incumbent is an honest model of the day before. Differences are medians of "
            "challenger less incumbent: of log loss of the predictions with features as served against the simulator's "
            "click probabilities (which the gate does not know), and of normalized entropy on the test rows of the "
            "challenger's own training set. *Better there*: outside the interval and calibrated. *And as served*: with "
            "the features of the log of what was served, too.",
            "",
            *table_of(seeds),
        ]
    )
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
