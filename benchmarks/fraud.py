"""Bots planted in simulated logs: which are found, who is wrongly labelled, what they cost a model, and what it takes.

    python benchmarks/fraud.py [--deskdrop DIR] [--skip ranking] [--out benchmarks/fraud.md]

The truth of the simulated world says whose each event is. Precision and recall count events, average precision ranks
users by their score. For the cost in ranking quality, models are trained on the same log with all events, with the
filtered ones, and with people's alone (no filter can be better); all are measured on the same test rows of people.
"""

from __future__ import annotations

import argparse
import platform
import resource
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyod.models.iforest import IForest
from sklearn.metrics import average_precision_score

from evergreen.contracts.mapping import Mapping
from evergreen.contracts.snapshot import Snapshot
from evergreen.contracts.training_set import TrainingSet
from evergreen.features.store import FeatureStore
from evergreen.features.tables import build_feature_tables
from evergreen.fraud.detector import MEASURES, score_windows
from evergreen.fraud.filter import FilterConfig, filter_events, without_suspicious
from evergreen.fraud.labels import SuspiciousEvents
from evergreen.fraud.rules import broken_rules, judged_events
from evergreen.fraud.streaming import Event, EventRules
from evergreen.ingest.log import ingest_log
from evergreen.metrics.binary import auc, normalized_entropy
from evergreen.models.package import ModelPackage
from evergreen.simulator.config import SimulatorConfig
from evergreen.simulator.log import simulate_log
from evergreen.training.config import TrainingConfig
from evergreen.training.dataset import build_training_set
from evergreen.training.trainer import train_model

BOTS = {"num_fast_crawlers": 20, "num_farm_accounts": 200, "num_mimics": 40}
NO_BOTS = {"num_crawlers": 0, "num_silent_bots": 0}
WORLDS = [
    ("bots, seed 0", BOTS),
    ("bots, seed 1", BOTS | {"seed": 1}),
    ("bots, seed 2", BOTS | {"seed": 2}),
    ("mimics click 8 %", BOTS | {"mimic_click_rate": 0.08, "seed": 3}),
    ("mimics click 6 %", BOTS | {"mimic_click_rate": 0.06, "seed": 3}),
    ("people alone, seed 0", NO_BOTS),
    ("people alone, seed 1", NO_BOTS | {"seed": 1}),
]
RANKING_EVENTS_PER_DAY, RANKING_FACTOR = 30_000, 3
MODELS = ("logistic_regression", "deepfm")
KEYS = ["request_id", "item_id"]


@dataclass(frozen=True)
class World:
    """A simulated log, read in, and whose its events are."""

    log: Path
    snapshot: Snapshot
    kinds: dict[str, str]
    """Kind of each user."""


def make_world(folder: Path, config: SimulatorConfig) -> World:
    """Simulate and ingest."""
    simulate_log(config, folder / "log")
    snapshot = ingest_log(Mapping.load("simulated"), str(folder / "log"), folder / "snapshot")
    kinds: dict[str, str] = {}
    for file in sorted((folder / "log" / "events").iterdir()):
        users = pq.read_table(file, columns=["user_id"], partitioning=None)["user_id"].to_pylist()
        truth = pq.read_table(folder / "log" / "truth" / file.name, columns=["user_kind"], partitioning=None)
        kinds |= dict(zip(users, truth["user_kind"].to_pylist(), strict=True))
    return World(folder / "log", snapshot, kinds)


