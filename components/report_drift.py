"""Step: Evidently compares the test rows with the training rows."""

from typing import NamedTuple

from kfp import dsl

from components.image import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def report_drift(
    training_set: dsl.Input[dsl.Dataset], seed: int, report: dsl.Output[dsl.HTML], metrics: dsl.Output[dsl.Metrics]
) -> NamedTuple("Outputs", [("usage", dict)]):
    """Write an Evidently report of the test split against the train split.

    Args:
        training_set: the three splits.
        seed: of the sample that the report is made from.
        report: the page for people.
        metrics: how many columns were compared and how many drifted.
    """
    from collections import namedtuple
    from pathlib import Path

    from evergreen.contracts.training_set import TrainingSet
    from evergreen.monitoring.drift import drift_report
    from evergreen.step import pipeline_step

    with pipeline_step("report_drift") as usage:
        summary = drift_report(
            TrainingSet.load(Path(training_set.path)), Path(report.path), sample_rows=5000, seed=seed
        )
    metrics.log_metric("columns_compared", summary.num_columns)
    metrics.log_metric("columns_drifted", summary.num_drifted)
    return namedtuple("Outputs", ["usage"])(usage)
