"""Clicks find their impressions, labels mature, and what was known once stays known."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evergreen.contracts.errors import ArtifactError, InputError
from evergreen.contracts.impressions import impression_schema
from evergreen.contracts.mapping import Mapping
from evergreen.contracts.outcomes import MATURE, Outcomes, OutcomesManifest, event_mapping
from evergreen.contracts.training_set import ColumnKind, Feature, FeatureOrigin
from evergreen.monitoring import outcomes as module
from evergreen.monitoring.outcomes import join_outcomes

NOON = datetime(2026, 3, 9, 12, tzinfo=UTC)
WINDOW = timedelta(hours=1)
PRICE = Feature(name="price", kind=ColumnKind.NUMERIC, origin=FeatureOrigin.ITEM)
DEVICE = Feature(name="device", kind=ColumnKind.CATEGORICAL, origin=FeatureOrigin.CONTEXT)


class Logs:
    """A folder of impressions and one of clicks, written by hand."""

    def __init__(self, root: Path) -> None:
        self.impressions, self.clicks, self.out = root / "impressions", root / "clicks", root / "outcomes"
        self.clicks.mkdir()
        self._files = 0

    def show(self, request_id: str, *items: str | None, at: datetime = NOON, **columns: Any) -> None:
        """Write a request's impressions; other columns by name."""
        features = columns.pop("features", (PRICE,))
        schema = impression_schema(features)
        rows = [
            {
                "request_id": request_id,
                "event_timestamp": at,
                "served_at": at,
                "user_id": "u",
                "known_user": True,
                "model_version": "m",
                "degraded": False,
                "sampling_rate": 1.0,
                "item_id": item,
                "category": "c",
                "position": place if item is not None else None,
                "score": 0.1,
                "features": {"price": 1.0, "device": "phone"},
                **columns,
            }
            for place, item in enumerate(items, start=1)
        ]
        folder = self.impressions / f"date={at.date()}"
        folder.mkdir(parents=True, exist_ok=True)
        self._files += 1
        pq.write_table(pa.Table.from_pylist(rows, schema), folder / f"{self._files:04d}.parquet")

    def click(self, *clicks: tuple[str | None, str | None, datetime | None], **columns: Sequence[Any]) -> None:
        """Write a file of clicks."""
        names = ("request_id", "item_id", "click_timestamp")
        types = (pa.string(), pa.string(), pa.timestamp("us", tz="UTC"))
        arrays = {n: pa.array([c[i] for c in clicks], types[i]) for i, n in enumerate(names)}
        self._files += 1
        pq.write_table(pa.table(arrays | columns), self.clicks / f"{self._files:04d}.parquet")

    def join(self, as_of: datetime, **options: Any) -> OutcomesManifest:
        """Join the two."""
        options = {"window": WINDOW} | options
        return join_outcomes(str(self.impressions), str(self.clicks), self.out, as_of=as_of, **options)

    def labels(self, as_of: datetime | None = None, *, mature: bool = False) -> dict[tuple[str, str | None], bool]:
        """Label by request and item."""
        found = {}
        for table in Outcomes.load(self.out).rows(as_of=as_of, mature=mature):
            for row in table.to_pylist():
                assert (row["request_id"], row["item_id"]) not in found
                found[row["request_id"], row["item_id"]] = row["clicked"]
        return found


@pytest.fixture
def logs(tmp_path: Path) -> Logs:
    return Logs(tmp_path)


def minutes(number: float) -> datetime:
    return NOON + timedelta(minutes=number)


def test_click_joins_by_request_and_item_within_the_window(logs: Logs) -> None:
    logs.show("r1", "a", "b")
    logs.show("r2", "a")
    logs.click(("r1", "b", minutes(5)), rating=pa.array([4.0]), dwell_seconds=pa.array([30.0]))
    join = logs.join(minutes(120)).joins[-1]
    assert logs.labels() == {("r1", "a"): False, ("r1", "b"): True, ("r2", "a"): False}
    assert (join.impressions, join.clicks, join.attributed, join.quarantined) == (3, 1, 1, {})
    (row,) = (row for table in Outcomes.load(logs.out).rows() for row in table.to_pylist() if row["clicked"])
    assert (row["click_timestamp"], row["rating"], row["dwell_seconds"]) == (minutes(5), 4.0, 30.0)


