"""From a log to its training set: what is a row, what is left out and counted, and that time splits it."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from evergreen.contracts.errors import LeakageError, TrainingError
from evergreen.contracts.feature_tables import FeatureTables
from evergreen.contracts.mapping import Mapping
from evergreen.contracts.snapshot import Snapshot
from evergreen.contracts.training_set import ROW_FIELDS, SPLITS, TrainingSet
from evergreen.features.point_in_time import join_features
from evergreen.features.request import request_features
from evergreen.features.store import FeatureStore
from evergreen.features.tables import build_feature_tables
from evergreen.ingest.log import ingest_log
from evergreen.training.dataset import BEFORE_START, BROKEN, EMBARGO, NOT_IN_CATALOGUE, REPEAT, build_training_set
from tests.joined import Joined

START = datetime(2025, 3, 1, tzinfo=UTC)

READING = """
name = "reading"
kind = "interactions"
timestamp = { column = "at" }
negatives_per_positive = 3
[columns]
user_id = "who"
item_id = "what"
request_id = "session"
category = "topic"
[context_features]
device = "categorical"
"""


def _log(path: Path, num_rows: int) -> None:
    rng = np.random.default_rng(4)
    at = START + np.sort(rng.integers(0, 20 * 86_400, num_rows)) * timedelta(seconds=1)
    what = rng.integers(0, 40, num_rows)
    pq.write_table(
        pa.table(
            {
                "at": pa.array(at.tolist(), pa.timestamp("us", tz="UTC")),
                "who": [f"u{n}" for n in rng.integers(0, 30, num_rows)],
                "what": [f"i{n}" for n in what],
                "session": [f"s{n}" for n in rng.integers(0, 300, num_rows)],
                "topic": [f"t{n % 5}" for n in what],
                "device": rng.choice(["phone", "desk"], num_rows).tolist(),
            }
        ),
        path,
    )


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> tuple[Snapshot, FeatureTables]:
    folder = tmp_path_factory.mktemp("training_set")
    _log(folder / "log.parquet", 1500)
    snapshot = ingest_log(Mapping.load(READING), str(folder / "log.parquet"), folder / "snapshot")
    return snapshot, build_feature_tables(snapshot, folder / "tables")


@pytest.fixture(scope="module")
def built(log: tuple[Snapshot, FeatureTables], tmp_path_factory: pytest.TempPathFactory) -> TrainingSet:
    snapshot, tables = log
    return build_training_set(snapshot, tables, Joined(tables), tmp_path_factory.mktemp("out") / "set", seed=1)


def test_every_event_is_a_positive_row_or_counted_with_a_reason(
    log: tuple[Snapshot, FeatureTables], built: TrainingSet
) -> None:
    left_out = built.manifest.left_out
    positives = sum(info.positives for info in built.manifest.splits.values())
    assert left_out[NOT_IN_CATALOGUE] == 40
    assert left_out[REPEAT] > 0
    assert positives + left_out[NOT_IN_CATALOGUE] + left_out[REPEAT] == log[0].manifest.rows
    assert EMBARGO not in left_out  # without an attribution window there is no embargo


def test_a_user_and_an_item_meet_once_as_a_positive(built: TrainingSet) -> None:
    rows = pa.concat_tables(built.read(split, ["user_id", "item_id", "label"]) for split in SPLITS)
    positive = rows.filter(pc.equal(rows["label"], 1))
    assert positive.group_by(["user_id", "item_id"]).aggregate([]).num_rows == positive.num_rows


def test_negatives_share_user_time_session_and_context_with_their_positive(built: TrainingSet) -> None:
    keys = ["user_id", "event_timestamp", "request_id", "device"]
    rows = built.read("train", [*keys, "label"])
    groups = rows.group_by(keys).aggregate([("label", "sum"), ("label", "count")])
    assert pc.min(groups["label_sum"]).as_py() >= 1
    assert pc.mean(groups["label_count"]).as_py() == pytest.approx(4, abs=0.5)


def test_an_items_category_goes_with_the_drawn_item(built: TrainingSet) -> None:
    rows = built.read("train", ["item_id", "item_category"]).to_pylist()
    assert all(row["item_category"] == f"t{int(row['item_id'][1:]) % 5}" for row in rows)


def test_later_splits_are_later_and_rows_are_in_time_order(built: TrainingSet) -> None:
    times = [built.read(split, ["event_timestamp"])["event_timestamp"].cast(pa.int64()).to_numpy() for split in SPLITS]
    for time in times:
        assert (np.diff(time) >= 0).all()
    assert times[0].max() < times[1].min() <= times[1].max() < times[2].min()


def test_the_same_seed_gives_the_same_rows_and_another_seed_others(
    log: tuple[Snapshot, FeatureTables], built: TrainingSet, tmp_path: Path
) -> None:
    snapshot, tables = log
    again = build_training_set(snapshot, tables, Joined(tables), tmp_path / "again", seed=1)
    other = build_training_set(snapshot, tables, Joined(tables), tmp_path / "other", seed=2)
    assert again.file("train").read_bytes() == built.file("train").read_bytes()
    assert other.read("train", ["item_id"]) != built.read("train", ["item_id"])


def test_a_split_that_reaches_into_an_earlier_one_is_refused_when_read(built: TrainingSet, tmp_path: Path) -> None:
    tampered = tmp_path / "tampered"
    tampered.mkdir()
    for name in ("training_set.json", "validation.parquet", "test.parquet"):
        (tampered / name).write_bytes((built.path / name).read_bytes())
    mixed = pa.concat_tables([built.read("train"), built.read("test").slice(0, 1)])
    pq.write_table(mixed, tampered / "train.parquet")
    with pytest.raises(LeakageError, match="train has rows from"):
        TrainingSet.load(tampered)


def test_tables_of_another_snapshot_are_refused(log: tuple[Snapshot, FeatureTables], tmp_path: Path) -> None:
    _, tables = log
    _log(tmp_path / "other.parquet", 900)
    other = ingest_log(Mapping.load(READING), str(tmp_path / "other.parquet"), tmp_path / "snapshot")
    with pytest.raises(TrainingError, match="feature tables were built from snapshot"):
        build_training_set(other, tables, Joined(tables), tmp_path / "set")


def test_a_feature_that_says_nothing_is_dropped_with_its_reason(tmp_path: Path) -> None:
    _log(tmp_path / "log.parquet", 900)
    mapping = Mapping.load(READING.replace('device = "categorical"', 'constant = { column = "one", type = "numeric" }'))
    table = pq.read_table(tmp_path / "log.parquet")
    pq.write_table(table.append_column("one", pa.array([7.0] * table.num_rows)), tmp_path / "log.parquet")
    snapshot = ingest_log(mapping, str(tmp_path / "log.parquet"), tmp_path / "snapshot")
    tables = build_feature_tables(snapshot, tmp_path / "tables")
    built = build_training_set(snapshot, tables, Joined(tables), tmp_path / "set")
    assert built.manifest.dropped_features["constant"] == "constant in the training rows: 7.0"
    assert "constant" not in built.read("train").column_names


def test_rows_joined_in_parts_are_those_joined_at_once(
    log: tuple[Snapshot, FeatureTables], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot, tables = log
    whole = build_training_set(snapshot, tables, Joined(tables), tmp_path / "whole")
    monkeypatch.setattr("evergreen.training.dataset._JOINED_ROWS", 700)
    parts = build_training_set(snapshot, tables, Joined(tables), tmp_path / "parts")
    assert parts.manifest.features == whole.manifest.features
    assert parts.manifest.dropped_features == whole.manifest.dropped_features
    for split, info in whole.manifest.splits.items():
        assert parts.read(split).equals(whole.read(split))
        assert parts.manifest.splits[split].rows == info.rows
        assert parts.manifest.splits[split].positives == info.positives


def test_feature_that_changes_only_late_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evergreen.training.dataset._JOINED_ROWS", 500)
    _log(tmp_path / "log.parquet", 900)
    mapping = Mapping.load(READING.replace('device = "categorical"', 'late = { column = "late", type = "numeric" }'))
    table = pq.read_table(tmp_path / "log.parquet").sort_by(mapping.timestamp.column)
    late = [0.0] * 400 + [1.0] * (table.num_rows - 400)
    pq.write_table(table.append_column("late", pa.array(late)), tmp_path / "log.parquet")
    snapshot = ingest_log(mapping, str(tmp_path / "log.parquet"), tmp_path / "snapshot")
    tables = build_feature_tables(snapshot, tmp_path / "tables")
    built = build_training_set(snapshot, tables, Joined(tables), tmp_path / "set")
    assert "late" in {feature.name for feature in built.manifest.features}


def _all_rows(built: TrainingSet, columns: list[str]) -> pa.Table:
    return pa.concat_tables(built.read(split, columns) for split in SPLITS).combine_chunks()


def _names(built: TrainingSet) -> list[str]:
    """Columns whose values are the rows' own, wherever else rows are left out."""
    return [name for name in built.read("test").column_names if name != "row_id"]


