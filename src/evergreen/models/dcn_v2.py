"""DCN-v2: layers that multiply features with each other, beside a deep network or below it.

Source: Wang et al. 2021, DCN V2 (arXiv 2008.13535): equations 1 and 2, both structures of figure 1, and the low-rank
matrices of section 4.2 without their mixture of experts. Deviates: the factorization machine's terms are added and the
last layer starts at zero, so that training on rare clicks starts from a factorization machine, as in our DeepFM; a
user's history is a field; numbers are cut at three standard deviations.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from evergreen.models.base import ModelConfig
from evergreen.models.factorization_machine import FactorizationMachine, FactorizationMachineConfig
from evergreen.models.inputs import InputSpec
from evergreen.models.layers import hidden_layers, output_layer

NUMERIC_LIMIT = 3.0
"""Standard deviations beyond which a number is cut: L layers raise it to the power L + 1."""


class DCNv2Config(FactorizationMachineConfig):
    """Hyper-parameters of DCN-v2."""

    numeric_interactions: bool = False
    """Whether numbers are also multiplied in the factorization machine; the cross layers always multiply them."""
    cross_layers: int = Field(default=2, ge=1, le=16)
    """L layers make products of up to L + 1 features."""
    rank: int | None = Field(default=32, ge=1)
    """Of each cross layer's matrix; None for a full one. It saves time below half the width of a row's features."""
    structure: Literal["parallel", "stacked"] = "parallel"
    """Whether the deep part reads the features, or what the cross layers made of them."""
    hidden: tuple[int, ...] = (128, 64)
    """Widths of the deep part's layers; none: cross layers only."""
    dropout: float = Field(default=0.3, ge=0, lt=1)
    batch_norm: bool = False
    """Whether each layer of the deep part is normalised over the batch."""


class CrossLayer(nn.Module):
    """x0 * (W x + b) + x: every feature of x0 times a weighted sum of the features of x. All are (N, width)."""

    def __init__(self, width: int, *, rank: int | None) -> None:
        super().__init__()
        self.linear: nn.Module
        if rank is None:
            self.linear = nn.Linear(width, width)
        else:
            self.linear = nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, width))

    def forward(self, x0: Tensor, x: Tensor) -> Tensor:
        """(N, width) products of one degree more than `x` has."""
        return torch.addcmul(x, x0, self.linear(x))


class DCNv2(FactorizationMachine):
    """Factorization machine, cross layers and a deep network over the same vectors and the numbers."""

    Config: ClassVar[type[ModelConfig]] = DCNv2Config

    def __init__(self, config: DCNv2Config, spec: InputSpec) -> None:
        super().__init__(config, spec)
        self.parallel = config.structure == "parallel"
        width = (len(spec.categorical) + len(spec.bags)) * config.embedding_dim + spec.numeric_width
        self.cross = nn.ModuleList(CrossLayer(width, rank=config.rank) for _ in range(config.cross_layers))
        layers = hidden_layers(width, config.hidden, dropout=config.dropout, batch_norm=config.batch_norm)
        self.deep = nn.Sequential(*layers)
        num_inputs = config.hidden[-1] if config.hidden else width
        self.last = output_layer(num_inputs + width if self.parallel else num_inputs)

    def response(self, categorical: Tensor, numeric: Tensor, bags: Tensor) -> Tensor:
        """(N,) factorization machine plus a linear function of the cross layers and the deep part."""
        weights, vectors = self.rows(categorical, bags)
        x0 = torch.cat([vectors.flatten(1), numeric.clamp(-NUMERIC_LIMIT, NUMERIC_LIMIT)], dim=1)
        x = x0
        for layer in self.cross:
            x = layer(x0, x)
        x = torch.cat([x, self.deep(x0)], dim=1) if self.parallel else self.deep(x)
        network: Tensor = self.last(x).squeeze(1)
        return self.interactions(weights, vectors, numeric) + network
