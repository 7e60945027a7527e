"""Labels beside a snapshot, and the snapshot without what they label."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pytest

from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.snapshot import Snapshot
from evergreen.fraud.filter import SUSPICIOUS, FilterConfig, filter_events, without_suspicious
from evergreen.fraud.labels import SUSPICIOUS_EVENTS, SUSPICIOUS_USERS, SuspiciousEvents
from evergreen.fraud.rules import Limits
from tests.unit.fraud.conftest import MAPPING

DAY = 86_400.0
Ingest = Callable[..., Snapshot]


def _log() -> list[dict[str, Any]]:
    """Sixty people over four days, and a crawler that runs on the second and looks in on the third."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(60):
        for visit in range(20):
            at = rng.uniform(0, 4 * DAY)
            for position in range(1, 6):
                clicked = bool(rng.random() < 0.06 / position)
                item = f"i{rng.integers(30)}"
                request = f"r{user}-{visit}"
                rows.append(_row(at, f"u{user}", item, position, clicked, request))
    for n in range(100):
        rows += [_row(1.5 * DAY + n, "bot", f"i{k}", k + 1, True, f"b{n}") for k in range(5)]
    rows.append(_row(2.5 * DAY, "bot", "i1", 1, False, "b-last"))
    return rows


def _row(at: float, user: str, item: str, position: int, clicked: bool, request: str) -> dict[str, Any]:
    return {
        "at": at,
        "user_id": user,
        "item_id": item,
        "position": position,
        "clicked": clicked,
        "request_id": request,
    }


@pytest.fixture(scope="module")
def snapshot(ingest: Ingest) -> Snapshot:
    return ingest(_log())


@pytest.fixture(scope="module")
def labels(snapshot: Snapshot, tmp_path_factory: pytest.TempPathFactory) -> SuspiciousEvents:
    config = FilterConfig(false_positive_share=0)
    return filter_events(snapshot, tmp_path_factory.mktemp("labels") / "suspicious", config=config)


def _events(snapshot: Snapshot) -> pa.Table:
    return ds.dataset(snapshot.files).to_table()


def test_all_of_a_bots_day_is_labelled_and_no_other_day(snapshot: Snapshot, labels: SuspiciousEvents) -> None:
    events = _events(snapshot)
    bots = pc.and_(pc.equal(events["user_id"], "bot"), pc.equal(pc.day(events["event_timestamp"]), 2))
    assert labels.events()["event_id"].to_pylist() == sorted(events.filter(bots)["event_id"].to_pylist())
    assert set(labels.events()["user_id"].to_pylist()) == {"bot"}


def test_labels_say_why_and_count(labels: SuspiciousEvents) -> None:
    manifest = labels.manifest
    assert (manifest.suspicious_events, manifest.suspicious_positives, manifest.suspicious_users) == (500, 500, 1)
    assert manifest.reasons.keys() >= {"velocity", "click_rate"}
    assert {reason for reasons in labels.events()["reasons"].to_pylist() for reason in reasons} == set(manifest.reasons)
    assert (manifest.events, manifest.users, manifest.without_user) == (6_501, 61, 0)
    assert labels.events().schema.equals(SUSPICIOUS_EVENTS) and labels.users().schema.equals(SUSPICIOUS_USERS)


def test_every_user_is_in_the_list_and_the_worst_comes_first(labels: SuspiciousEvents) -> None:
    users = labels.users().to_pylist()
    assert len(users) == 61 and users[0]["user_id"] == "bot"
    assert users[0]["suspicious_events"] == 500 and users[0]["events"] == 501 and users[0]["score"] == 1.0
    assert all(user["suspicious_events"] == 0 and user["reasons"] == [] for user in users[1:])


def test_report_tells_how_many_why_and_whose(labels: SuspiciousEvents) -> None:
    text = (labels.path / labels.REPORT).read_text()
    assert "500 of 6,501 events" in text
    assert "<code>bot</code>" in text
    assert "more than 20 requests in a minute" in text


def test_same_snapshot_gives_the_same_bytes_whatever_the_threads(
    snapshot: Snapshot, labels: SuspiciousEvents, tmp_path: Path
) -> None:
    again = filter_events(snapshot, tmp_path / "again", config=FilterConfig(false_positive_share=0), threads=3)
    for name in (labels.MANIFEST, labels.EVENTS, labels.USERS, labels.REPORT):
        assert (again.path / name).read_bytes() == (labels.path / name).read_bytes(), name


def test_snapshot_itself_is_not_touched(snapshot: Snapshot, labels: SuspiciousEvents) -> None:
    assert Snapshot.load(snapshot.path, verify=True).id == labels.manifest.snapshot_id


def test_filtered_snapshot_lacks_the_labelled_events_alone(
    snapshot: Snapshot, labels: SuspiciousEvents, tmp_path: Path
) -> None:
    filtered = without_suspicious(snapshot, labels, tmp_path / "filtered")
    kept, events = _events(filtered), _events(snapshot)
    suspicious = pc.is_in(events["event_id"], value_set=labels.events()["event_id"].combine_chunks())
    assert kept.equals(events.filter(pc.invert(suspicious)))
    manifest = Snapshot.load(filtered.path, verify=True).manifest
    assert manifest.rows == kept.num_rows == 6_001
    assert manifest.num_positives == pc.sum(kept["clicked"]).as_py()
    assert manifest.left_out == {SUSPICIOUS: 500}
    assert filtered.id != snapshot.id and manifest.mapping == snapshot.mapping and manifest.as_of == snapshot.as_of


