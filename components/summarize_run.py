"""Step: one JSON file that tells the whole run."""

from kfp import dsl

from components.image import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def summarize_run(
    snapshot: dsl.Input[dsl.Dataset],
    training_set: dsl.Input[dsl.Dataset],
    evaluation: dsl.Input[dsl.Artifact],
    step_usages: list,
    model_usages: list,
    summary: dsl.Output[dsl.Artifact],
) -> None:
    """Gather what the artifacts say of themselves, and what each step took.

    Args:
        snapshot: the log.
        training_set: the three splits.
        evaluation: metrics of all models and the choice.
        step_usages: time and memory of the single steps.
        model_usages: time and memory of the training of each model.
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
            [*step_usages, *model_usages],
        )
        result.write(Path(summary.path))