def test_rows_that_are_not_learned_from_are_counted_and_known_to_the_features_of_others(
    log: tuple[Snapshot, FeatureTables], built: TrainingSet, tmp_path: Path
) -> None:
    snapshot, tables = log
    start, broken = START + timedelta(days=5), (START + timedelta(days=9), START + timedelta(days=11))
    overlapping = [broken, (START + timedelta(days=10), START + timedelta(days=12)), (START, START + timedelta(days=6))]
    cut = build_training_set(
        snapshot, tables, Joined(tables), tmp_path / "cut", seed=1, start=start, leave_out=overlapping
    )
    names = _names(cut)
    whole = _all_rows(built, names)
    at = whole["event_timestamp"].to_numpy()
    early = at < np.datetime64(start.replace(tzinfo=None))
    inside = np.zeros(len(at), dtype=bool)
    for first, end in overlapping:
        inside |= (at >= np.datetime64(first.replace(tzinfo=None))) & (at < np.datetime64(end.replace(tzinfo=None)))
    assert _all_rows(cut, names).equals(whole.filter(pa.array(~early & ~inside)))
    left_out = cut.manifest.left_out
    assert (left_out[BEFORE_START], left_out[BROKEN]) == (early.sum(), (inside & ~early).sum())
    assert {NOT_IN_CATALOGUE, REPEAT} < left_out.keys() and BEFORE_START not in built.manifest.left_out
    assert _all_rows(cut, names).num_rows + left_out[BEFORE_START] + left_out[BROKEN] == whole.num_rows


