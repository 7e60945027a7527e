"""The state of a loop on disk: names, order, and what a killed writer leaves."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from evergreen.contracts.artifact import JsonModel
from evergreen.contracts.decision import RunRecord
from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.loop_state import LoopState, name_of, put
from evergreen.contracts.monitoring_report import DriftFinding, DriftStatus, MonitoringReport
from evergreen.contracts.release import Release, ReleaseKind

NOON = datetime(2026, 3, 9, 12, tzinfo=UTC)
DAY = timedelta(days=1)


def report(as_of: datetime) -> MonitoringReport:
    nothing = DriftFinding(status=DriftStatus.UNKNOWN, score=None, reason="no rows")
    return MonitoringReport(
        as_of=as_of,
        start=as_of - DAY,
        end=as_of,
        model_version="m",
        model_versions={},
        trained_as_of=None,
        requests=0,
        estimated_requests=0,
        hourly_requests=(),
        rows=0,
        users=0,
        feature_drift=nothing,
        prediction_drift=nothing,
        label_drift=nothing,
        signals=(),
        quality=None,
    )


def test_names_are_in_utc_and_sort_as_the_moments_do() -> None:
    berlin = timezone(timedelta(hours=1))
    assert name_of(datetime(2026, 3, 9, 13, tzinfo=berlin)) == "2026-03-09T120000Z" == name_of(NOON)
    moments = [NOON + timedelta(hours=hours) for hours in (0, 1, 13, 24 * 40, 24 * 400)]
    assert sorted(map(name_of, moments)) == [name_of(moment) for moment in moments]


@pytest.mark.parametrize(
    ("moment", "words"),
    [
        (datetime(2026, 3, 9), r"has no offset: write 2026-03-09T00:00:00\+00:00"),
        (NOON.replace(microsecond=5), "fraction"),
    ],
)
def test_moments_that_would_share_a_name_are_refused(moment: datetime, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        name_of(moment)


def test_reports_before_a_moment_leave_out_its_own(tmp_path: Path) -> None:
    state = LoopState(tmp_path)
    assert state.reports(NOON) == []
    for days in (2, 0, 1):
        put(state.report(NOON + days * DAY), report(NOON + days * DAY))
    assert [r.as_of for r in state.reports(NOON + 2 * DAY)] == [NOON, NOON + DAY]
    assert [r.as_of for r in state.reports(NOON + 2 * DAY, since=NOON + DAY)] == [NOON + DAY]
    assert len(state.reports()) == 3


def test_killed_writer_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = LoopState(tmp_path)
    put(state.report(NOON), report(NOON))
    before = state.report(NOON).read_bytes()

    def half(self: JsonModel, path: Path) -> None:
        path.write_text('{"as_of"')
        raise KeyboardInterrupt

    for moment in (NOON, NOON + DAY):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(JsonModel, "write", half)
            put(state.report(moment), report(moment))
    assert state.report(NOON).read_bytes() == before
    assert [r.as_of for r in state.reports()] == [NOON]
    for moment in (NOON, NOON + DAY):
        put(state.report(moment), report(moment))
    names = {file.name for file in state.report(NOON).parent.iterdir()}
    assert names == {"2026-03-09T120000Z.json", "2026-03-10T120000Z.json"}


def test_run_begins_ends_and_begins_again_after_it_was_killed(tmp_path: Path) -> None:
    state = LoopState(tmp_path)
    run_id = name_of(NOON)
    with pytest.raises(ArtifactError, match=run_id):
        state.finish_run(run_id, NOON)
    assert state.start_run(run_id, NOON) == state.start_run(run_id, NOON)
    assert state.runs() == [RunRecord(run_id=run_id, started_at=NOON)]
    state.finish_run(run_id, NOON)
    state.start_run(name_of(NOON + DAY), NOON + DAY)
    assert [run.finished_at for run in state.runs()] == [NOON, None]


def test_release_of_a_moment_is_not_what_served_until_then(tmp_path: Path) -> None:
    state = LoopState(tmp_path)
    assert state.released() == []
    state.releases.mkdir()
    lines = [
        Release(version=v, kind=ReleaseKind.RELEASE, released_at=at, reason="r", previous=p).model_dump_json()
        for v, at, p in (("a", NOON, None), ("b", NOON + DAY, "a"))
    ]
    (state.releases / "history.jsonl").write_text("\n".join(lines) + "\n")
    assert [r.version for r in state.released()] == ["a", "b"]
    assert [r.version for r in state.released(before=NOON + DAY)] == ["a"]
