from __future__ import annotations

import fcntl
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.release import CanaryCheck, CanaryReport, ReleaseKind
from evergreen.release import store as store_module
from evergreen.release.store import LOCK, ReleaseStore

DAY = datetime(2026, 3, 9, tzinfo=UTC)


def package(folder: Path, version: str) -> Path:
    path = folder / "trained" / version
    path.mkdir(parents=True)
    (path / "model.json").write_text(version)
    return path


@pytest.fixture
def store(tmp_path: Path) -> ReleaseStore:
    store = ReleaseStore(tmp_path / "releases")
    store.release(package(tmp_path, "lr-1"), "lr-1", as_of=DAY, reason="the first")
    store.release(package(tmp_path, "fm-2"), "fm-2", as_of=DAY + timedelta(days=1), reason="better")
    return store


def serving(store: ReleaseStore) -> str:
    return (store.current / "model.json").read_text()


def test_the_last_release_serves_and_history_says_why(store: ReleaseStore) -> None:
    assert serving(store) == "fm-2"
    assert [(r.version, r.previous, r.reason) for r in store.history()] == [
        ("lr-1", None, "the first"),
        ("fm-2", "lr-1", "better"),
    ]


def test_way_back_is_one_step_and_leads_forward_again(store: ReleaseStore) -> None:
    back = store.roll_back(as_of=DAY + timedelta(days=2), reason="fewer clicks")
    assert (back.version, back.previous, back.kind) == ("lr-1", "fm-2", ReleaseKind.ROLLBACK)
    assert serving(store) == "lr-1"
    assert store.roll_back(as_of=DAY + timedelta(days=3), reason="it was the season").version == "fm-2"


def test_there_is_no_way_back_from_the_first(tmp_path: Path) -> None:
    store = ReleaseStore(tmp_path / "releases")
    with pytest.raises(ArtifactError, match="nothing served before"):
        store.roll_back(as_of=DAY, reason="?")
    store.release(package(tmp_path, "lr-1"), "lr-1", as_of=DAY, reason="the first")
    with pytest.raises(ArtifactError, match="nothing served before"):
        store.roll_back(as_of=DAY, reason="?")


def test_package_outlives_the_run_that_made_it(store: ReleaseStore, tmp_path: Path) -> None:
    import shutil

    shutil.rmtree(tmp_path / "trained")
    assert serving(store) == "fm-2"


def test_challenger_whose_canary_failed_is_not_released(store: ReleaseStore, tmp_path: Path) -> None:
    failed = CanaryCheck(name="failed_share", value=0.5, limit="at most 0", passed=False)
    report = CanaryReport(challenger="dlrm-3", champion="fm-2", num_requests=100, checks=(failed,))
    with pytest.raises(ArtifactError, match=r"dlrm-3 is not released: failed_share is 0\.5, at most 0 allowed"):
        store.release(package(tmp_path, "dlrm-3"), "dlrm-3", as_of=DAY + timedelta(days=2), reason="?", canary=report)
    assert serving(store) == "fm-2" and len(store.history()) == 2


def test_history_does_not_go_back_in_time(store: ReleaseStore, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="was released later"):
        store.release(package(tmp_path, "dlrm-3"), "dlrm-3", as_of=DAY, reason="?")


def test_release_that_broke_off_is_mended_from_the_history(store: ReleaseStore) -> None:
    store.current.unlink()
    store.current.symlink_to("packages/lr-1")
    store.repair()
    assert serving(store) == "fm-2"


def test_broken_line_of_the_history_is_named(store: ReleaseStore) -> None:
    with (store.path / "history.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(ArtifactError, match=r"history\.jsonl, line 3: not a release"):
        store.history()


def state(store: ReleaseStore) -> tuple[str, list[tuple[str, str]]]:
    return serving(store), [(one.version, one.kind.value) for one in store.history()]


def test_release_that_is_asked_for_again_is_made_once(store: ReleaseStore, tmp_path: Path) -> None:
    before = state(store)
    store.current.unlink()  # killed between the history and the link
    again = store.release(tmp_path / "gone", "fm-2", as_of=DAY + timedelta(days=1), reason="better")
    assert state(store) == before and again.previous == "lr-1"


def test_way_back_that_is_asked_for_again_is_taken_once(store: ReleaseStore) -> None:
    when = DAY + timedelta(days=2)
    store.roll_back(as_of=when, reason="fewer clicks")
    before = state(store)
    store.current.unlink()
    assert store.roll_back(as_of=when, reason="fewer clicks").version == "lr-1"
    assert state(store) == before


def test_release_that_was_taken_back_is_not_made_again_at_its_moment(store: ReleaseStore, tmp_path: Path) -> None:
    when = DAY + timedelta(days=1)
    store.roll_back(as_of=when, reason="the server could not load fm-2")
    before = state(store)
    with pytest.raises(ArtifactError, match=r"fm-2 was released at .* and taken back: the server could not load fm-2"):
        store.release(tmp_path / "trained" / "fm-2", "fm-2", as_of=when, reason="better")
    assert state(store) == before
    again = store.release(tmp_path / "trained" / "fm-2", "fm-2", as_of=when + timedelta(hours=1), reason="once more")
    assert again.previous == "lr-1" and serving(store) == "fm-2"


def test_history_is_never_half_written(store: ReleaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = state(store)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("evergreen.release.store.os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        store.release(package(tmp_path, "dlrm-3"), "dlrm-3", as_of=DAY + timedelta(days=2), reason="better")
    assert state(store) == before


def test_release_waits_for_another_and_then_is_made(store: ReleaseStore, tmp_path: Path) -> None:
    with (store.path / LOCK).open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        back = threading.Thread(target=store.roll_back, kwargs={"as_of": DAY + timedelta(days=2), "reason": "worse"})
        back.start()
        back.join(timeout=0.5)
        assert back.is_alive() and serving(store) == "fm-2"
    back.join()
    assert serving(store) == "lr-1"


def test_release_that_waited_in_vain_changes_nothing(
    store: ReleaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_LOCK_SECONDS", 0.0)
    with (store.path / LOCK).open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ArtifactError, match="somebody else has been releasing here"):
            store.roll_back(as_of=DAY + timedelta(days=2), reason="worse")
    assert serving(store) == "fm-2" and len(store.history()) == 2