def test_filtering_twice_finds_nothing_more(snapshot: Snapshot, labels: SuspiciousEvents, tmp_path: Path) -> None:
    filtered = without_suspicious(snapshot, labels, tmp_path / "filtered")
    again = filter_events(filtered, tmp_path / "again", config=FilterConfig(false_positive_share=0))
    assert again.manifest.suspicious_events == 0 and again.manifest.reasons == {}
    assert without_suspicious(filtered, again, tmp_path / "twice").id == filtered.id


def test_labels_of_another_snapshot_are_refused(ingest: Ingest, labels: SuspiciousEvents, tmp_path: Path) -> None:
    other = ingest([_row(0.0, "u", "i", 1, False, "r")])
    with pytest.raises(ArtifactError, match=r"labels of snapshot .* filter the events again"):
        without_suspicious(other, labels, tmp_path / "filtered")
    assert not (tmp_path / "filtered").exists()


def test_altered_labels_are_refused(snapshot: Snapshot, tmp_path: Path) -> None:
    written = filter_events(snapshot, tmp_path / "labels", config=FilterConfig(false_positive_share=0))
    (written.path / written.EVENTS).write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="altered after it was written"):
        SuspiciousEvents.load(written.path)


def test_a_log_of_bots_alone_is_not_emptied_in_silence(ingest: Ingest, tmp_path: Path) -> None:
    bots = ingest([_row(float(n), "bot", f"i{n}", 1, n % 9 == 0, f"r{n}") for n in range(300)])
    labels = filter_events(bots, tmp_path / "labels")
    assert labels.manifest.suspicious_events == 300
    with pytest.raises(ArtifactError, match="all 300 events are suspicious: loosen"):
        without_suspicious(bots, labels, tmp_path / "filtered")


def test_log_without_users_is_passed_on_whole_and_says_so(ingest: Ingest, tmp_path: Path) -> None:
    rows = [_row(float(n), "u", "i", 1, n % 9 == 0, f"r{n}") for n in range(50)]
    anonymous = ingest(rows, MAPPING.replace('user_id = "user_id"\n', ""))
    labels = filter_events(anonymous, tmp_path / "labels")
    assert (labels.manifest.suspicious_events, labels.manifest.without_user) == (0, 50)
    assert "50 events carry no user id" in (labels.path / labels.REPORT).read_text()
    filtered = without_suspicious(anonymous, labels, tmp_path / "filtered")
    assert filtered.manifest.files == anonymous.manifest.files


def test_who_never_clicks_is_labelled_from_the_first_event_on(ingest: Ingest, tmp_path: Path) -> None:
    rows = [_row(300.0 * n, "watcher", f"i{n % 40}", 1, False, f"w{n}") for n in range(1_200)]
    for user in range(60):
        visits = np.random.default_rng(user).uniform(0, 4 * DAY, 60)
        rows += [_row(at, f"u{user}", "i", 1, n % 12 == 0, f"u{user}-{n}") for n, at in enumerate(visits)]
    labels = filter_events(ingest(rows), tmp_path / "labels")
    assert {reason: (n.events, n.users) for reason, n in labels.manifest.reasons.items()} == {"no_clicks": (1_200, 1)}


def test_repeats_are_labelled_alone(ingest: Ingest, tmp_path: Path) -> None:
    rows = [_row(1_000.0 * n * n, "u", f"i{n}", 1, n % 5 == 0, f"r{n}") for n in range(40)]
    rows += [_row(1_001.0, "u", "i0", 1, True, "r0")]
    labels = filter_events(ingest(rows), tmp_path / "labels")
    assert labels.events()["reasons"].to_pylist() == [["repeated_click"]]


def test_given_limits_are_kept_and_an_unknown_click_rate_is_measured(snapshot: Snapshot, tmp_path: Path) -> None:
    config = FilterConfig(limits=Limits(requests_per_minute=5), false_positive_share=0)
    limits = filter_events(snapshot, tmp_path / "labels", config=config).manifest.limits
    assert limits.requests_per_minute == 5
    assert limits.click_rate == pytest.approx(0.03, rel=0.3)
    fixed = FilterConfig(limits=Limits(click_rate=0.5), false_positive_share=0)
    assert filter_events(snapshot, tmp_path / "fixed", config=fixed).manifest.limits.click_rate == 0.5


def test_mapping_of_interactions_is_judged_without_click_rates(ingest: Ingest, tmp_path: Path) -> None:
    mapping = MAPPING.replace("impressions", "interactions").split("[label]")[0].replace('position = "position"', "")
    rows = [_row(1_000.0 * n * n, "u", f"i{n}", 1, True, f"r{n}") for n in range(30)]
    rows += [_row(0.7 * n, "bot", f"i{n}", 1, True, f"b{n}") for n in range(90)]
    labels = filter_events(ingest(rows, mapping), tmp_path / "labels")
    assert labels.manifest.reasons.keys() <= {"velocity", "regular_clicks"}
    assert labels.manifest.reasons["velocity"].users == 1 and labels.manifest.suspicious_events == 90
