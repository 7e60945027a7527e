"""Step: the latest features of every user and item go into the online store."""

from typing import NamedTuple

from kfp import dsl

from components.image import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def materialize_features(
    feature_tables: dsl.Input[dsl.Dataset],
    as_of: str,
    state: str,
    store_config: str,
    feature_store: dsl.Output[dsl.Artifact],
) -> NamedTuple("Outputs", [("usage", dict)]):
    """Apply the Feast definitions and materialize what was known at `as_of`.

    Args:
        feature_tables: the offline source.
        as_of: ISO 8601 time of the values that are served.
        state: folder of the loop whose store is brought up to date, and made the first time; the artifact then holds
            what a server needs of it. A store that knows more already stays as it is. Empty: there is no loop, and the
            artifact is the store.
        store_config: file of feature_repo/ that says which stores; "feature_store.cluster.yaml" writes to Redis.
        feature_store: a Feast repository with its registry and online store.
    """
    from collections import namedtuple
    from datetime import datetime
    from pathlib import Path

    from evergreen.contracts.feature_tables import FeatureTables
    from evergreen.contracts.loop_state import LoopState
    from evergreen.features.store import CONFIG, FeatureStore
    from evergreen.step import pipeline_step

    with pipeline_step("materialize_features") as usage:
        tables, moment = FeatureTables.load(Path(feature_tables.path)), datetime.fromisoformat(as_of)
        path = LoopState(Path(state)).feature_store if state else Path(feature_store.path)
        store = FeatureStore.open(path) if (path / CONFIG).is_file() else None
        views = {}
        if store is None or store.as_of is None or store.as_of <= moment:
            store = FeatureStore.bring_up_to_date(path, tables, config=store_config)
            views = store.materialize(moment)
        if state:
            store.export_for_serving(Path(feature_store.path))
    feature_store.metadata["as_of"] = as_of
    feature_store.metadata["keys_written"] = {name: view.written for name, view in views.items()}
    return namedtuple("Outputs", ["usage"])(usage)
