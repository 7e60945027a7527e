"""The newest pages of a log, asked again of a model as its server would answer them."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from evergreen.features.store import FeatureStore
from evergreen.models.package import ModelPackage
from evergreen.serving.impression_sinks import open_sink
from evergreen.serving.impressions import ImpressionLog
from evergreen.serving.recommender import Recommender
from evergreen.serving.schema import RankingRequest
from tests.small_world import SmallWorld


def newest_events(world: SmallWorld, *, days_before: int = 0) -> pa.Table:
    """Events of the time of the test rows; or of as much of their day, some days before."""
    events = ds.dataset(world.snapshot.files).to_table()
    start, end = (moment - timedelta(days=days_before) for moment in (_start(world), world.snapshot.as_of))
    moment = pc.field("event_timestamp")
    return events.filter((moment >= start) & (moment < end))


def _start(world: SmallWorld) -> datetime:
    return world.training_set.manifest.splits["test"].start


def ask_again(world: SmallWorld, package: ModelPackage, root: Path, *, days_before: int = 0) -> str:
    """Answer the pages of `newest_events` with the features of the midnight before, and log it.

    Args:
        world: of the pages.
        package: is asked.
        root: folder to work in; its log is added to.
        days_before: as in `newest_events`.

    Returns:
        The impression log.
    """
    start = _start(world) - timedelta(days=days_before)
    midnight = start.replace(hour=0, minute=0, second=0, microsecond=0)
    FeatureStore.create(root / "feature_store", world.tables).materialize(midnight)
    pages: dict[str, dict[str, Any]] = {}
    for row in newest_events(world, days_before=days_before).to_pylist():
        page = {name: row[name] for name in ("request_id", "user_id", "event_timestamp")}
        page |= {"context": {"device": row["device"]}, "candidates": []}
        pages.setdefault(row["request_id"], page)["candidates"].append(row["item_id"])
    with ImpressionLog(open_sink(str(root / "impressions"))) as log, asyncio.Runner() as runner:
        recommender = Recommender.load(package.path, root / "feature_store", impressions=log, deadline_seconds=20)
        for page in pages.values():
            runner.run(recommender.answer([RankingRequest.model_validate(page)]))
        runner.run(recommender.close())
    return str(root / "impressions")
