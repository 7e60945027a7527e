"""A small spec with every kind of input, and rows for it: what tests of several models score."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch

from evergreen.contracts.training_set import ColumnKind, Side
from evergreen.models.base import RankingModel
from evergreen.models.inputs import PAD, BagInput, CategoricalInput, InputSpec, ModelInputs, NumericInput

Model = TypeVar("Model", bound=RankingModel)

SPEC = InputSpec(
    categorical=(
        CategoricalInput(name="a", side=Side.USER, start=1, num_rows=5),
        CategoricalInput(name="b", side=Side.ITEM, start=6, num_rows=4),
    ),
    numeric=(
        NumericInput(name="x", side=Side.USER, missing=2, zero=0.0, boundaries=(-0.5, 0.5)),
        NumericInput(name="y", side=Side.ITEM, missing=None, zero=0.0, boundaries=(0.0,)),
    ),
    num_indicators=1,
    bags=(BagInput(name="h", side=Side.USER, kind=ColumnKind.SEQUENCE, width=3),),
    num_embeddings=10,
    untrained_rows=(0, 1, 2, 6, 7),
)


def without_zeros(model: Model) -> Model:
    """The model with weights in which every part has a say: as after training."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        model.table.weight[PAD] = 0.0
    return model.eval()


def some_rows(num_rows: int) -> ModelInputs:
    """Rows of SPEC: histories of any length, numbers that are missing at times."""
    rng = np.random.default_rng(1)
    length = rng.integers(0, 4, size=num_rows)
    history = np.where(np.arange(3) < length[:, None], rng.integers(1, 6, size=(num_rows, 3)), PAD)
    missing = rng.integers(0, 2, size=num_rows)
    x, y = np.where(missing, 0.0, rng.normal(size=num_rows)), rng.normal(size=num_rows)
    return ModelInputs(
        torch.from_numpy(np.stack([rng.integers(1, 6, size=num_rows), rng.integers(6, 10, size=num_rows)], axis=1)),
        torch.from_numpy(np.stack([x, y, missing], axis=1).astype(np.float32)),
        torch.from_numpy(history),
    )