def test_nothing_left_out_is_no_reason_in_the_manifest(
    log: tuple[Snapshot, FeatureTables], built: TrainingSet, tmp_path: Path
) -> None:
    snapshot, tables = log
    elsewhere = [(START - timedelta(days=9), START - timedelta(days=2))]
    again = build_training_set(
        snapshot, tables, Joined(tables), tmp_path / "again", seed=1, start=START, leave_out=elsewhere
    )
    assert again.manifest == built.manifest


def test_splits_of_spans_reach_past_a_broken_day(tmp_path: Path) -> None:
    _log(tmp_path / "log.parquet", 1200)
    mapping = Mapping.load(READING + '[split]\nvalidation_span = "1d"\ntest_span = "1d"\n')
    as_of = START + timedelta(days=20)
    snapshot = ingest_log(mapping, str(tmp_path / "log.parquet"), tmp_path / "snapshot", as_of=as_of)
    tables = build_feature_tables(snapshot, tmp_path / "tables")
    yesterday = (START + timedelta(days=19), as_of)
    built = build_training_set(snapshot, tables, Joined(tables), tmp_path / "set", leave_out=[yesterday])
    starts = [built.manifest.splits[split].start for split in SPLITS[1:]]
    assert starts == [START + timedelta(days=17), START + timedelta(days=18)]
    assert all(built.read(split).num_rows for split in SPLITS)
    assert pc.max(built.read("test")["event_timestamp"]).as_py() < yesterday[0]


