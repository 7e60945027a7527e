"""Layers that several models share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from evergreen.models.inputs import PAD, InputSpec


class SharedTable(nn.Module):
    """One embedding table for all fields and bags of an `InputSpec`.

    Rows of padding, missing and unseen values start at zero: until training says otherwise they add nothing.
    """

    def __init__(self, spec: InputSpec, width: int, *, init_std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(spec.num_embeddings, width))
        nn.init.normal_(self.weight, std=init_std)
        with torch.no_grad():
            self.weight[list(spec.untrained_rows)] = 0.0
        self._widths = [bag.width for bag in spec.bags]

    def lookup(self, categorical: Tensor) -> Tensor:
        """(N, C, width) rows of (N, C) fields."""
        return functional.embedding(categorical, self.weight)

    def pool(self, bags: Tensor, *, exponent: float) -> Tensor:
        """(N, num_bags, width) sums of the bags' rows, each divided by its number of values to the power `exponent`.

        1 is the mean. 0.5 keeps the length of a sum of unrelated vectors the same however many there are, and lets a
        long history say more than a short one.
        """
        pooled = []
        for rows in torch.split(bags, self._widths, dim=1):
            total = functional.embedding_bag(rows, self.weight, mode="sum", padding_idx=PAD)
            count = (rows != PAD).sum(dim=1, keepdim=True).clamp(min=1).to(total.dtype)
            pooled.append(total / count**exponent)
        return torch.stack(pooled, dim=1)


class FirstOrder(nn.Module):
    """A weight for each number and for each of its quantile bins: a response that need not be a straight line.

    Source: binning as in He et al. 2014, section 3.1.
    """

    boundaries: Tensor
    bin_start: Tensor

    def __init__(self, spec: InputSpec) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(spec.numeric_width))
        num_columns = len(spec.numeric)
        num_boundaries = max((len(column.boundaries) for column in spec.numeric), default=0)
        # Columns with few distinct quantiles are filled up with infinity: bins that no value reaches.
        padded = [
            [*column.boundaries, *[float("inf")] * (num_boundaries - len(column.boundaries))] for column in spec.numeric
        ]
        boundaries = torch.tensor(padded, dtype=torch.float32).reshape(num_columns, num_boundaries)
        self.register_buffer("boundaries", boundaries)
        self.register_buffer("bin_start", torch.arange(num_columns) * (num_boundaries + 1))
        self.bin_table = nn.Parameter(torch.zeros(num_columns * (num_boundaries + 1), 1))

    def forward(self, numeric: Tensor) -> Tensor:
        """(N,) first order terms of (N, M) numbers."""
        total = numeric @ self.weight
        if len(self.bin_start) == 0:
            return total
        columns = numeric[:, : len(self.bin_start)].t().contiguous()
        place = torch.searchsorted(self.boundaries, columns, right=True).t() + self.bin_start
        return total + functional.embedding_bag(place, self.bin_table, mode="sum").squeeze(1)


def multilayer_perceptron(num_inputs: int, hidden: tuple[int, ...], *, dropout: float) -> nn.Sequential:
    """ReLU layers and a last one to a single output, (N, num_inputs) -> (N, 1)."""
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(num_inputs, width), nn.ReLU(), nn.Dropout(dropout)]
        num_inputs = width
    return nn.Sequential(*layers, nn.Linear(num_inputs, 1))
