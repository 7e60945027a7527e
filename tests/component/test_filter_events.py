"""The step `filter_events`, run as the function that it is, between artifacts on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from kfp import dsl

from components.filter_events import filter_events
from evergreen.contracts.mapping import Mapping
from evergreen.contracts.snapshot import Snapshot
from evergreen.fraud.labels import SuspiciousEvents
from evergreen.ingest.log import ingest_log
from evergreen.simulator.config import SimulatorConfig
from evergreen.simulator.log import simulate_log


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    folder = tmp_path_factory.mktemp("log")
    simulate_log(SimulatorConfig(num_users=200, num_days=3, events_per_day=2_000, num_fast_crawlers=4), folder / "log")
    return ingest_log(Mapping.load("simulated"), str(folder / "log"), folder / "snapshot")


def test_step_writes_labels_the_filtered_log_the_page_and_the_figures(snapshot: Snapshot, tmp_path: Path) -> None:
    suspicious, filtered = (dsl.Dataset(name, uri=str(tmp_path / name)) for name in ("suspicious", "filtered"))
    report, metrics = dsl.HTML("report", uri=str(tmp_path / "report")), dsl.Metrics("metrics")
    outputs = filter_events.python_func(
        snapshot=dsl.Dataset("snapshot", uri=str(snapshot.path)),
        false_positive_share=0.005,
        suspicious=suspicious,
        filtered=filtered,
        report=report,
        metrics=metrics,
    )
    labels = SuspiciousEvents.load(Path(suspicious.path)).manifest
    assert labels.snapshot_id == snapshot.id and labels.reasons["velocity"].users == 4
    assert Snapshot.load(Path(filtered.path), verify=True).manifest.rows == labels.events - labels.suspicious_events
    assert "suspicious events" in Path(report.path).read_text()
    assert metrics.metadata["suspicious_events"] == labels.suspicious_events > 0
    assert outputs.usage["step"] == "filter_events"


def test_step_refuses_what_is_no_snapshot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = {name: dsl.Dataset(name, uri=str(tmp_path / name)) for name in ("suspicious", "filtered")}
    with pytest.raises(SystemExit):
        filter_events.python_func(
            snapshot=dsl.Dataset("snapshot", uri=str(tmp_path)),
            false_positive_share=0.005,
            **outputs,
            report=dsl.HTML("report", uri=str(tmp_path / "report")),
            metrics=dsl.Metrics("metrics"),
        )
    assert "no such file" in capsys.readouterr().out
    assert not (tmp_path / "suspicious").exists()