def detection(name: str, world: World, labels: SuspiciousEvents) -> tuple[str, dict[str, dict[str, float]]]:
    """A row of the table, and by reason the share of each kind's events that has it."""
    users = labels.users().to_pylist()
    events = {kind: sum(u["events"] for u in users if world.kinds[u["user_id"]] == kind) for kind in KINDS}
    owner = [world.kinds[user] for user in labels.events()["user_id"].to_pylist()]
    found = {kind: owner.count(kind) for kind in KINDS}
    judged = [u for u in users if world.kinds[u["user_id"]] in ("person", "mimic")]
    is_mimic = np.array([world.kinds[u["user_id"]] == "mimic" for u in judged])
    scores = np.array([u["score"] or 0.0 for u in judged])
    ap = f"{average_precision_score(is_mimic, scores):.3f}" if is_mimic.any() else "–"
    people = [u for u in users if world.kinds[u["user_id"]] == "person"]
    wrong = sum(u["suspicious_events"] > 0 for u in people)
    precision = f"{1 - found['person'] / len(owner):.4f}" if found["person"] < len(owner) else "–"
    recall = [f"{found[kind] / events[kind]:.3f}" if events[kind] else "–" for kind in KINDS if kind != "person"]
    row = (
        f"| {name} | {precision} | {' | '.join(recall)} | {ap} | {isolation_forest(world, labels)} "
        f"| {wrong} of {len(people):,} ({wrong / len(people):.2%}) |"
    )
    by_reason: dict[str, dict[str, float]] = {}
    for reasons, kind in zip(labels.events()["reasons"].to_pylist(), owner, strict=True):
        for reason in reasons:
            share = by_reason.setdefault(reason, dict.fromkeys(KINDS, 0.0))
            share[kind] += 1 / events[kind]
    return row, by_reason


KINDS = ("person", "fast_crawler", "farm_account", "mimic", "crawler", "silent_bot")


def isolation_forest(world: World, labels: SuspiciousEvents) -> str:
    """Average precision on mimics of an isolation forest over the detector's own measures."""
    if "mimic" not in world.kinds.values():
        return "–"
    kind = world.snapshot.kind
    with duckdb.connect() as db:
        judged_events(db, world.snapshot.files, kind)
        broken_rules(db, labels.manifest.limits, kind)
        db.execute("CREATE TABLE caught AS SELECT DISTINCT user_id, day FROM broken JOIN judged USING (event_id)")
        windows = score_windows(db, kind, window_days=30, min_events=FilterConfig().min_events).table
    owner = np.array([world.kinds[user] for user in windows["user_id"].to_pylist()])
    rows = np.isin(owner, ("person", "mimic")) & (windows["events"].to_numpy() >= FilterConfig().min_events)
    measures = np.column_stack([windows[name].to_numpy()[rows] for name in MEASURES[kind]])
    scores = IForest(random_state=0).fit(measures).decision_scores_
    return f"{average_precision_score(owner[rows] == 'mimic', scores):.3f}"


