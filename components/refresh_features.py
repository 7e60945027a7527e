"""Step: the feature store that serves is brought up to date, whether or not a model is trained."""

from typing import NamedTuple

from kfp import dsl

from components.image import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def refresh_features(
    feature_tables: dsl.Input[dsl.Dataset],
    as_of: str,
    state: str,
    store_config: str,
    model_store: str,
    model_store_path: str,
) -> NamedTuple("Outputs", [("usage", dict)]):
    """Put the newest tables under the loop's feature store and materialize what changed; its servers go on reading.

    Args:
        feature_tables: the offline source.
        as_of: ISO 8601 time of the values that are served.
        state: folder of the loop; the store is made there the first time.
        store_config: file of feature_repo/ that says which stores; "feature_store.cluster.yaml" writes to Redis.
        model_store: where servers of a cluster find the catalogue; empty: there is no cluster.
        model_store_path: see `release_model`.
    """
    from collections import namedtuple
    from datetime import datetime
    from pathlib import Path

    from evergreen.contracts.feature_tables import FeatureTables
    from evergreen.contracts.loop_state import LoopState
    from evergreen.features.store import FeatureStore
    from evergreen.release.bundle import ModelStore
    from evergreen.step import pipeline_step

    with pipeline_step("refresh_features") as usage:
        path, tables = LoopState(Path(state)).feature_store, FeatureTables.load(Path(feature_tables.path))
        FeatureStore.bring_up_to_date(path, tables, config=store_config).materialize(datetime.fromisoformat(as_of))
        if model_store:
            ModelStore(model_store, model_store_path).publish(path)
    return namedtuple("Outputs", ["usage"])(usage)