def test_clicks_that_belong_to_nothing_are_counted_by_reason_and_kept(logs: Logs) -> None:
    logs.show("r1", "a", "b")
    logs.click(
        ("r1", "a", minutes(10)),
        ("r1", "a", minutes(3)),  # the first, though it comes second
        ("r1", "b", minutes(-1)),
        ("r1", "b", minutes(61)),
        ("r1", "c", minutes(5)),
        ("r9", "a", minutes(5)),
        (None, "a", minutes(5)),
        ("r1", "b", None),
    )
    join = logs.join(minutes(120)).joins[-1]
    assert join.attributed == 1
    assert join.quarantined == {
        module.DUPLICATE: 1,
        module.TOO_EARLY: 1,
        module.TOO_LATE: 1,
        module.NO_IMPRESSION: 2,
        module.NO_REQUEST: 1,
        module.NO_TIME: 1,
    }
    rows = pq.ParquetFile(logs.out / "quarantine/join-0001.parquet").read().to_pylist()
    assert [row["line"] for row in rows] == [1, 3, 4, 5, 6, 7, 8], "the second line is the click that counts"
    assert rows[0]["reason"] == module.DUPLICATE and rows[2]["click_timestamp"].startswith("2026-03-09 13:01")


@pytest.mark.parametrize(("after", "clicked"), [(0, True), (60, True), (60.001, False), (-0.001, False)])
def test_window_holds_both_of_its_ends(logs: Logs, after: float, clicked: bool) -> None:
    logs.show("r", "a")
    logs.click(("r", "a", minutes(after)))
    logs.join(minutes(180))
    assert logs.labels() == {("r", "a"): clicked}


def test_label_is_mature_when_its_window_is_over(logs: Logs) -> None:
    logs.show("old", "a", at=minutes(0))
    logs.show("young", "a", at=minutes(0.001))
    manifest = logs.join(minutes(60))
    assert logs.labels(mature=True) == {("old", "a"): False} and len(logs.labels()) == 2
    assert (manifest.latest()[0].rows, manifest.latest()[0].mature_rows) == (2, 1)


def test_click_at_the_very_moment_is_known_when_its_label_is_mature(logs: Logs) -> None:
    logs.show("r", "a")
    logs.click(("r", "a", minutes(60)))
    logs.join(minutes(60))
    assert logs.labels(mature=True) == {("r", "a"): True}


def test_nothing_of_the_future_is_known(logs: Logs) -> None:
    logs.show("r1", "a")
    logs.show("r2", "a", at=minutes(30))
    logs.click(("r1", "a", minutes(31)))
    join = logs.join(minutes(30)).joins[-1]
    assert logs.labels() == {("r1", "a"): False}
    assert join.clicks_left_out == {module.AFTER_AS_OF: 1} and join.impressions_left_out == {module.AFTER_AS_OF: 1}


def test_late_click_makes_a_new_revision_and_the_old_one_stays_readable(logs: Logs) -> None:
    logs.show("r1", "a", "b")
    logs.show("r2", "a", at=NOON + timedelta(days=1))
    first_as_of, second_as_of = NOON + timedelta(days=1), NOON + timedelta(days=2)
    logs.join(first_as_of)
    old = (logs.out / "date=2026-03-09/revision-0001.parquet").read_bytes()
    logs.click(("r1", "b", minutes(30)))  # long ago, but it comes in only now
    manifest = logs.join(second_as_of)
    assert [(r.date, r.number, r.corrected_rows) for r in manifest.revisions] == [
        (date(2026, 3, 9), 1, 0),
        (date(2026, 3, 9), 2, 1),
        (date(2026, 3, 10), 1, 0),
    ]
    assert (logs.out / "date=2026-03-09/revision-0001.parquet").read_bytes() == old
    assert logs.labels(first_as_of) == {("r1", "a"): False, ("r1", "b"): False}
    assert logs.labels(second_as_of) == {("r1", "a"): False, ("r1", "b"): True, ("r2", "a"): False}
    assert logs.labels(first_as_of - timedelta(seconds=1)) == {}


def test_label_that_matured_without_a_new_revision_is_corrected_all_the_same(logs: Logs) -> None:
    logs.show("r", "a")
    logs.join(minutes(30))  # still open
    logs.join(minutes(120))  # mature, and as it was
    logs.click(("r", "a", minutes(45)))
    manifest = logs.join(minutes(180))
    assert [(r.number, r.corrected_rows) for r in manifest.revisions] == [(1, 0), (2, 1)]


