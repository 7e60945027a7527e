"""Step: one JSON file that tells the whole run."""

from kfp import dsl

from components.image import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def summarize_run(
    snapshot: dsl.Input[dsl.Dataset],
    training_set: dsl.Input[dsl.Dataset],
    evaluation: dsl.Input[dsl.Artifact],
    ingest_usage: dict,
    filter_usage: dict,
    feature_tables_usage: dict,
    training_set_usage: dict,
    training_usages: list,
    evaluation_usage: dict,
    drift_usage: dict,
    materialize_usage: dict,
    summary: dsl.Output[dsl.Artifact],
) -> None:
    """Gather what the artifacts say of themselves, and what each step took.

    Args:
        snapshot: the log.
        training_set: the three splits.
        evaluation: metrics of all models and the choice.
        ingest_usage: time and memory of `ingest_log`.
        filter_usage: of `filter_events`.
        feature_tables_usage: of `build_feature_tables`.
        training_set_usage: of `build_training_set`.
        training_usages: of `train_model`, for each model.
        evaluation_usage: of `evaluate_models`.
        drift_usage: of `report_drift`.
        materialize_usage: of `materialize_features`.
        summary: summary.json.
    """
    from pathlib import Path

    from evergreen.contracts.evaluation import Evaluation
    from evergreen.contracts.snapshot import Snapshot
    from evergreen.contracts.summary import summarize
    from evergreen.contracts.training_set import TrainingSet
    from evergreen.step import pipeline_step

    with pipeline_step("summarize_run"):
        result = summarize(
            Snapshot.load(Path(snapshot.path)),
            TrainingSet.load(Path(training_set.path)),
            Evaluation.load(Path(evaluation.path)),
            [
                ingest_usage,
                filter_usage,
                feature_tables_usage,
                training_set_usage,
                *training_usages,
                evaluation_usage,
                drift_usage,
                materialize_usage,
            ],
        )
        result.write(Path(summary.path))
