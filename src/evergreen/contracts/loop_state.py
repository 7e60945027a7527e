"""The state of a loop on disk: what was known, found, decided and done, window by window.

    state/
      outcomes/                        contracts.outcomes
      reports/<as_of>.json, .html      MonitoringReport of a window, and its page by Evidently
      decisions/<as_of>.json           RetrainDecision that followed from it
      runs/<run_id>.json               RunRecord; a run is named after the decision that it follows from
      gates/<as_of>.json               GateReport of the run's challenger …
      canaries/<as_of>.json            … and its CanaryReport, where it came so far
      references/<version>.json        MonitoringReference of a model, there before the model is released …
      references/<version>.parquet     … and the rows of it that Evidently's pages draw
      releases/                        contracts.release
      feature_store/                   Feast repository that the server reads, brought up to date with every window

Everything is named after the moment that it is about and written whole or not at all, so a step that was killed and is
run again ends in the same state. One writer at a time. `<as_of>` is in UTC: 2026-11-23T190000Z.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from evergreen.contracts.artifact import JsonModel
from evergreen.contracts.decision import RetrainDecision, RunRecord
from evergreen.contracts.monitoring_report import MonitoringReport
from evergreen.contracts.release import Release

_NAME_FORMAT = "%Y-%m-%dT%H%M%SZ"


def name_of(as_of: datetime) -> str:
    """Under which what is about a moment is kept; names sort as the moments do.

    Raises:
        ValueError: the moment has no time zone, or a fraction of a second: two would share a name.
    """
    if as_of.tzinfo is None:
        raise ValueError(f"as_of={as_of.isoformat()}: has no offset: write {as_of.isoformat()}+00:00 if it is UTC")
    if as_of.microsecond:
        raise ValueError(
            f"as_of={as_of.isoformat()}: has a fraction of a second: {as_of.replace(microsecond=0)} has not"
        )
    return as_of.astimezone(UTC).strftime(_NAME_FORMAT)


def put(path: Path, model: JsonModel) -> None:
    """Write a file so that it is whole, whenever the writer is killed, or as it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.partial")
    model.write(scratch)
    scratch.replace(path)


class LoopState:
    """The folder of a loop; empty in the beginning."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.outcomes = self.path / "outcomes"
        self.releases = self.path / "releases"
        self.feature_store = self.path / "feature_store"

    def released(self, before: datetime | None = None) -> list[Release]:
        """Releases, oldest first. The last one before the end of a window served in it, whatever has come since."""
        history = self.releases / "history.jsonl"
        lines = history.read_text().splitlines() if history.exists() else []
        releases = [Release.model_validate_json(line) for line in lines]
        return [release for release in releases if before is None or release.released_at < before]

    def package(self, version: str) -> Path:
        """The package of a version that was released."""
        return self.releases / "packages" / version

    def report(self, as_of: datetime) -> Path:
        """Of the window that ended then."""
        return self._file("reports", as_of)

    def page(self, as_of: datetime) -> Path:
        """The report for people."""
        return self.report(as_of).with_suffix(".html")

    def reports(self, before: datetime | None = None, *, since: datetime | None = None) -> list[MonitoringReport]:
        """Reports, oldest first; of windows that ended before a moment, and not before another."""
        return [MonitoringReport.read(file) for file in self._files("reports", before, since)]

    def decision(self, as_of: datetime) -> Path:
        """What was decided then."""
        return self._file("decisions", as_of)

    def decisions(self, before: datetime | None = None, *, since: datetime | None = None) -> list[RetrainDecision]:
        """Decisions, oldest first; likewise."""
        return [RetrainDecision.read(file) for file in self._files("decisions", before, since)]

    def gate(self, as_of: datetime) -> Path:
        """What the gate said of the challenger that was trained then."""
        return self._file("gates", as_of)

    def canary(self, as_of: datetime) -> Path:
        """What was seen of that challenger as a canary."""
        return self._file("canaries", as_of)

    def reference(self, version: str) -> Path:
        """What windows of a model are compared with."""
        return self.path / "references" / f"{version}.json"

    def reference_rows(self, version: str) -> Path:
        """Rows of the same, for pages."""
        return self.reference(version).with_suffix(".parquet")

    def run(self, run_id: str) -> Path:
        """A training run."""
        return self.path / "runs" / f"{run_id}.json"

    def runs(self) -> list[RunRecord]:
        """All runs, oldest first."""
        return [RunRecord.read(file) for file in sorted((self.path / "runs").glob("[!.]*.json"))]

    def start_run(self, run_id: str, as_of: datetime) -> RunRecord:
        """Put down that a run begins. One that was killed begins again."""
        return self._put_run(RunRecord(run_id=run_id, started_at=as_of))

    def finish_run(self, run_id: str, as_of: datetime) -> RunRecord:
        """Put down that a run has ended, whatever came of it.

        Raises:
            ArtifactError: it never began.
        """
        return self._put_run(RunRecord.read(self.run(run_id)).model_copy(update={"finished_at": as_of}))

    def _put_run(self, run: RunRecord) -> RunRecord:
        put(self.run(run.run_id), run)
        return run

    def _file(self, folder: str, as_of: datetime) -> Path:
        return self.path / folder / f"{name_of(as_of)}.json"

    def _files(self, folder: str, before: datetime | None, since: datetime | None) -> list[Path]:
        first = name_of(since) if since is not None else ""
        end = name_of(before) if before is not None else "~"
        # A file that is still being written begins with a dot.
        return [file for file in sorted((self.path / folder).glob("[!.]*.json")) if first <= file.stem < end]
