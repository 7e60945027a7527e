"""DeepFM: a factorization machine and a deep network that share their embeddings.

Source: Guo et al. 2017, DeepFM. Deviates: numbers have no embedding (45 activity counts would make nine tenths of the
input); they enter the deep part as they are and the first order by bin. A user's history is a field, as in our
factorization machine. The deep part's last layer starts at zero: training starts from the factorization machine.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from evergreen.models.base import ModelConfig
from evergreen.models.factorization_machine import FactorizationMachine, FactorizationMachineConfig
from evergreen.models.inputs import InputSpec
from evergreen.models.layers import multilayer_perceptron


class DeepFMConfig(FactorizationMachineConfig):
    """Hyper-parameters of DeepFM."""

    numeric_interactions: bool = False
    hidden: tuple[int, ...] = (128, 64)
    """Widths of the deep part's layers."""
    dropout: float = Field(default=0.3, ge=0, lt=1)
    batch_norm: bool = False
    """Whether each hidden layer is normalised over the batch (Ioffe and Szegedy 2015)."""


class DeepFM(FactorizationMachine):
    """Factorization machine plus multilayer perceptron over the same vectors and the numbers."""

    Config: ClassVar[type[ModelConfig]] = DeepFMConfig

    def __init__(self, config: DeepFMConfig, spec: InputSpec) -> None:
        super().__init__(config, spec)
        num_vectors = len(spec.categorical) + len(spec.bags)
        self.deep = multilayer_perceptron(
            num_vectors * config.embedding_dim + spec.numeric_width,
            config.hidden,
            dropout=config.dropout,
            batch_norm=config.batch_norm,
        )

    def response(self, categorical: Tensor, numeric: Tensor, bags: Tensor) -> Tensor:
        """(N,) factorization machine plus deep part."""
        weights, vectors = self.rows(categorical, bags)
        deep: Tensor = self.deep(torch.cat([vectors.flatten(1), numeric], dim=1)).squeeze(1)
        return self.interactions(weights, vectors, numeric) + deep
