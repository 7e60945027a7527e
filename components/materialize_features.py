"""Step: the latest features of every user and item go into the online store."""

from typing import NamedTuple

from kfp import dsl

from components.image import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def materialize_features(
    feature_tables: dsl.Input[dsl.Dataset],
    as_of: str,
    feature_store: dsl.Output[dsl.Artifact],
    store_config: str = "feature_store.yaml",
) -> NamedTuple("Outputs", [("usage", dict)]):
    """Apply the Feast definitions and materialize what was known at `as_of`.

    Args:
        feature_tables: the offline source.
        as_of: ISO 8601 time of the values that are served.
        feature_store: a Feast repository with its registry and online store.
        store_config: file of feature_repo/ that says which stores; "feature_store.cluster.yaml" writes to Redis.
    """
    from collections import namedtuple
    from datetime import datetime
    from pathlib import Path

    from evergreen.contracts.feature_tables import FeatureTables
    from evergreen.features.store import FeatureStore
    from evergreen.step import pipeline_step

    with pipeline_step("materialize_features") as usage:
        tables = FeatureTables.load(Path(feature_tables.path))
        store = FeatureStore.create(Path(feature_store.path), tables, config=store_config)
        views = store.materialize(datetime.fromisoformat(as_of))
    feature_store.metadata["as_of"] = as_of
    feature_store.metadata["keys_written"] = {name: view.written for name, view in views.items()}
    return namedtuple("Outputs", ["usage"])(usage)
