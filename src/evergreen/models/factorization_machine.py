"""Factorization machine of second order.

Source: Rendle 2010, Factorization machines. Deviates: a user's history is one field, the sum of its items' vectors over
the root of their number, with the vectors of item_id itself (Kabbur et al. 2013, FISM), which ranks items for users
that training never saw; numbers also have a first order weight by quantile bin; Adagrad with early stopping.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from evergreen.models.base import ModelConfig, RankingModel
from evergreen.models.inputs import InputSpec
from evergreen.models.layers import FirstOrder, SharedTable


class FactorizationMachineConfig(ModelConfig):
    """Hyper-parameters of a factorization machine."""

    embedding_dim: int = Field(default=16, ge=1, le=1024)
    init_std: float = Field(default=0.02, gt=0)
    history_exponent: float = Field(default=0.5, ge=0, le=1)
    """A bag's sum is divided by its number of values to this power; 1 is the mean."""
    numeric_interactions: bool = True
    """Whether numbers, too, are multiplied with all other features."""


NUMERIC_LIMIT = 3.0
"""Standard deviations beyond which a number is cut in products: their squares run away when a feature drifts."""


class FactorizationMachine(RankingModel):
    """A weight for each feature, and for each pair of features the product of their vectors.

    Column 0 of the table is the weight, the others are the vector: one lookup fetches both.
    """

    Config: ClassVar[type[ModelConfig]] = FactorizationMachineConfig

    def __init__(self, config: FactorizationMachineConfig, spec: InputSpec) -> None:
        super().__init__(spec)
        self.exponent = config.history_exponent
        self.table = SharedTable(spec, 1 + config.embedding_dim, init_std=config.init_std)
        with torch.no_grad():
            self.table.weight[:, 0] = 0.0
        self.first_order = FirstOrder(spec)
        self.numeric_vectors: nn.Parameter | None = None
        if config.numeric_interactions:
            self.numeric_vectors = nn.Parameter(torch.randn(spec.numeric_width, config.embedding_dim) * config.init_std)

    def rows(self, categorical: Tensor, bags: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (N, F) and vectors (N, F, embedding_dim) of the F fields and bags of a row."""
        rows = self.table.lookup(categorical)
        if self.spec.bags:
            rows = torch.cat([rows, self.table.pool(bags, exponent=self.exponent)], dim=1)
        weights, vectors = torch.split(rows, [1, rows.shape[2] - 1], dim=2)
        return weights.squeeze(2), vectors.contiguous()

    def interactions(self, weights: Tensor, vectors: Tensor, numeric: Tensor) -> Tensor:
        """(N,) first and second order terms; the second in linear time (Rendle's lemma 3.1)."""
        flat = vectors.flatten(1)
        total, squares = vectors.sum(dim=1), torch.linalg.vecdot(flat, flat)
        if self.numeric_vectors is not None:
            limited = numeric.clamp(-NUMERIC_LIMIT, NUMERIC_LIMIT)
            total = total + limited @ self.numeric_vectors
            squares = squares + limited.square() @ self.numeric_vectors.square().sum(dim=1)
        second = 0.5 * (total.square().sum(dim=1) - squares)
        total_score: Tensor = weights.sum(dim=1) + self.first_order(numeric) + second
        return total_score

    def response(self, categorical: Tensor, numeric: Tensor, bags: Tensor) -> Tensor:
        """(N,) first and second order terms."""
        return self.interactions(*self.rows(categorical, bags), numeric)
