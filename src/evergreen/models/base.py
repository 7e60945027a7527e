"""What every ranking model has in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evergreen.contracts.artifact import JsonModel
from evergreen.contracts.mapping import LogKind
from evergreen.models.inputs import EncodedRows, InputSpec, ModelInputs

_CHUNK_ROWS = 16_384


class ModelConfig(JsonModel):
    """Hyper-parameters of a model. Each model has its own subclass."""


class RankingModel(nn.Module):
    """Scores rows: bias + scale * response(row).

    Subclasses write `response`. The score is a logit for clicks and interactions and a rating for ratings; `scale` is 1
    for logits and the standard deviation of the training labels for ratings, so that a network works in units of about
    one whatever the range of the ratings.
    """

    Config: ClassVar[type[ModelConfig]] = ModelConfig

    bias: nn.Parameter
    scale: Tensor

    def __init__(self, spec: InputSpec) -> None:
        super().__init__()
        self.spec = spec
        self.bias = nn.Parameter(torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    def set_output(self, *, bias: float, scale: float) -> None:
        """Start from the base rate's logit or the mean rating, so that the first steps do not go into learning it."""
        with torch.no_grad():
            self.bias.fill_(bias)
            self.scale.fill_(scale)

    def forward(self, categorical: Tensor, numeric: Tensor, bags: Tensor) -> Tensor:
        """(N,) scores of (N, C) categorical, (N, M) numeric and (N, L) bags; see `ModelInputs`."""
        return self.bias + self.scale * self.response(categorical, numeric, bags)

    def response(self, categorical: Tensor, numeric: Tensor, bags: Tensor) -> Tensor:
        """(N,) what the row adds to the bias."""
        raise NotImplementedError


def score_rows(model: RankingModel, rows: EncodedRows) -> NDArray[np.float32]:
    """(num_rows,) scores of encoded rows, in chunks, without dropout."""
    return _in_chunks(model, rows, model)


def predict_second_outcome(model: RankingModel, rows: EncodedRows) -> NDArray[np.float32]:
    """(num_rows,) standardised predictions of a model with two tasks."""
    if not isinstance(model, TwoTasks):
        raise TypeError(f"{type(model).__name__} has one task")
    both = model.both
    return _in_chunks(model, rows, lambda *inputs: both(*inputs)[1])


def _in_chunks(model: RankingModel, rows: EncodedRows, call: Callable[..., Tensor]) -> NDArray[np.float32]:
    parts = [np.empty(0, np.float32)]
    training, device = model.training, model.bias.device
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(rows), _CHUNK_ROWS):
            inputs = rows.inputs(slice(start, start + _CHUNK_ROWS)).to(device)
            parts.append(call(*inputs).float().cpu().numpy())
    if training:
        model.train()
    return np.concatenate(parts)


@runtime_checkable
class OwnLoss(Protocol):
    """A model whose loss is not a function of each row's score and label alone, e.g. a softmax over a batch."""

    def prepare(self, train: EncodedRows, labels: NDArray[np.float32]) -> None:
        """Look at all training rows once, before the first step (how often items occur, for one)."""
        ...

    def training_loss(self, inputs: ModelInputs, labels: Tensor) -> Tensor:
        """Mean loss of a batch, a scalar; validation batches are measured by it, too."""
        ...


@runtime_checkable
class TwoTasks(Protocol):
    """A model that predicts a second outcome (a rating, or the time that a user stayed) beside the click."""

    def both(self, categorical: Tensor, numeric: Tensor, bags: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) scores as of `forward`, and (N,) predictions of the second outcome, standardised."""
        ...


@runtime_checkable
class ClosedForm(Protocol):
    """A model that is computed rather than trained by gradient steps."""

    def fit(
        self,
        train: EncodedRows,
        train_labels: NDArray[np.float32],
        validation: EncodedRows,
        validation_labels: NDArray[np.float32],
        *,
        kind: LogKind,
    ) -> dict[str, float]:
        """Set the weights.

        Returns:
            What was tried, and how it did on validation rows: less is better.
        """
        ...