def test_date_that_is_as_it_was_is_not_written_again(logs: Logs) -> None:
    logs.show("r1", "a")
    logs.show("r2", "a", at=NOON + timedelta(days=1))
    logs.join(NOON + timedelta(days=1, hours=5))
    manifest = logs.join(NOON + timedelta(days=2))
    assert manifest.joins[-1].written == 0 and len(manifest.revisions) == 2


def test_label_does_not_mature_by_waiting_without_a_join(logs: Logs) -> None:
    logs.show("r", "a")
    logs.join(minutes(30))
    assert logs.labels(minutes(600), mature=True) == {}
    logs.join(minutes(90))
    assert logs.labels(minutes(600), mature=True) == {("r", "a"): False}


def test_join_of_the_same_moment_again_changes_nothing(logs: Logs) -> None:
    logs.show("r1", "a")
    logs.join(minutes(90))
    before = {file: file.read_bytes() for file in logs.out.rglob("*") if file.is_file()}
    logs.click(("r1", "a", minutes(5)))
    logs.join(minutes(90))
    assert {file: file.read_bytes() for file in logs.out.rglob("*") if file.is_file()} == before


def test_killed_join_run_again_gives_what_one_run_gives(logs: Logs, monkeypatch: pytest.MonkeyPatch) -> None:
    logs.show("r1", "a")
    logs.show("r2", "a", at=NOON + timedelta(days=1))
    logs.click(("r9", "a", minutes(5)))

    class KilledError(BaseException):
        pass

    def kill(*_: Any) -> None:
        raise KilledError

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(module._Join, "_delay", kill)  # all files are written, the manifest is not
        logs.join(NOON + timedelta(days=2))
    assert not (logs.out / "manifest.json").exists() and (logs.out / "date=2026-03-09/revision-0001.parquet").exists()
    manifest = logs.join(NOON + timedelta(days=2))
    assert [r.number for r in manifest.revisions] == [1, 1] and not (logs.out / ".scratch").exists()
    assert logs.labels() == {("r1", "a"): False, ("r2", "a"): False}


def test_moment_before_the_last_join_is_refused_and_names_the_way_out(logs: Logs) -> None:
    logs.show("r", "a")
    logs.join(minutes(90))
    with pytest.raises(ArtifactError, match=r"knows the clicks until .*13:30.*read it as of"):
        logs.join(minutes(80))


def test_another_window_or_mapping_is_another_folder(logs: Logs) -> None:
    logs.show("r", "a")
    logs.join(minutes(90))
    with pytest.raises(ArtifactError, match=r"window of 1:00:00, now asked for None and 2:00:00"):
        logs.join(minutes(95), window=2 * WINDOW)
    with pytest.raises(ArtifactError, match=r"mapping None .*now asked for simulated [0-9a-f]{12}"):
        logs.join(minutes(95), mapping=Mapping.load("simulated"))


def test_item_that_a_request_shows_twice_counts_once(logs: Logs) -> None:
    logs.show("r", "a", score=0.25)
    logs.show("r", "a", at=minutes(1), score=0.75)
    logs.click(("r", "a", minutes(2)))
    join = logs.join(minutes(90)).joins[-1]
    (row,) = (row for table in Outcomes.load(logs.out).rows() for row in table.to_pylist())
    assert row["score"] == 0.25 and row["clicked"] and join.impressions == 1
    assert join.impressions_left_out == {module.SAME_ITEM_TWICE: 1}


def test_request_id_that_comes_again_takes_no_click_from_the_first(logs: Logs) -> None:
    midnight = datetime(2026, 3, 10, tzinfo=UTC)
    logs.show("r", "a", at=midnight - timedelta(minutes=1))
    logs.show("r", "a", at=midnight + timedelta(minutes=1))
    logs.click(("r", "a", midnight + timedelta(minutes=2)))
    assert logs.join(midnight + timedelta(hours=3)).joins[-1].attributed == 1
    rows = [row for table in Outcomes.load(logs.out).rows() for row in table.to_pylist()]
    assert [row["clicked"] for row in rows] == [True, False]


def test_click_after_midnight_is_of_the_date_that_was_shown(logs: Logs) -> None:
    midnight = datetime(2026, 3, 10, tzinfo=UTC)
    logs.show("r", "a", at=midnight - timedelta(minutes=1))
    logs.click(("r", "a", midnight + timedelta(minutes=1)))
    manifest = logs.join(midnight + timedelta(hours=3), start=midnight)
    assert manifest.revisions == () and manifest.joins[-1].quarantined == {}
    assert manifest.joins[-1].clicks_left_out == {module.EARLIER_DATE: 1}
    assert manifest.joins[-1].impressions_left_out == {module.BEFORE_START: 1}


