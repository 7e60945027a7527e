"""How much of a stretch of time is suspicious: what the monitors ask of the labels."""

from __future__ import annotations

from datetime import datetime

import pyarrow.compute as pc
import pyarrow.dataset as ds

from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.snapshot import Snapshot
from evergreen.fraud.labels import SuspiciousEvents


def suspicious_share(snapshot: Snapshot, labels: SuspiciousEvents, *, start: datetime, end: datetime) -> float | None:
    """Share of the events in [start, end) that no person made; None: there are no events.

    Args:
        snapshot: the log as it was judged, with the suspicious events.
        labels: of it.
        start: of the stretch, by event_timestamp.
        end: of it.

    Raises:
        ArtifactError: the labels are of another snapshot.
    """
    if labels.manifest.snapshot_id != snapshot.id:
        raise ArtifactError(
            f"{labels.path}: labels of snapshot {labels.manifest.snapshot_id[:12]}, not of {snapshot.id[:12]}: filter "
            "the events again"
        )
    moment = ds.field("event_timestamp")
    events = ds.dataset(snapshot.files).to_table(["event_id"], filter=(moment >= start) & (moment < end))["event_id"]
    if not len(events):
        return None
    found = pc.sum(pc.is_in(events, value_set=labels.events()["event_id"].combine_chunks())).as_py()
    return float(found / len(events))
