"""The impression log, with real feature tables, a stand-in model, and sinks that go away when they are told to."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prometheus_client import REGISTRY

from evergreen.contracts.errors import ArtifactError, InputError
from evergreen.contracts.impressions import feature_table, first_rows, from_message, read_impressions, to_messages
from evergreen.contracts.training_set import ColumnKind, Feature, FeatureOrigin
from evergreen.models.split.request import PairColumns
from evergreen.serving.answer import Answer
from evergreen.serving.impression_sinks import KafkaSink, ParquetSink, open_sink
from evergreen.serving.impressions import ImpressionLog, PairValues, Rows
from tests.serving import ask, make_answer

PRICE = Feature(name="price", kind=ColumnKind.NUMERIC, origin=FeatureOrigin.ITEM)
PRICES = pa.table({"price": [0.0, 1.0, 2.0], "category": ["c0", None, "c2"]})
HOUR = 3600.0


class Counts:
    """What the counters have counted since this was made."""

    def __init__(self) -> None:
        self._before = self._now()

    def _now(self) -> dict[tuple[str, str], float]:
        return {
            (sample.name.removeprefix("evergreen_impressions_"), sample.labels.get("reason", "")): sample.value
            for family in REGISTRY.collect()
            if family.name.startswith("evergreen_impressions_")
            for sample in family.samples
            if sample.name.endswith("_total")
        }

    def __call__(self) -> dict[str, int]:
        changes = {key: value - self._before.get(key, 0) for key, value in self._now().items()}
        return {
            " ".join((name.removesuffix("_total"), reason)).strip(): int(n)
            for (name, reason), n in changes.items()
            if n
        }


@pytest.fixture
def counts() -> Counts:
    return Counts()


class Memory:
    """A sink that keeps what it is given, and is away while it is told to be."""

    def __init__(self, *, away: bool = False) -> None:
        self.away = away
        self.tables: dict[str, pa.Table] = {}
        self.attempts = 0
        self.closed = False

    def write(self, name: str, rows: pa.Table) -> int:
        self.attempts += 1
        if self.away:
            raise ConnectionError("no route to the store")
        assert name not in self.tables, "written twice"
        self.tables[name] = rows
        return 0

    def close(self) -> None:
        self.closed = True

    @property
    def request_ids(self) -> list[str]:
        return [row for table in self.tables.values() for row in table["request_id"].to_pylist()]


def record(log: ImpressionLog, request_id: str, *, rows: tuple[int, ...] = (0, 2)) -> None:
    shown = [f"item-{row}" for row in rows]
    log.record(make_answer(*shown, request_id=request_id), (PRICE,), [Rows(PRICES, np.array(rows))])


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited 20 s"
        time.sleep(0.01)


def serve(serving: Any, log: ImpressionLog, **fields: Any) -> Answer:
    """Answer a request and log it."""
    return ask(serving.other(impressions=log), **fields)


def read(path: object) -> pa.Table:
    (table,) = read_impressions(str(path))
    return table


def test_a_row_is_a_shown_item_with_the_features_that_were_scored(
    parts: Callable[[str], Any], tmp_path: Path, counts: Counts
) -> None:
    serving = parts("impressions")
    with ImpressionLog(ParquetSink(str(tmp_path))) as log:
        given = serve(serving, log, user_id="u1", k=4, context={"device": "phone"}, request_id="r1")
        scored = serving.package.tables[-1]
        other = serve(serving, log, user_id="nobody yet", candidates=["item-1", "item-6"], request_id="r2")
    rows = read(tmp_path)
    assert rows["request_id"].to_pylist() == ["r1"] * 4 + ["r2"] * 2
    assert rows["item_id"].to_pylist() == given.item_ids + other.item_ids
    assert rows["position"].to_pylist() == [1, 2, 3, 4, 1, 2]
    assert rows["score"].to_pylist() == given.scores.tolist() + other.scores.tolist()
    assert rows["known_user"].to_pylist() == [True] * 4 + [False] * 2
    assert set(rows["model_version"].to_pylist()) == {"standin-0123456789ab"}
    assert rows["event_timestamp"][0].as_py() == given.event_timestamp
    features = feature_table(rows)
    assert features.column_names == [
        f.name for f in serving.package.info.features if f.name not in ("user_id", "item_id")
    ]
    place = {item: row for row, item in enumerate(scored["item_id"].to_pylist())}
    expected = scored.take([place[item] for item in given.item_ids])
    for name in features.column_names:
        assert features[name].to_pylist()[:4] == expected[name].to_pylist(), name
    categories = dict(zip(*(serving.store.items()[name].to_pylist() for name in ("item_id", "category")), strict=True))
    assert rows["category"].to_pylist() == [categories.get(item) for item in rows["item_id"].to_pylist()]
    assert counts() == {"written": 2}


def test_answer_that_nobody_is_shown_is_neither_logged_nor_counted(parts: Callable[[str], Any], tmp_path: Path) -> None:
    def answered() -> float:
        return REGISTRY.get_sample_value("evergreen_answers_total", {"degraded": "false"}) or 0.0

    serving, before = parts("ratings"), answered()
    with ImpressionLog(ParquetSink(str(tmp_path))) as log:
        hidden = serve(serving, log, user_id="u1", k=3, request_id="a canary's", shown=False)
        assert answered() == before
        given = serve(serving, log, user_id="u1", k=3, request_id="a user's", shown=True)
        assert answered() == before + 1
    assert hidden.item_ids == given.item_ids
    assert set(read(tmp_path)["request_id"].to_pylist()) == {"a user's"}


def test_log_of_ratings_has_the_rating_as_score(parts: Callable[[str], Any], tmp_path: Path) -> None:
    with ImpressionLog(ParquetSink(str(tmp_path))) as log:
        given = serve(parts("ratings"), log, user_id="u1", k=3, request_id="r1")
    assert read(tmp_path)["score"].to_pylist() == given.scores.tolist()


def test_log_without_items_has_a_row_for_each_request(parts: Callable[[str], Any], tmp_path: Path) -> None:
    with ImpressionLog(ParquetSink(str(tmp_path))) as log:
        given = [serve(parts("context_only"), log, context={"i1": i}, request_id=f"r{i}") for i in range(3)]
    rows = read(tmp_path)
    assert rows["score"].to_pylist() == [g.scores[0] for g in given]
    assert rows["item_id"].null_count == rows["position"].null_count == len(rows) == len(first_rows(rows)) == 3
    assert feature_table(rows)["i1"].to_pylist() == [0.0, 1.0, 2.0]


def test_sources_together_give_the_features_and_nulls_where_a_row_is_unknown(tmp_path: Path) -> None:
    age, rate = (Feature(name=n, kind=ColumnKind.NUMERIC, origin=FeatureOrigin.USER) for n in ("age", "rate"))
    pairs = PairColumns(("rate", "other"), np.array([[0.25, 1.0], [np.nan, 2.0]]), np.array([1, -1, 0]))
    with ImpressionLog(sink := Memory()) as log:
        for number, rows in enumerate([[2, -1], [-1, 1], [0, -1]]):
            sources = [
                {"age": 30 + number, "unread": object()},
                PairValues.of(pairs, np.array([2, number % 2])),
                Rows(PRICES, np.array(rows)),
                Rows(pa.table({"price": [99.0]}), np.zeros(2, np.int64)),  # whoever comes first is asked first
            ]
            shown = make_answer("a", "b", request_id=f"r{number}", degraded=number == 1)
            log.record(shown, (age, rate, PRICE), sources)
    (table,) = sink.tables.values()
    assert feature_table(table)["price"].to_pylist() == [2.0, None, None, 1.0, 0.0, None]
    assert feature_table(table)["age"].to_pylist() == [30.0, 30.0, 31.0, 31.0, 32.0, 32.0]
    assert feature_table(table)["rate"].to_pylist() == [0.25, None] * 3
    assert table["category"].to_pylist() == ["c2", None, None, None, "c0", None]
    assert table["degraded"].to_pylist() == [False, False, True, True, False, False]


def test_model_that_reads_ids_alone_is_logged(tmp_path: Path) -> None:
    item = Feature(name="item_id", kind=ColumnKind.CATEGORICAL, origin=FeatureOrigin.ITEM)
    with ImpressionLog(ParquetSink(str(tmp_path))) as log:
        log.record(make_answer("a", "b"), (item,), [Rows(PRICES, np.array([0, 1]))])
    rows = read(tmp_path)
    assert rows["item_id"].to_pylist() == ["a", "b"] and rows["category"].to_pylist() == ["c0", None]
    assert feature_table(rows).column_names == []
    assert from_message(to_messages(rows)[0][1], (item,)).to_pylist() == rows.to_pylist()


def test_context_feature_may_have_the_name_of_a_column(tmp_path: Path) -> None:
    score = Feature(name="score", kind=ColumnKind.CATEGORICAL, origin=FeatureOrigin.CONTEXT)
    with ImpressionLog(ParquetSink(str(tmp_path))) as log:
        log.record(make_answer("a"), (score,), [{"score": "high"}])
    assert read(tmp_path)["score"].to_pylist() == [0.5]
    assert feature_table(read(tmp_path))["score"].to_pylist() == ["high"]


def test_message_gives_the_rows_back(parts: Callable[[str], Any]) -> None:
    serving = parts("impressions")
    with ImpressionLog(sink := Memory()) as log:
        serve(serving, log, user_id="u1", k=3, context={"device": "phone", "battery": 0.25}, request_id="r1")
        serve(serving, log, user_id="nobody yet", candidates=["item-2"], request_id="r2")
    (rows,) = sink.tables.values()
    messages = to_messages(rows)
    assert [key for key, _ in messages] == [b"u1", b"nobody yet"]
    features = serving.package.info.features
    again = pa.concat_tables(from_message(value, features) for _, value in messages)
    assert again.schema == rows.schema and again.to_pylist() == rows.to_pylist()
    with pytest.raises(ArtifactError, match="which the model does not read"):
        from_message(messages[0][1], features[:-3])
    with pytest.raises(ArtifactError, match="of version 9, this Evergreen reads 1"):
        from_message(messages[0][1].replace(b'"schema_version":1', b'"schema_version":9'), features)
    with pytest.raises(ArtifactError, match="not an impression message"):
        from_message(b"{}", features)


def test_sink_that_is_away_is_tried_again_and_nothing_is_lost_or_doubled(
    counts: Counts, caplog: pytest.LogCaptureFixture
) -> None:
    sink = Memory(away=True)
    with caplog.at_level(logging.INFO, "evergreen"), ImpressionLog(sink, flush_seconds=0.05) as log:
        record(log, "r0")
        wait_until(lambda: sink.attempts >= 2)
        record(log, "r1")
        sink.away = False
        wait_until(lambda: len(sink.request_ids) == 4)
        record(log, "r2")
    assert sink.request_ids == ["r0", "r0", "r1", "r1", "r2", "r2"] and sink.closed
    said = [line.message for line in caplog.records]
    assert len(said) == 2 and "no route to the store" in said[0] and said[1] == "impressions are written again"
    assert counts().pop("sink_failures") >= 2 and counts()["written"] == 3


def test_full_memory_drops_new_requests_and_counts_them(counts: Counts) -> None:
    sink = Memory(away=True)
    log = ImpressionLog(sink, flush_seconds=0.05, flush_rows=2, capacity_rows=10)
    for number in range(8):
        record(log, f"r{number}")
    wait_until(lambda: sink.attempts > 0)
    record(log, "r8")
    assert counts()["dropped full"] == 4, "ten rows are five requests, whether in the queue or in a batch"
    sink.away = False
    wait_until(lambda: len(sink.request_ids) == 10)
    record(log, "r9")
    log.close()
    assert sink.request_ids == [f"r{n}" for n in (0, 1, 2, 3, 4, 9) for _ in range(2)]
    assert counts()["written"] == 6 and counts()["dropped full"] == 4


def test_request_that_cannot_be_encoded_is_dropped_alone(counts: Counts, caplog: pytest.LogCaptureFixture) -> None:
    with ImpressionLog(sink := Memory()) as log:
        record(log, "r0")
        record(log, "half a surrogate \ud800")
        log.record(make_answer("a", request_id="no price"), (PRICE,), [Rows(pa.table({"cost": [1.0]}), np.array([0]))])
        log.record(make_answer("a", request_id="too many rows"), (PRICE,), [Rows(PRICES, np.array([0, 1]))])
        log.record(make_answer("a", request_id="no such row"), (PRICE,), [Rows(PRICES, np.array([17]))])
        log.record(make_answer("a", request_id="text"), (PRICE,), [Rows(pa.table({"price": ["dear"]}), np.array([0]))])
        record(log, "r1")
    assert sink.request_ids == ["r0", "r0", "r1", "r1"]
    assert counts() == {"written": 2, "dropped encoding": 5}
    assert len(caplog.records) == 1 and "cannot be logged" in caplog.text


def test_rows_that_the_sink_can_never_write_do_not_hold_up_the_others(counts: Counts) -> None:
    class Choosy(Memory):
        def write(self, name: str, rows: pa.Table) -> int:
            if "r0" in rows["request_id"].to_pylist():
                raise pa.ArrowNotImplementedError("no such type in this format")
            return super().write(name, rows)

    sink = Choosy()
    with ImpressionLog(sink, flush_seconds=0.05) as log:
        record(log, "r0")
        wait_until(lambda: counts() == {"dropped refused": 1})
        record(log, "r1")
    assert sink.request_ids == ["r1", "r1"] and counts() == {"written": 1, "dropped refused": 1}


def test_sample_is_the_same_in_every_process_and_says_its_rate(counts: Counts) -> None:
    sinks = [Memory(), Memory()]
    for sink in sinks:
        with ImpressionLog(sink, sampling_rate=0.25) as log:
            for number in range(2000):
                record(log, f"r{number}", rows=(0,))
    first, second = (sink.request_ids for sink in sinks)
    assert first == second and 400 < len(first) < 600
    assert counts() == {"written": 2 * len(first), "left_out sampling": 4000 - 2 * len(first)}
    assert {rate for table in sinks[0].tables.values() for rate in table["sampling_rate"].to_pylist()} == {0.25}


def test_empty_answer_is_counted_and_not_logged(counts: Counts) -> None:
    with ImpressionLog(sink := Memory()) as log:
        record(log, "r", rows=())
    assert not sink.tables and counts() == {"left_out nothing_shown": 1}


def test_what_is_not_written_by_the_deadline_is_counted(counts: Counts, caplog: pytest.LogCaptureFixture) -> None:
    log = ImpressionLog(Memory(away=True))
    record(log, "r0")
    record(log, "r1")
    log.close(deadline_seconds=0.2)
    log.close()
    record(log, "r2")
    assert counts()["dropped closing"] == 3
    assert "impressions of 2 requests are lost: not written within 0.2 s" in caplog.text


def test_sink_that_hangs_holds_up_neither_requests_nor_the_end(counts: Counts) -> None:
    class Hanging(Memory):
        release = threading.Event()

        def write(self, name: str, rows: pa.Table) -> int:
            self.attempts += 1
            self.release.wait()
            return 0

    sink = Hanging()
    log = ImpressionLog(sink, flush_seconds=0.01, flush_rows=1, capacity_rows=4)
    record(log, "r0")
    wait_until(lambda: sink.attempts == 1)
    for number in range(1, 5):
        record(log, f"r{number}")
    log.close(deadline_seconds=0.1)
    assert counts() == {"dropped full": 3, "dropped closing": 2}
    assert not sink.closed, "the writer still uses it"
    sink.release.set()
    log._writer.join()  # or it would count into the next test


def test_threads_lose_nothing_between_them(counts: Counts) -> None:
    def serve_many(thread: int) -> None:
        for number in range(500):
            record(log, f"r{thread}-{number}")
            if number == 250:
                wait_until(lambda: bool(sink.tables))

    with ImpressionLog(sink := Memory(), flush_seconds=0.02, flush_rows=100) as log:
        threads = [threading.Thread(target=serve_many, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(sink.request_ids) == sorted(f"r{t}-{n}" for t in range(4) for n in range(500) for _ in range(2))
    assert counts() == {"written": 2000} and len(sink.tables) > 1


def test_models_with_other_features_have_files_of_their_own(tmp_path: Path) -> None:
    tags = Feature(name="tags", kind=ColumnKind.MULTI, origin=FeatureOrigin.ITEM)
    with ImpressionLog(ParquetSink(str(tmp_path))) as log:
        record(log, "r0")
        log.record(make_answer("a", request_id="r1", model="other-1"), (tags,), [{"tags": ["x", "y"]}])
    first, second = read_impressions(str(tmp_path))
    assert feature_table(first).column_names == ["price"]
    assert (
        feature_table(second).to_pylist() == [{"tags": ["x", "y"]}] and second["model_version"][0].as_py() == "other-1"
    )


def test_files_lie_in_the_folder_of_their_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    midnight = datetime(2026, 11, 24, tzinfo=UTC)
    with ImpressionLog(ParquetSink(str(tmp_path))) as log:
        for request_id, seconds in (("before", -1), ("after", 0)):
            monkeypatch.setattr(time, "time_ns", lambda s=seconds: int((midnight.timestamp() + s) * 1e9))
            record(log, request_id, rows=(0,))
    folders = {
        file.parent.name: pq.ParquetFile(file).read()["request_id"].to_pylist() for file in tmp_path.rglob("*.parquet")
    }
    assert folders == {"date=2026-11-23": ["before"], "date=2026-11-24": ["after"]}
    assert [t["request_id"].to_pylist() for t in read_impressions(str(tmp_path), start=midnight)] == [["after"]]
    assert [t["request_id"].to_pylist() for t in read_impressions(str(tmp_path), end=midnight)] == [["before"]]


def test_reader_never_sees_a_file_that_is_not_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = ParquetSink(str(tmp_path))
    with ImpressionLog(memory := Memory()) as log:
        record(log, "r0")
    ((name, rows),) = memory.tables.items()
    with monkeypatch.context() as patch:
        patch.setattr(type(sink._fs), "mv", lambda *_: (_ for _ in ()).throw(OSError("the disk is gone")))
        with pytest.raises(OSError, match="the disk is gone"):
            sink.write(name, rows)
    assert any(tmp_path.rglob("*.partial")) and list(read_impressions(str(tmp_path))) == []
    sink.write(name, rows)
    sink.write(name, rows)
    assert read(tmp_path).to_pylist() == rows.to_pylist(), "a repeated write makes the same file"
    assert not any(tmp_path.rglob("*.partial"))


@pytest.fixture
def memory_url() -> Iterator[str]:
    yield "memory://impressions"
    fsspec.filesystem("memory").rm("/impressions", recursive=True)


def test_any_file_system_of_fsspec_holds_a_log(memory_url: str) -> None:
    with ImpressionLog(ParquetSink(memory_url)) as log:
        record(log, "r0")
    assert read(memory_url)["request_id"].to_pylist() == ["r0", "r0"]


def test_folder_in_the_way_is_waited_out(tmp_path: Path, counts: Counts) -> None:
    (tmp_path / "log").write_text("a file where the folder should be")
    with ImpressionLog(ParquetSink(str(tmp_path / "log")), flush_seconds=0.02) as log:
        record(log, "r0")
        wait_until(lambda: "sink_failures" in counts())
        (tmp_path / "log").unlink()
    assert read(tmp_path / "log").num_rows == 2


def test_what_is_no_log_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such folder"):
        list(read_impressions(str(tmp_path / "none")))
    (tmp_path / "date=2026-01-01").mkdir()
    file = tmp_path / "date=2026-01-01" / "a.parquet"
    file.write_bytes(b"PAR1")
    with pytest.raises(ArtifactError, match="not a whole Parquet file"):
        list(read_impressions(str(tmp_path)))
    pq.write_table(pa.table({"a": [1]}), file)
    with pytest.raises(ArtifactError, match="impressions of version none, this Evergreen reads 1"):
        list(read_impressions(str(tmp_path)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampling_rate": 0.0}, "sampling_rate=0.0: must be above 0"),
        ({"sampling_rate": 1.5}, "sampling_rate=1.5: must be above 0 and at most 1"),
        ({"flush_seconds": 0}, "flush_seconds=0, .* must be positive"),
        ({"flush_rows": 10, "capacity_rows": 5}, "flush_rows at most capacity_rows"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImpressionLog(Memory(), **settings)


def test_sinks_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match="nosuch://x: cannot hold impressions"):
        ParquetSink("nosuch://x")
    with pytest.raises(InputError, match="correct its options"):
        open_sink("kafka://127.0.0.1:1/shown", {"no.such.option": "1"})
    with pytest.raises(InputError, match="write kafka://host:port/topic"):
        open_sink("kafka://127.0.0.1:9092")
    with pytest.raises(InputError, match=r"options \['acks'\] are given"):
        open_sink("shown", {"acks": "all"})


def test_target_names_the_sink(tmp_path: Path) -> None:
    assert isinstance(open_sink(str(tmp_path)), ParquetSink) and isinstance(open_sink("memory://shown"), ParquetSink)
    sink = open_sink("kafka://127.0.0.1:1,127.0.0.1:2/shown")
    assert isinstance(sink, KafkaSink)
    assert (sink._brokers, sink._topic) == ("127.0.0.1:1,127.0.0.1:2", "shown")
    sink.close()
