"""Step: a snapshot becomes feature tables."""

from typing import NamedTuple

from kfp import dsl

from components.image import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def build_feature_tables(
    snapshot: dsl.Input[dsl.Dataset],
    check_leakage: bool,
    feature_tables: dsl.Output[dsl.Dataset],
) -> NamedTuple("Outputs", [("usage", dict)]):
    """Count, rate and remember per user, item and category, each value known strictly before its event_timestamp.

    Args:
        snapshot: the log.
        check_leakage: also build the tables from the first half of the log alone and compare: half as much work again.
        feature_tables: what the Feast views read.
    """
    from collections import namedtuple
    from pathlib import Path

    from evergreen.contracts.snapshot import Snapshot
    from evergreen.features.leakage import check_point_in_time
    from evergreen.features.tables import build_feature_tables
    from evergreen.step import pipeline_step

    with pipeline_step("build_feature_tables") as usage:
        log = Snapshot.load(Path(snapshot.path))
        result = build_feature_tables(log, Path(feature_tables.path))
        if check_leakage:
            check_point_in_time(log, result, build=build_feature_tables)
    feature_tables.metadata["rows"] = sum(result.manifest.rows.values())
    return namedtuple("Outputs", ["usage"])(usage)