def ranking(folder: Path) -> list[str]:
    """What the bots cost: models from all events, from the filtered ones, and from people's alone."""
    bots = {name: number * RANKING_FACTOR for name, number in BOTS.items()}
    config = SimulatorConfig(
        num_users=2_000 * RANKING_FACTOR, num_items=1_000, events_per_day=RANKING_EVENTS_PER_DAY, seed=7, **bots
    )
    world = make_world(folder, config)
    labels = filter_events(world.snapshot, folder / "labels")
    variants = {
        "all events": world.snapshot,
        "filtered": without_suspicious(world.snapshot, labels, folder / "filtered"),
        "people alone": without_suspicious(world.snapshot, truth_labels(world, labels, folder), folder / "people"),
    }
    sets = {name: training_set(snapshot, folder / "sets" / name) for name, snapshot in variants.items()}
    common = common_rows(list(sets.values()), world)
    lines = [
        f"{world.snapshot.manifest.rows:,} events over 30 days, "
        f"{labels.manifest.suspicious_events / labels.manifest.events:.1%} labelled; {common.num_rows:,} test rows of "
        "people, which are in the test split of all three.",
        "",
        "| model | trained on | rows | normalized entropy | AUC | predicted / actual clicks |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for model in MODELS:
        for name, rows in sets.items():
            settings = TrainingConfig(model=model, seed=0, export_program=False)
            package = train_model(rows, folder / "models" / f"{model} {name}", config=settings)
            labels_, predicted = predictions(package, rows, common)
            lines.append(
                f"| {model} | {name} | {rows.manifest.splits['train'].rows:,} "
                f"| {normalized_entropy(labels_, predicted):.4f} | {auc(labels_, predicted):.4f} "
                f"| {predicted.sum() / labels_.sum():.3f} |"
            )
            print(lines[-1], flush=True)
    return lines


def truth_labels(world: World, labels: SuspiciousEvents, folder: Path) -> SuspiciousEvents:
    """Labels as a filter that knows the truth would write them."""
    from evergreen.contracts.artifact import sha256_file

    with duckdb.connect() as db:
        db.register("bots", pa.table({"user_id": [user for user, kind in world.kinds.items() if kind != "person"]}))
        events = db.sql(
            """SELECT event_id, user_id, ['truth'] AS reasons, 1.0::DOUBLE AS score
            FROM read_parquet($files, hive_partitioning = false) JOIN bots USING (user_id) ORDER BY event_id""",
            params={"files": world.snapshot.files},
        ).to_arrow_table()
    path = folder / "truth_labels"
    path.mkdir()
    pq.write_table(events, path / SuspiciousEvents.EVENTS)
    update = {"sha256": sha256_file(path / SuspiciousEvents.EVENTS), "suspicious_events": events.num_rows}
    labels.manifest.model_copy(update=update).write(path / SuspiciousEvents.MANIFEST)
    return SuspiciousEvents.load(path)


def training_set(snapshot: Snapshot, folder: Path) -> TrainingSet:
    """Feature tables and the join."""
    tables = build_feature_tables(snapshot, folder / "tables")
    return build_training_set(snapshot, tables, FeatureStore.create(folder / "store", tables), folder / "rows")


def common_rows(sets: list[TrainingSet], world: World) -> pa.Table:
    """Keys of people's rows that are in every test split."""
    tables = [rows.read("test", [*KEYS, "user_id"]) for rows in sets]
    person = pa.array([world.kinds[user] == "person" for user in tables[0]["user_id"].to_pylist()])
    common = tables[0].filter(person).select(KEYS)
    for table in tables[1:]:
        common = common.join(table.select(KEYS), keys=KEYS, join_type="inner")
    return common


def predictions(package: ModelPackage, rows: TrainingSet, common: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Labels and predictions of the common rows, at the positions where they were shown."""
    test = rows.read("test")
    numbered = test.select(KEYS).append_column("row", pa.array(np.arange(test.num_rows)))
    places = np.sort(numbered.join(common, keys=KEYS, join_type="inner")["row"].to_numpy())
    chosen = test.take(pa.array(places)).combine_chunks()
    predicted = []
    for batch in chosen.to_batches(max_chunksize=100_000):
        encoded = package.encoder.transform_batches([batch], num_rows=batch.num_rows)
        positions = batch.column("position").fill_null(0).to_numpy(zero_copy_only=False)
        predicted.append(package.predict_encoded(encoded, positions))
    return chosen["label"].to_numpy().astype(np.float64), np.concatenate(predicted)


def cost(folder: Path) -> list[str]:
    """CPU and memory of the filter at 1 M events, and the pace of the rules as a stream."""
    config = SimulatorConfig(num_users=6_000, num_items=1_000, events_per_day=30_000, **BOTS)
    world = make_world(folder, config)
    started = time.process_time()
    labels = filter_events(world.snapshot, folder / "labels", threads=1)
    filtering = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    started = time.process_time()
    without_suspicious(world.snapshot, labels, folder / "filtered")
    writing = time.process_time() - started
    with duckdb.connect() as db:
        judged_events(db, world.snapshot.files, world.snapshot.kind)
        columns = "user_id, item_id, request, t, clicked, clicked_at"
        rows = db.execute(f"SELECT {columns} FROM judged ORDER BY event_id LIMIT 300000").fetchall()
    events = [Event(*row) for row in rows]
    rules = EventRules(labels.manifest.limits, world.snapshot.kind)
    started = time.process_time()
    for event in events:
        rules.update(event)
    pace = len(events) / (time.process_time() - started)
    return [
        f"{world.snapshot.manifest.rows:,} events on one thread: labels and report {filtering:.1f} CPU s (the import "
        f"of PyOD included), the filtered snapshot {writing:.1f} CPU s; the process had {peak:.0f} MiB at its highest, "
        f"simulation included. As a stream in Python: {pace:,.0f} events a CPU second.",
    ]


def real_log(deskdrop: Path, folder: Path) -> list[str]:
    """Whom the filter suspects in a log of real people."""
    snapshot = ingest_log(Mapping.load("deskdrop"), str(deskdrop), folder / "snapshot")
    manifest = filter_events(snapshot, folder / "labels").manifest
    lines = [
        f"{manifest.suspicious_users} of {manifest.users:,} users ({manifest.suspicious_users / manifest.users:.1%}) "
        f"have a labelled event, {manifest.suspicious_events:,} of {manifest.events:,} events "
        f"({manifest.suspicious_events / manifest.events:.1%}) in all.",
        "",
        "| reason | events | users |",
        "|---|---:|---:|",
    ]
    return lines + [f"| {reason} | {n.events:,} | {n.users} |" for reason, n in manifest.reasons.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deskdrop", type=Path, help="folder of the Deskdrop log")
    parser.add_argument("--skip", nargs="*", default=[], choices=["detection", "ranking", "cost"])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    lines = [f"# Bots in the log, one thread, {platform.machine()}, Python {platform.python_version()}", ""]
    work = Path(tempfile.mkdtemp(prefix="evergreen-fraud-"))
    try:
        if "cost" not in arguments.skip:
            lines += ["## What the filter takes", "", *cost(work / "cost"), ""]
        if "detection" not in arguments.skip:
            lines += found(work / "detection")
        if arguments.deskdrop:
            lines += ["## A real log: Deskdrop", "", *real_log(arguments.deskdrop, work / "deskdrop"), ""]
        if "ranking" not in arguments.skip:
            lines += ["## What bots cost a model", "", *ranking(work / "ranking"), ""]
    finally:
        shutil.rmtree(work)
    text = "\n".join(lines)
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


def found(folder: Path) -> list[str]:
    """The tables of what is found in each world."""
    lines = [
        "## What is found",
        "",
        "300,000 events of 2,000 users over 30 days, and on top 20 fast crawlers, 200 accounts of click farms and 40",
        "mimics (click rate 12 % where nothing else is said; people's is 1.7 %). Defaults: the detector may label",
        "0.5 % of people's windows. AP: average precision of the score on mimics against people.",
        "",
        "| world | precision | recall crawlers | farm | mimics | the default crawler | the silent bot | AP mimics "
        "| AP, isolation forest | people labelled |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    reasons: dict[str, dict[str, float]] = {}
    for place, (name, settings) in enumerate(WORLDS):
        world = make_world(folder / str(place), SimulatorConfig(**settings))
        row, by_reason = detection(name, world, filter_events(world.snapshot, folder / str(place) / "labels"))
        reasons = reasons or by_reason
        lines.append(row)
        print(row, flush=True)
    lines += ["", f"Share of each kind's events that has a reason ({WORLDS[0][0]}):", ""]
    lines += [f"| reason | {' | '.join(KINDS)} |", f"|---|{'---:|' * len(KINDS)}"]
    lines += [
        f"| {reason} | {' | '.join(f'{share[kind]:.3f}' if share[kind] else '–' for kind in KINDS)} |"
        for reason, share in sorted(reasons.items())
    ]
    return [*lines, ""]


if __name__ == "__main__":
    main()