def test_start_moves_back_to_where_labels_were_open(logs: Logs) -> None:
    midnight = datetime(2026, 3, 10, tzinfo=UTC)
    logs.show("r", "a", at=midnight - timedelta(minutes=1))
    logs.join(midnight)
    logs.click(("r", "a", midnight + timedelta(minutes=1)))
    manifest = logs.join(midnight + timedelta(days=2), start=midnight + timedelta(days=2))
    assert logs.labels(mature=True) == {("r", "a"): True}
    assert manifest.joins[-1].start == midnight - timedelta(days=1)


def test_log_without_items_joins_by_request(logs: Logs) -> None:
    logs.show("r1", None)
    logs.show("r2", None)
    (logs.clicks / "clicks.csv").write_text("request_id,click_timestamp\nr2,2026-03-09T12:01:00Z\n")
    logs.join(minutes(90))
    assert logs.labels() == {("r1", None): False, ("r2", None): True}


def test_csv_keeps_ids_of_digits_and_times_of_any_offset(logs: Logs) -> None:
    logs.show("007", "01")
    (logs.clicks / "clicks.csv").write_text(
        "user,click_timestamp,item_id,request_id\nu,2026-03-09T14:05:00+02:00,01,007\nu,yesterday,01,007\n"
    )
    join = logs.join(minutes(90)).joins[-1]
    assert logs.labels() == {("007", "01"): True} and join.quarantined == {module.NO_TIME: 1}


def test_rows_that_are_not_clicked_are_no_clicks(logs: Logs) -> None:
    logs.show("r", "a", "b")
    logs.click(("r", "a", minutes(1)), ("r", "b", None), clicked=pa.array([True, False]))
    join = logs.join(minutes(90)).joins[-1]
    assert logs.labels() == {("r", "a"): True, ("r", "b"): False}
    assert join.clicks == 2 and join.clicks_left_out == {module.NOT_CLICKED: 1} and join.quarantined == {}


def test_click_log_that_is_missing_or_lacks_a_column_is_named(logs: Logs, tmp_path: Path) -> None:
    logs.show("r", "a")
    with pytest.raises(InputError, match="nowhere: no such file or folder of clicks"):
        join_outcomes(str(logs.impressions), str(tmp_path / "nowhere"), logs.out, window=WINDOW, as_of=minutes(90))
    (logs.clicks / "clicks.csv").write_text("request,item_id\nr,a\n")
    with pytest.raises(InputError, match=r"clicks.csv: a click log needs a column 'request_id'.*request, item_id"):
        logs.join(minutes(90))
    assert not logs.out.joinpath("manifest.json").exists()


def test_empty_click_log_is_no_error(logs: Logs) -> None:
    logs.show("r", "a")
    join = logs.join(minutes(90)).joins[-1]
    assert join.clicks == 0 and join.delay.clicks == 0 and logs.labels() == {("r", "a"): False}


def test_delay_is_that_of_clicks_whose_window_is_over(logs: Logs) -> None:
    for number in range(10):
        logs.show(f"old{number}", "a")
    logs.show("young", "a", at=minutes(100))
    logs.click(*[(f"old{n}", "a", minutes(6 * (n + 1))) for n in range(10)], ("young", "a", minutes(100.1)))
    delay = logs.join(minutes(120)).joins[-1].delay
    assert delay.clicks == 10, "a young impression has only its fast clicks yet"
    assert delay.quantiles_seconds["0.5"] == pytest.approx(33 * 60)
    assert delay.later_than == pytest.approx({"0.1": 0.9, "0.5": 0.5, "0.9": 0.1})


def test_degraded_impressions_and_their_weights_are_carried(logs: Logs) -> None:
    logs.show("r", "a", degraded=True, sampling_rate=0.25, model_version="m2", score=0.75)
    manifest = logs.join(minutes(90))
    (row,) = (row for table in Outcomes.load(logs.out).rows() for row in table.to_pylist())
    assert (row["degraded"], row["sampling_rate"], row["model_version"], row["score"]) == (True, 0.25, "m2", 0.75)
    assert manifest.latest()[0].degraded_rows == 1 and manifest.joins[-1].lowest_sampling_rate == 0.25


