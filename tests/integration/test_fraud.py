"""The filter on whole logs: bots planted in a simulated one, and a real one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import duckdb
import numpy as np
import pyarrow.dataset as ds
import pytest
from sklearn.metrics import average_precision_score

from evergreen.contracts.mapping import Mapping
from evergreen.contracts.snapshot import Snapshot
from evergreen.fraud.filter import filter_events, without_suspicious
from evergreen.fraud.labels import SuspiciousEvents
from evergreen.fraud.rules import broken_rules, judged_events
from evergreen.fraud.streaming import Event, EventRules
from evergreen.ingest.log import ingest_log
from evergreen.simulator.config import SimulatorConfig
from evergreen.simulator.log import simulate_log

DESKDROP = Path(__file__).resolve().parents[3] / "shared" / "data" / "deskdrop"
CONFIG = SimulatorConfig(
    num_users=800, num_days=20, events_per_day=4_000, num_fast_crawlers=10, num_farm_accounts=80, num_mimics=15, seed=5
)


class Filtered(NamedTuple):
    snapshot: Snapshot
    labels: SuspiciousEvents
    kinds: dict[str, str]
    """Kind of every user, from the truth."""

    def share_labelled(self, kind: str) -> float:
        """Of the events of one kind of user."""
        users = [user for user in self.labels.users().to_pylist() if self.kinds[user["user_id"]] == kind]
        return sum(user["suspicious_events"] for user in users) / sum(user["events"] for user in users)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Filtered:
    folder = tmp_path_factory.mktemp("planted")
    simulate_log(CONFIG, folder / "log")
    snapshot = ingest_log(Mapping.load("simulated"), str(folder / "log"), folder / "snapshot")
    kinds: dict[str, str] = {}
    for file in sorted((folder / "log" / "events").iterdir()):
        users = ds.dataset(file).to_table(columns=["user_id"])["user_id"].to_pylist()
        truth = ds.dataset(folder / "log" / "truth" / file.name).to_table(columns=["user_kind"])
        kinds |= dict(zip(users, truth["user_kind"].to_pylist(), strict=True))
    return Filtered(snapshot, filter_events(snapshot, folder / "labels"), kinds)


@pytest.mark.parametrize("kind", ["fast_crawler", "farm_account"])
def test_crawlers_and_click_farms_are_found(planted: Filtered, kind: str) -> None:
    assert planted.share_labelled(kind) >= 0.9


def test_what_is_labelled_is_a_bots(planted: Filtered) -> None:
    owners = [planted.kinds[user] for user in planted.labels.events()["user_id"].to_pylist()]
    assert np.mean([owner != "person" for owner in owners]) >= 0.95


def test_mimics_are_ranked_before_people(planted: Filtered) -> None:
    users = [u for u in planted.labels.users().to_pylist() if planted.kinds[u["user_id"]] in ("person", "mimic")]
    is_mimic = [planted.kinds[user["user_id"]] == "mimic" for user in users]
    assert average_precision_score(is_mimic, [user["score"] or 0.0 for user in users]) >= 0.9


def test_few_people_lose_an_event(planted: Filtered) -> None:
    people = [u for u in planted.labels.users().to_pylist() if planted.kinds[u["user_id"]] == "person"]
    assert np.mean([user["suspicious_events"] > 0 for user in people]) <= 0.01


def test_popularity_of_the_farms_targets_is_what_people_made_it(planted: Filtered, tmp_path: Path) -> None:
    filtered = without_suspicious(planted.snapshot, planted.labels, tmp_path / "filtered")
    farm = [user for user, kind in planted.kinds.items() if kind == "farm_account"]
    with duckdb.connect() as db:
        target, of_farm, of_all = db.execute(
            """SELECT item_id, count(*) FILTER (list_contains($2, user_id)) AS of_farm, count(*)
            FROM read_parquet($1, hive_partitioning = false) WHERE clicked GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT 1""",
            [planted.snapshot.files, farm],
        ).fetchall()[0]
        left = db.execute(
            "SELECT count(*) FROM read_parquet($1, hive_partitioning = false) WHERE clicked AND item_id = $2",
            [filtered.files, target],
        ).fetchall()[0][0]
    assert of_farm > 0.5 * of_all
    assert left <= of_all - 0.95 * of_farm


def _verdicts(snapshot: Snapshot, labels: SuspiciousEvents) -> tuple[set, set, EventRules]:
    """(event_id, rule) of every broken rule by the batch and by a stream of the same events."""
    with duckdb.connect() as db:
        judged_events(db, snapshot.files, snapshot.kind)
        broken_rules(db, labels.manifest.limits, snapshot.kind)
        batch = set(db.execute("SELECT event_id, reason FROM broken").fetchall())
        rows: Iterator = iter(
            db.execute(
                "SELECT event_id, user_id, item_id, request, t, clicked, clicked_at FROM judged ORDER BY event_id"
            ).fetchall()
        )
    rules = EventRules(labels.manifest.limits, snapshot.kind)
    stream = {(event_id, reason.value) for event_id, *columns in rows for reason in rules.update(Event(*columns))}
    return batch, stream, rules


def test_a_stream_of_the_log_gives_the_verdicts_of_the_batch(planted: Filtered) -> None:
    batch, stream, rules = _verdicts(planted.snapshot, planted.labels)
    assert stream == batch and len(batch) > 1_000
    assert rules.late == rules.forgotten == 0


@pytest.mark.skipif(not DESKDROP.is_dir(), reason=f"{DESKDROP} is not here")
def test_few_users_of_a_real_log_are_suspicious(tmp_path: Path) -> None:
    snapshot = ingest_log(Mapping.load("deskdrop"), str(DESKDROP), tmp_path / "snapshot")
    labels = filter_events(snapshot, tmp_path / "labels")
    manifest = labels.manifest
    assert manifest.suspicious_users <= 0.03 * manifest.users
    assert manifest.suspicious_events <= 0.03 * manifest.events
    assert manifest.reasons.keys() <= {"repeated_click", "account_burst", "anomaly"}
    batch, stream, _ = _verdicts(snapshot, labels)
    assert stream == batch and batch
