"""Incremental retraining: a new model that begins where the champion is, on newer rows."""

from __future__ import annotations

import torch
from torch import Tensor

from evergreen.contracts.errors import TrainingError
from evergreen.models.base import ModelConfig, RankingModel
from evergreen.models.encoder_config import EncoderConfig
from evergreen.models.encoding import Encoder
from evergreen.models.layers import SharedTable
from evergreen.models.package import ModelPackage
from evergreen.models.warm_start import row_mapping, second_row_mapping


def check_warm_start(
    champion: ModelPackage, name: str, hyperparameters: ModelConfig, encoder: EncoderConfig | None = None
) -> None:
    """Raise TrainingError unless a model of this name and these settings can take the champion's weights."""
    if champion.info.name != name:
        raise TrainingError(
            f"warm start: {champion.path} is a {champion.info.name}, not a {name}: train a {champion.info.name}, or "
            "start afresh"
        )
    wanted = hyperparameters.model_dump(mode="json")
    if different := {k for k, value in wanted.items() if champion.info.hyperparameters.get(k) != value}:
        text = ", ".join(f"{k}={champion.info.hyperparameters.get(k)} (asked: {wanted[k]})" for k in sorted(different))
        raise TrainingError(f"warm start: {champion.path} has {text}: take its hyper-parameters, or start afresh")
    if encoder not in (None, EncoderConfig(), champion.encoder.config):
        raise TrainingError(
            f"warm start: {champion.path} encodes its features otherwise than `encoder` asks: leave `encoder` out "
            "(the champion's is extended), or start afresh"
        )


def take_weights(model: RankingModel, encoder: Encoder, champion: ModelPackage) -> None:
    """Copy the champion's weights; a value that owns a row for the first time begins as what it was read as before.

    Args:
        model: fresh, of the champion's name and hyper-parameters.
        encoder: the champion's, extended by newer rows.
        champion: the model to start from.
    """
    tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, SharedTable)}
    rows = torch.from_numpy(row_mapping(champion.encoder, encoder))
    second = torch.from_numpy(second_row_mapping(champion.encoder, encoder))
    weights: dict[str, Tensor] = {
        name: value[rows] + value[second] if name in tables else value
        for name, value in champion.model.state_dict().items()
    }
    model.load_state_dict(weights)