def test_models_with_other_features_share_a_file(logs: Logs) -> None:
    mapping = Mapping.load("simulated")
    logs.show("r1", "a", features=(PRICE,), model_version="m1")
    logs.show("r2", "a", features=(PRICE, DEVICE), model_version="m2")
    logs.show("r3", "a", features=(), model_version="m3")
    logs.join(minutes(90), mapping=mapping)
    table = pa.concat_tables(Outcomes.load(logs.out).rows(columns=["request_id", "feature_price", "feature_device"]))
    assert table.to_pylist() == [
        {"request_id": "r1", "feature_price": 1.0, "feature_device": None, MATURE: True},
        {"request_id": "r2", "feature_price": 1.0, "feature_device": "phone", MATURE: True},
        {"request_id": "r3", "feature_price": None, "feature_device": None, MATURE: True},
    ]


def test_rows_are_read_of_a_range_of_time(logs: Logs) -> None:
    for number in range(4):
        logs.show(f"r{number}", "a", at=NOON + timedelta(hours=12 * number))
    logs.join(NOON + timedelta(days=3))
    read = Outcomes.load(logs.out).rows(start=NOON + timedelta(hours=12), end=NOON + timedelta(hours=36))
    assert [row for table in read for row in table["request_id"].to_pylist()] == ["r1", "r2"]


@pytest.mark.parametrize("name", Mapping.shipped())
def test_exported_mapping_of_every_log_is_read_as_it_was_meant(name: str, logs: Logs) -> None:
    mapping = Mapping.load(name)
    logs.show("r", "a")
    logs.join(minutes(90), mapping=mapping)
    written = Outcomes.load(logs.out).export_click_log(logs.out.parent / "log")
    assert Mapping.load(str(written)) == event_mapping(mapping, WINDOW)


def test_outcomes_of_which_a_file_is_missing_are_refused(logs: Logs) -> None:
    logs.show("r", "a")
    logs.join(minutes(90))
    (logs.out / "date=2026-03-09/revision-0001.parquet").unlink()
    with pytest.raises(ArtifactError, match=r"revision-0001\.parquet is missing"):
        Outcomes.load(logs.out)


Event = tuple[int, int, int]
"""Request, item, minutes."""
EVENTS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(-30, 200)), max_size=12)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(clicks=EVENTS, arrives=st.lists(st.integers(0, 3), min_size=12, max_size=12), in_time=st.booleans())
def test_however_clicks_come_in_the_labels_are_those_of_one_join(
    clicks: list[Event], arrives: list[int], in_time: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Joined in four steps across midnight with clicks that come late, or at once: the same labels.

    Where clicks come in time, a join may leave aside the dates before it.
    """

    def at(number: float) -> datetime:
        return datetime(2026, 3, 9, 23, tzinfo=UTC) + timedelta(minutes=number)

    ends = [60, 100, 130, 300]
    if in_time:
        arrives = [next(step for step, end in enumerate(ends) if m <= end) for _, _, m in clicks]
    stepwise, at_once = (Logs(tmp_path_factory.mktemp("logs")) for _ in range(2))
    shown = {(f"r{r}", f"i{i}"): at(25 * r) for r in range(4) for i in range(3)}
    for logs in (stepwise, at_once):
        for r in range(4):
            logs.show(f"r{r}", "i0", "i1", "i2", at=at(25 * r))
    seen = []
    for step, end in enumerate(ends):
        new = [(f"r{r}", f"i{i}", at(m)) for (r, i, m), a in zip(clicks, arrives, strict=False) if a == step]
        if new:
            stepwise.click(*new)
        stepwise.join(at(end), start=at(end) if in_time else None)
        seen.append(stepwise.labels())
    if clicks:
        at_once.click(*[(f"r{r}", f"i{i}", at(m)) for r, i, m in clicks])
    at_once.join(at(ends[-1]))
    truth = {
        key: any((f"r{r}", f"i{i}") == key and 0 <= (at(m) - moment) / WINDOW <= 1 for r, i, m in clicks)
        for key, moment in shown.items()
    }
    assert stepwise.labels() == at_once.labels() == truth
    for end, labels in zip(ends, seen, strict=True):
        assert stepwise.labels(at(end)) == labels
    for logs in (stepwise, at_once):
        for join in Outcomes.load(logs.out).manifest.joins:
            counted = sum(join.quarantined.values()) + sum(join.clicks_left_out.values())
            assert join.attributed + counted == join.clicks, "every click is somewhere"
