"""DLRM: dot products of all pairs of fields, read by a network.

Source: Naumov et al. 2019, Deep learning recommendation model for personalization and recommendation systems (arXiv
1906.00091). Deviates: a weight for each feature is added, and the dot products also enter the sum by weights that start
at one (Pan et al. 2018, Field-weighted factorization machines), while the network's last layer starts at zero: training
on rare clicks starts from a factorization machine. A user's history is a field, as in our factorization machine;
numbers are cut at three standard deviations.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from evergreen.models.base import ModelConfig, RankingModel
from evergreen.models.inputs import InputSpec
from evergreen.models.layers import FirstOrder, SharedTable, multilayer_perceptron

NUMERIC_LIMIT = 3.0
"""Standard deviations beyond which a number is cut, or dot products run away when a feature drifts."""


class DLRMConfig(ModelConfig):
    """Hyper-parameters of DLRM."""

    embedding_dim: int = Field(default=16, ge=1, le=1024)
    init_std: float = Field(default=0.02, gt=0)
    history_exponent: float = Field(default=0.5, ge=0, le=1)
    """A bag's sum is divided by its number of values to this power; 1 is the mean."""
    bottom: tuple[int, ...] = (64,)
    """Widths of the layers between the numbers and their vector."""
    top: tuple[int, ...] = (128, 64)
    """Widths of the layers between the dot products and the score."""
    dropout: float = Field(default=0.3, ge=0, lt=1)
    """In the top layers."""


class DLRM(RankingModel):
    """A network over the numbers' vector and the dot products of all pairs of vectors.

    Column 0 of the table is a feature's weight, the others are its vector. Without numbers there is no vector of
    numbers, and with only one vector no pair.
    """

    Config: ClassVar[type[ModelConfig]] = DLRMConfig

    pairs: Tensor

    def __init__(self, config: DLRMConfig, spec: InputSpec) -> None:
        super().__init__(spec)
        self.exponent = config.history_exponent
        self.table = SharedTable(spec, 1 + config.embedding_dim, init_std=config.init_std)
        with torch.no_grad():
            self.table.weight[:, 0] = 0.0
        self.first_order = FirstOrder(spec)
        self.bottom = _bottom(spec.numeric_width, config) if spec.numeric_width else None
        num_vectors = len(spec.categorical) + len(spec.bags) + (self.bottom is not None)
        left, right = torch.triu_indices(num_vectors, num_vectors, offset=1)
        # Not persistent: the package's spec says it.
        self.register_buffer("pairs", left * num_vectors + right, persistent=False)
        self.pair_weights = nn.Parameter(torch.ones(len(self.pairs)))
        num_inputs = len(self.pairs) + (config.embedding_dim if self.bottom is not None else 0)
        self.top: nn.Sequential | None = None
        if num_inputs:
            self.top = multilayer_perceptron(num_inputs, config.top, dropout=config.dropout)

    def response(self, categorical: Tensor, numeric: Tensor, bags: Tensor) -> Tensor:
        """(N,) first order terms, weighted dot products, and what the network makes of them."""
        rows = self.table.lookup(categorical)
        if self.spec.bags:
            rows = torch.cat([rows, self.table.pool(bags, exponent=self.exponent)], dim=1)
        weights, vectors = rows[:, :, 0], rows[:, :, 1:]
        first: Tensor = weights.sum(dim=1) + self.first_order(numeric)
        if self.top is None:
            return first
        inputs = []
        if self.bottom is not None:
            numbers = self.bottom(numeric.clamp(-NUMERIC_LIMIT, NUMERIC_LIMIT))
            vectors = torch.cat([vectors, numbers.unsqueeze(1)], dim=1)
            inputs.append(numbers)
        dots = torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1).index_select(1, self.pairs)
        inputs.append(dots)
        network: Tensor = self.top(torch.cat(inputs, dim=1)).squeeze(1)
        return first + dots @ self.pair_weights + network


def _bottom(num_inputs: int, config: DLRMConfig) -> nn.Sequential:
    """ReLU layers, the last one included, as in the original: (N, num_inputs) -> (N, embedding_dim)."""
    layers: list[nn.Module] = []
    for width in (*config.bottom, config.embedding_dim):
        layers += [nn.Linear(num_inputs, width), nn.ReLU()]
        num_inputs = width
    return nn.Sequential(*layers)
