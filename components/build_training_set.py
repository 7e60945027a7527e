"""Step: Feast joins features to the events, and time splits them."""

from typing import NamedTuple

from kfp import dsl

from components.image import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def build_training_set(
    snapshot: dsl.Input[dsl.Dataset],
    feature_tables: dsl.Input[dsl.Dataset],
    start: str,
    leave_out: list,
    changed_at: str,
    batch_hours: float,
    seed: int,
    training_set: dsl.Output[dsl.Dataset],
) -> NamedTuple("Outputs", [("usage", dict)]):
    """Ask Feast for the features known before each event, and cut the rows into train, validation and test by time.

    Args:
        snapshot: the log.
        feature_tables: its feature tables.
        start: ISO 8601 time; earlier rows are not learned from, features know them all the same. Empty: all rows.
        leave_out: half-open ranges of time, ISO 8601 pairs, in which the data was broken.
        changed_at: ISO 8601 time since which the world is another: enough of what came since is left to learn from.
            Empty: it is the same.
        batch_hours: how often the features that serve are materialized, from midnight (UTC) on: rows then know what the
            server knew. 0: features are streamed.
        seed: of the drawn negatives, for a log of interactions only.
        training_set: the three splits.
    """
    import tempfile
    from collections import namedtuple
    from datetime import datetime, timedelta
    from pathlib import Path

    from evergreen.contracts.feature_tables import FeatureTables
    from evergreen.contracts.snapshot import Snapshot
    from evergreen.features.store import FeatureStore
    from evergreen.step import pipeline_step
    from evergreen.training.dataset import build_training_set

    with pipeline_step("build_training_set") as usage, tempfile.TemporaryDirectory() as repository:
        tables = FeatureTables.load(Path(feature_tables.path))
        result = build_training_set(
            Snapshot.load(Path(snapshot.path)),
            tables,
            FeatureStore.create(Path(repository) / "feature_store", tables),
            Path(training_set.path),
            seed=seed,
            start=datetime.fromisoformat(start) if start else None,
            leave_out=[(datetime.fromisoformat(first), datetime.fromisoformat(end)) for first, end in leave_out],
            batch=timedelta(hours=batch_hours) if batch_hours else None,
            changed_at=datetime.fromisoformat(changed_at) if changed_at else None,
        )
    for split, info in result.manifest.splits.items():
        training_set.metadata[f"{split}_rows"] = info.rows
    return namedtuple("Outputs", ["usage"])(usage)
