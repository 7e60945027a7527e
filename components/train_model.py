"""Step: one model of the zoo is trained and packed."""

from typing import NamedTuple

from kfp import dsl

from components.image import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def train_model(
    training_set: dsl.Input[dsl.Dataset],
    model: str,
    seed: int,
    package: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
) -> NamedTuple("Outputs", [("usage", dict)]):
    """Train with early stopping on the validation split, calibrate, and write a model package.

    Args:
        training_set: the three splits.
        model: a name of the model registry.
        seed: of initial weights and batch order.
        package: the model package.
        metrics: figures on the validation split.
    """
    from collections import namedtuple
    from pathlib import Path

    from evergreen.contracts.training_set import TrainingSet
    from evergreen.step import pipeline_step
    from evergreen.training.trainer import TrainingConfig, train_model

    with pipeline_step(f"train_model[{model}]") as usage:
        result = train_model(
            TrainingSet.load(Path(training_set.path)), Path(package.path), config=TrainingConfig(model=model, seed=seed)
        )
    package.metadata["model"] = model
    package.metadata["version"] = result.version
    for name, value in result.metrics.items():
        if isinstance(value, (int, float)):
            metrics.log_metric(name, value)
    return namedtuple("Outputs", ["usage"])(usage)
