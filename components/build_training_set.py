"""Step: Feast joins features to the events, and time splits them."""

from typing import NamedTuple

from kfp import dsl

from components.image import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def build_training_set(
    snapshot: dsl.Input[dsl.Dataset],
    feature_tables: dsl.Input[dsl.Dataset],
    seed: int,
    training_set: dsl.Output[dsl.Dataset],
) -> NamedTuple("Outputs", [("usage", dict)]):
    """Ask Feast for the features known before each event, and cut the rows into train, validation and test by time.

    Args:
        snapshot: the log.
        feature_tables: its feature tables.
        seed: of the drawn negatives, for a log of interactions only.
        training_set: the three splits.
    """
    import tempfile
    from collections import namedtuple
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
        )
    for split, info in result.manifest.splits.items():
        training_set.metadata[f"{split}_rows"] = info.rows
    return namedtuple("Outputs", ["usage"])(usage)
