"""Step: one model of the zoo is trained and packed."""

from typing import NamedTuple

from kfp import dsl

from components.image import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def train_model(
    training_set: dsl.Input[dsl.Dataset],
    model: str,
    seed: int,
    changed_at: str,
    package: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    incumbent: dsl.Input[dsl.Model] = None,
) -> NamedTuple("Outputs", [("usage", dict)]):
    """Train with early stopping on the validation split, calibrate, and write a model package.

    In this pod, or by a TrainJob on several nodes where the pipeline was compiled so.

    Args:
        training_set: the three splits.
        model: a name of the model registry.
        seed: of initial weights and batch order.
        changed_at: ISO 8601 time since which the world is another: training also tries what came since alone. Empty: it
            is the same.
        package: the model package.
        metrics: figures on the validation split.
        incumbent: the package that serves, if any: training also goes on from its weights where they fit, and what is
            better on the validation split is kept.
    """
    from collections import namedtuple
    from datetime import datetime
    from pathlib import Path

    from evergreen.contracts.training_set import TrainingSet
    from evergreen.models.package import ModelPackage
    from evergreen.step import pipeline_step
    from evergreen.training.config import TrainingConfig
    from evergreen.training.retrain import retrain
    from evergreen.training.train_job import chosen_trainer

    with pipeline_step(f"train_model[{model}]") as usage:
        result = retrain(
            TrainingSet.load(Path(training_set.path)),
            Path(package.path),
            config=TrainingConfig(model=model, seed=seed),
            incumbent=ModelPackage.load(Path(incumbent.path)) if incumbent is not None else None,
            changed_at=datetime.fromisoformat(changed_at) if changed_at else None,
            train=chosen_trainer(),
        )
    package.metadata["model"] = model
    package.metadata["version"] = result.package.version
    package.metadata["way"] = result.way.value
    for name, value in result.package.metrics.items():
        if isinstance(value, (int, float)):
            metrics.log_metric(name, value)
    return namedtuple("Outputs", ["usage"])(usage)
