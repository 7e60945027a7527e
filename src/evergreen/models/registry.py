"""The models that can be trained, by name. A new model is one module and one line here.

Modules are imported when a model is asked for, so that reading the names does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from evergreen.contracts.errors import TrainingError

if TYPE_CHECKING:
    from evergreen.models.base import ModelConfig, RankingModel
    from evergreen.models.inputs import InputSpec

_CLASSES = {
    "popularity": ("evergreen.models.popularity", "Popularity"),
    "logistic_regression": ("evergreen.models.logistic_regression", "LogisticRegression"),
    "factorization_machine": ("evergreen.models.factorization_machine", "FactorizationMachine"),
    "two_tower": ("evergreen.models.two_tower", "TwoTower"),
    "deepfm": ("evergreen.models.deepfm", "DeepFM"),
    "multi_task_deepfm": ("evergreen.models.multi_task", "MultiTaskDeepFM"),
    "dlrm": ("evergreen.models.dlrm", "DLRM"),
    "dcn_v2": ("evergreen.models.dcn_v2", "DCNv2"),
    "transformer": ("evergreen.models.transformer", "Transformer"),
}

MODEL_NAMES = tuple(_CLASSES)
"""Names of all models, from the simplest to the richest."""


def model_class(name: str) -> type[RankingModel]:
    """The class behind a name.

    Raises:
        TrainingError: there is no such model.
    """
    if name not in _CLASSES:
        raise TrainingError(f"model {name!r}: there is no such model; choose from {', '.join(MODEL_NAMES)}")
    module, attribute = _CLASSES[name]
    result: type[RankingModel] = getattr(import_module(module), attribute)
    return result


def model_config(name: str, hyperparameters: Mapping[str, Any]) -> ModelConfig:
    """Hyper-parameters of a model, defaults filled in.

    Raises:
        TrainingError: there is no such model, or it does not take a hyper-parameter or its value.
    """
    config = model_class(name).Config
    try:
        return config.model_validate(dict(hyperparameters))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise TrainingError(
            f"model {name}: hyper-parameter {place}={first['input']!r}: {first['msg']}; "
            f"it takes {', '.join(config.model_fields) or 'none'}"
        ) from error


def build_model(name: str, config: ModelConfig, spec: InputSpec) -> RankingModel:
    """A model with fresh weights, drawn from torch's global generator."""
    return model_class(name)(config, spec)  # type: ignore[call-arg, arg-type]