def test_rows_of_a_daily_batch_know_what_was_known_at_midnight(
    log: tuple[Snapshot, FeatureTables], built: TrainingSet, tmp_path: Path
) -> None:
    snapshot, tables = log
    store = FeatureStore.create(tmp_path / "store", tables)
    batch = build_training_set(snapshot, tables, store, tmp_path / "batch", seed=1, batch=timedelta(days=1))
    keys = [field.name for field in ROW_FIELDS]
    rows = _all_rows(batch, keys)
    times = rows["event_timestamp"]
    midnight = pc.floor_temporal(times, unit="day")
    categories = [f"t{int(item[1:]) % 5}" for item in rows["item_id"].to_pylist()]
    spine = rows.select(["user_id", "item_id"]).append_column("category", pa.array(categories))
    # By the other join: all of the evening before, but for how long ago that is.
    stored = join_features(spine.append_column("event_timestamp", midnight), tables)
    now = request_features(times, stored)
    features = [f.name for f in batch.manifest.features if f.name not in (*keys, "device")]
    found = _all_rows(batch, features)
    assert len(features) > 15 and set(now.column_names) & set(features)
    for name in features:
        expected = now[name] if name in now.column_names else stored[name]
        assert found[name].to_pylist() == expected.to_pylist(), name
    known = store.historical(spine.append_column("event_timestamp", times), known_at=midnight.combine_chunks())
    assert found.equals(known.select(features).combine_chunks()), "the store gives it, asked for that moment"

    streamed = _all_rows(built, [*keys, *features])
    assert streamed.select(keys).equals(rows), "the rows are the same"
    assert found["user_events_7d"] != streamed["user_events_7d"]
    longer = pc.subtract(found["user_recency_seconds"], streamed["user_recency_seconds"])
    assert pc.min(longer).as_py() == 0 and pc.max(longer).as_py() > 3_600, "what has happened since is not known"


def test_rows_of_an_hourly_batch_know_more_than_those_of_a_daily_one(
    log: tuple[Snapshot, FeatureTables], tmp_path: Path
) -> None:
    snapshot, tables = log
    store = FeatureStore.create(tmp_path / "store", tables)
    events = {}
    for hours in (1, 24):
        out = tmp_path / f"{hours}"
        batch = build_training_set(snapshot, tables, store, out, seed=1, batch=timedelta(hours=hours))
        events[hours] = _all_rows(batch, ["user_events_7d"])["user_events_7d"].fill_null(0).to_numpy()
    assert events[1].sum() > events[24].sum()


def test_after_a_change_most_of_what_came_since_is_left_to_learn_from(tmp_path: Path) -> None:
    _log(tmp_path / "log.parquet", 1200)
    mapping = Mapping.load(READING + '[split]\nvalidation_span = "1d"\ntest_span = "1d"\n')
    as_of = START + timedelta(days=20)
    snapshot = ingest_log(mapping, str(tmp_path / "log.parquet"), tmp_path / "snapshot", as_of=as_of)
    tables = build_feature_tables(snapshot, tmp_path / "tables")

    def spans(changed_at: datetime | None) -> list[timedelta]:
        built = build_training_set(snapshot, tables, Joined(tables), tmp_path / f"{changed_at}", changed_at=changed_at)
        assert all(built.read(split).num_rows for split in SPLITS)
        validation, test = (built.manifest.splits[split].start for split in SPLITS[1:])
        return [test - validation, as_of - test]

    day = timedelta(days=1)
    assert spans(None) == spans(as_of - 7 * day) == [day, day]
    assert spans(as_of - 3 * day) == [day / 2, day / 2]
