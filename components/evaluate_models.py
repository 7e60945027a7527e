"""Step: all models are measured on the same test rows, and the champion is chosen."""

from typing import NamedTuple

from kfp import dsl

from components.image import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def evaluate_models(
    snapshot: dsl.Input[dsl.Dataset],
    feature_tables: dsl.Input[dsl.Dataset],
    training_set: dsl.Input[dsl.Dataset],
    packages: dsl.Input[list[dsl.Model]],
    latency_budget_ms: float,
    seed: int,
    champion: dsl.Output[dsl.Model],
    retriever: dsl.Output[dsl.Model],
    evaluation: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
    roc: dsl.Output[dsl.ClassificationMetrics],
) -> NamedTuple("Outputs", [("champion_version", str), ("usage", dict)]):
    """Evaluate with bootstrap intervals, choose by quality within the latency budget, and write the report.

    Args:
        snapshot: the log.
        feature_tables: its feature tables, for ranking whole catalogues.
        training_set: its test split is what all models are measured on.
        packages: the model packages.
        latency_budget_ms: p99 milliseconds that scoring 500 candidates may take.
        seed: of the bootstrap and of sampled queries.
        champion: a copy of the chosen package.
        retriever: a copy of the two towers, which find candidates for the champion; nothing where none were trained.
        evaluation: metrics.json and the curves.
        report: the page for people.
        metrics: the champion's figures.
        roc: the champion's ROC curve.
    """
    import shutil
    from collections import namedtuple
    from pathlib import Path

    from evergreen.contracts.feature_tables import FeatureTables
    from evergreen.contracts.snapshot import Snapshot
    from evergreen.contracts.training_set import TrainingSet
    from evergreen.evaluation.evaluate import EvaluationConfig, evaluate_models
    from evergreen.models.package import ModelPackage
    from evergreen.step import pipeline_step

    with pipeline_step("evaluate_models") as usage:
        loaded = [ModelPackage.load(Path(package.path)) for package in packages]
        result = evaluate_models(
            TrainingSet.load(Path(training_set.path)),
            loaded,
            Path(evaluation.path),
            tables=FeatureTables.load(Path(feature_tables.path)),
            snapshot=Snapshot.load(Path(snapshot.path)),
            config=EvaluationConfig(latency_budget_ms=latency_budget_ms, seed=seed),
        )
        chosen = next(package for package in loaded if package.info.name == result.champion)
        shutil.copytree(chosen.path, champion.path, dirs_exist_ok=True)
        towers = next((package for package in loaded if package.info.name == "two_tower"), None)
        if towers is not None:
            shutil.copytree(towers.path, retriever.path, dirs_exist_ok=True)
            retriever.metadata["version"] = towers.version
        shutil.copyfile(result.report, report.path)
    champion.metadata["model"] = result.champion
    champion.metadata["version"] = chosen.version
    champion.metadata["reason"] = result.reason
    for name, estimate in result.model(result.champion).metrics.items():
        if estimate.value is not None:
            metrics.log_metric(name, estimate.value)
    if curve := result.curves().models.get(result.champion):
        roc.log_roc_curve(list(curve.false_positive_rate), list(curve.true_positive_rate), list(curve.thresholds))
        roc.log_confusion_matrix(["no click", "click"], [list(row) for row in curve.confusion])
    return namedtuple("Outputs", ["champion_version", "usage"])(chosen.version, usage)
