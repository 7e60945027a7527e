"""The share of suspicious events in a stretch of time."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pyarrow.dataset as ds
import pytest

from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.mapping import Mapping
from evergreen.fraud.filter import FilterConfig, filter_events, without_suspicious
from evergreen.fraud.share import suspicious_share
from evergreen.ingest.log import ingest_log
from evergreen.simulator.config import SimulatorConfig
from evergreen.simulator.log import simulate_log

DAY = timedelta(days=1)


def test_shares_of_days_add_up_to_that_of_the_log(tmp_path: Path) -> None:
    simulate_log(
        SimulatorConfig(num_users=100, num_days=3, events_per_day=1_000, num_fast_crawlers=4), tmp_path / "log"
    )
    log = ingest_log(Mapping.load("simulated"), str(tmp_path / "log"), tmp_path / "snapshot")
    labels = filter_events(log, tmp_path / "suspicious", config=FilterConfig(false_positive_share=0))
    first = log.manifest.first_event.replace(hour=0, minute=0, second=0, microsecond=0)
    days = [(first + k * DAY, first + (k + 1) * DAY) for k in range(3)]
    times = ds.dataset(log.files).to_table(["event_timestamp"])["event_timestamp"].to_pylist()
    events = [sum(start <= time < end for time in times) for start, end in days]
    shares = [suspicious_share(log, labels, start=start, end=end) for start, end in days]
    suspicious = sum(count * share for count, share in zip(events, shares, strict=True))
    assert suspicious == pytest.approx(labels.manifest.suspicious_events) and suspicious > 0
    assert suspicious_share(log, labels, start=first + 5 * DAY, end=first + 6 * DAY) is None
    filtered = without_suspicious(log, labels, tmp_path / "filtered")
    with pytest.raises(ArtifactError, match="filter the events again"):
        suspicious_share(filtered, labels, start=first, end=first + DAY)
