"""Watching a loop: a model's first window in service becomes its reference once that is over, and not before."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.impressions import impression_schema
from evergreen.contracts.loop_state import LoopState, put
from evergreen.contracts.monitoring_report import DriftStatus, MonitoringReport
from evergreen.contracts.quality import Reference
from evergreen.contracts.release import Release, ReleaseKind
from evergreen.models.package import ModelPackage
from evergreen.monitoring import watch as watching
from evergreen.monitoring.decision import decide
from evergreen.monitoring.gate import IN_SERVICE
from evergreen.monitoring.reference import MonitoringReference
from evergreen.monitoring.watch import watch
from tests.unit.models.small_package import make_package
from tests.unit.monitoring.served_days import DAY, FEATURES, MONDAY, impressions, reference
from tests.unit.monitoring.test_decision import NOW, estimate, quality, report

RELEASED = MONDAY + 7 * DAY
CHOSEN = 0.8
PACKAGE = make_package("logistic_regression")


class Loop:
    """A server's log, a day a file, and the state of a loop with one release."""

    def __init__(self, root: Path, released: datetime = RELEASED) -> None:
        self.state, self.log = LoopState(root / "state"), root / "impressions"
        self.log.mkdir()
        put(self.file, reference().model_copy(update={"model_version": PACKAGE.version}))
        self.release(PACKAGE.version, released)

    @property
    def file(self) -> Path:
        return self.state.reference(PACKAGE.version)

    @property
    def in_service(self) -> bool:
        return MonitoringReference.read(self.file).in_service is not None

    def release(self, version: str, at: datetime) -> None:
        releases = self.state.released()
        previous = releases[-1].version if releases else None
        line = Release(
            version=version, kind=ReleaseKind.RELEASE, released_at=at, reason="a test", previous=previous, canary=None
        )
        self.state.releases.mkdir(exist_ok=True, parents=True)
        with (self.state.releases / "history.jsonl").open("a") as history:
            history.write(line.model_dump_json() + "\n")

    def serve(self, day: int, *, shift: float = CHOSEN, model: str = PACKAGE.version) -> None:
        start = RELEASED + day * DAY
        rows = impressions(start, seed=day, shift=shift, model=model)
        folder = self.log / f"date={start:%Y-%m-%d}"
        folder.mkdir(exist_ok=True)
        pq.write_table(
            rows.cast(impression_schema(FEATURES)), folder / f"{start:%Y%m%dT%H%M%S}.000000Z-{model}-1-{day:06}.parquet"
        )

    def evening(self, day: int, package: ModelPackage = PACKAGE, window: timedelta = DAY) -> MonitoringReport:
        return watch(self.state, str(self.log), package, as_of=RELEASED + (day + 1) * DAY, window=window, page=False)


def against(report: MonitoringReport) -> bool:
    return IN_SERVICE in report.feature_drift.details["price"].against


def test_first_window_is_written_into_the_reference_when_it_is_over_and_not_before(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.serve(0)
    first = loop.evening(0)
    assert not loop.in_service and not against(first), "a window is not compared with itself"
    assert first.feature_drift.status is DriftStatus.DRIFTED
    loop.serve(1)
    second = loop.evening(1)
    assert loop.in_service and against(second)
    assert second.feature_drift.status is DriftStatus.STABLE
    found = MonitoringReference.read(loop.file).in_service
    assert found is not None and found.features.rows == first.rows, "of the first window alone"


def test_later_windows_do_not_move_the_reference(tmp_path: Path) -> None:
    """Were it to follow, a slow change would never be seen."""
    loop = Loop(tmp_path)
    for day in range(3):
        loop.serve(day)
    loop.evening(1)
    before = loop.file.read_bytes()
    loop.serve(3, shift=2 * CHOSEN)
    loop.evening(2)
    report = loop.evening(3)
    assert report.feature_drift.status is DriftStatus.DRIFTED and against(report)
    assert loop.file.read_bytes() == before


def test_window_that_overlaps_the_first_one_does_not_use_it(tmp_path: Path) -> None:
    loop = Loop(tmp_path, released=RELEASED + DAY / 2)
    for day in range(3):
        loop.serve(day)
    assert not against(loop.evening(1)) and not loop.in_service, "the first window ends at noon of that day"
    assert against(loop.evening(2))
    found = MonitoringReference.read(loop.file).in_service
    assert (
        found is not None
        and found.features.rows < MonitoringReport.read(loop.state.report(RELEASED + 2 * DAY)).rows * 1.2
    )


def test_model_that_was_not_released_before_the_window_has_no_first_one(tmp_path: Path) -> None:
    loop = Loop(tmp_path, released=RELEASED + 2 * DAY)
    for day in range(3):
        loop.serve(day)
    assert not against(loop.evening(1)) and not loop.in_service


def test_model_that_made_no_answer_on_its_first_day_waits_for_none(tmp_path: Path) -> None:
    """It serves others later: without a first day it is compared with the training data, as before."""
    loop = Loop(tmp_path)
    loop.serve(0, model="canary-0")
    loop.serve(1)
    report = loop.evening(1)
    assert not loop.in_service and not against(report) and report.rows > 0


def test_first_days_are_those_of_the_first_release_of_a_version(tmp_path: Path) -> None:
    """A rollback brings it back; what it is like is known already."""
    loop = Loop(tmp_path)
    loop.serve(0)
    loop.release("other-1", RELEASED + DAY)
    loop.serve(1, model="other-1")
    loop.release(PACKAGE.version, RELEASED + 2 * DAY)
    loop.serve(2, shift=2 * CHOSEN)
    report = loop.evening(2)
    assert against(report) and report.feature_drift.status is DriftStatus.DRIFTED


def test_report_that_is_there_stays(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.serve(0)
    before = loop.evening(0)
    loop.serve(1)
    loop.evening(1)
    assert loop.evening(0) == before and not against(loop.evening(0))


def test_model_without_a_reference_is_told_how_to_get_one(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.serve(0)
    loop.file.unlink()
    with pytest.raises(ArtifactError, match=r"no reference of the model that serves: write it with keep_reference"):
        loop.evening(0)


@pytest.mark.parametrize(
    ("change", "kept"),
    [(0.13, True), (0.005, False), (9.0, False)],
    ids=["worse, and waited for", "not worse", "severe, and retrained"],
)
def test_doubtful_window_is_followed_by_one_with_the_same_yardstick(tmp_path: Path, change: float, kept: bool) -> None:
    """A first day in service that is a bad one must not be what is expected of the model from then on."""
    state, as_of = LoopState(tmp_path), NOW + DAY
    expected = Reference(
        source="of the model before",
        normalized_entropy=estimate(0.8),
        calibration_ratio=estimate(1.0),
        auc=estimate(0.8),
    )
    seen = quality(change=change)
    [model] = seen.models
    seen = seen.model_copy(update={"models": (model.model_copy(update={"reference": expected}),)})
    decision = decide(report(quality=seen), [], as_of=NOW)
    put(state.decision(NOW), decision)
    found = watching._yardstick_of_a_doubt(state, "m2", as_of, NOW)
    assert found == (expected if kept else None)
    assert watching._yardstick_of_a_doubt(state, "m3", as_of, NOW) is None, "another model is not in doubt"
    assert watching._yardstick_of_a_doubt(state, "m2", as_of + DAY, as_of) is None, "it was not the window before"
