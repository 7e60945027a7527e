"""Layers that several models share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional

from evergreen.contracts.errors import TrainingError
from evergreen.models.inputs import PAD, InputSpec

_CGROUP = Path("/sys/fs/cgroup")
_FLOAT_BYTES = 4


class SharedTable(nn.Module):
    """One embedding table for all fields and bags of an `InputSpec`; its gradients are sparse.

    Rows of padding, missing and unseen values start at zero: until training says otherwise they add nothing.
    """

    _second: Tensor

    def __init__(self, spec: InputSpec, width: int, *, init_std: float) -> None:
        """Draw the rows from a normal distribution.

        Args:
            spec: fields, bags and number of rows.
            width: columns of a row.
            init_std: standard deviation of the fresh rows.

        Raises:
            TrainingError: there is less memory than the table needs.
        """
        super().__init__()
        check_table_memory(spec.num_embeddings, width)
        # Numpy asks for huge pages, torch does not: rows far apart are found faster, and the memory is there sooner.
        rows = torch.from_numpy(np.empty((spec.num_embeddings, width), np.float32))
        self.weight = nn.Parameter(rows.normal_(std=init_std) if init_std > 0 else rows.zero_())
        with torch.no_grad():
            self.weight[list(spec.untrained_rows)] = 0.0
        self._widths = [bag.width for bag in spec.bags]
        self._num_fields = len(spec.categorical)
        self.register_buffer("_second", torch.tensor(spec.second_rows, dtype=torch.int64), persistent=False)

    def lookup(self, categorical: Tensor) -> Tensor:
        """(N, C, width) rows of (N, C + X) fields; a field with a second row is the sum of both."""
        rows = functional.embedding(categorical, self.weight, sparse=True)
        if len(self._second) == 0:
            return rows
        return rows[:, : self._num_fields].index_add(1, self._second, rows[:, self._num_fields :])

    def pool(self, bags: Tensor, *, exponent: float) -> Tensor:
        """(N, num_bags, width) sums of the bags' rows, each divided by its number of values to the power `exponent`.

        1 is the mean. 0.5 keeps the length of a sum of unrelated vectors the same however many there are, and lets a
        long history say more than a short one.
        """
        pooled = []
        for rows in torch.split(bags, self._widths, dim=1):
            total = functional.embedding_bag(rows, self.weight, mode="sum", padding_idx=PAD, sparse=True)
            count = (rows != PAD).sum(dim=1, keepdim=True).clamp(min=1).to(total.dtype)
            pooled.append(total / count**exponent)
        return torch.stack(pooled, dim=1)


def check_table_memory(num_embeddings: int, width: int, *, copies: int = 1) -> None:
    """Refuse a table that does not fit, before any of it is allocated: Linux hands out memory that it does not have.

    Args:
        num_embeddings: rows of the table.
        width: float32 columns of a row.
        copies: how many tables of this size there will be at once; training holds the best weights as well, so 2.

    Raises:
        TrainingError: the memory that is free now, or that the container may still take, is less.
    """
    needed, available = num_embeddings * width * _FLOAT_BYTES * copies, available_memory()
    if needed > available:
        raise TrainingError(
            f"the table of embeddings has {num_embeddings:,} rows of {width} numbers: {copies} x "
            f"{needed / copies / 2**30:.1f} GiB, {available / 2**30:.1f} GiB of memory are available; take fewer rows "
            "(encoder: a lower max_categories or oov_buckets, a higher min_count) or a smaller embedding_dim"
        )


def available_memory() -> int:
    """Bytes that this process may still take: what the machine has free, or less where its container is limited."""
    available: int = psutil.virtual_memory().available
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),  # cgroup v2
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),  # cgroup v1
    ):
        try:
            free = int((_CGROUP / limit).read_text()) - int((_CGROUP / used).read_text())
            statistics = (_CGROUP / used).with_name("memory.stat").read_text().split()
            # The page cache counts as used, but makes way.
            free += int(statistics[statistics.index(cache) + 1])
        except (OSError, ValueError):  # no such file on this system, or "max": no limit
            continue
        available = min(available, free)
    return available


class FirstOrder(nn.Module):
    """A weight for each number and for each of its quantile bins: a response that need not be a straight line.

    Source: binning as in He et al. 2014, section 3.1.
    """

    boundaries: Tensor

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
        self.bin_table = nn.Parameter(torch.zeros(num_columns * (num_boundaries + 1), 1))

    def forward(self, numeric: Tensor) -> Tensor:
        """(N,) first order terms of (N, M) numbers."""
        total = numeric @ self.weight
        if len(self.boundaries) == 0:
            return total
        columns = numeric[:, : len(self.boundaries)].t().contiguous()
        place = torch.searchsorted(self.boundaries, columns, right=True)
        return total + self.bin_table.view(len(columns), -1).gather(1, place).sum(dim=0)


def multilayer_perceptron(
    num_inputs: int, hidden: tuple[int, ...], *, dropout: float, batch_norm: bool = False
) -> nn.Sequential:
    """ReLU layers and a last one to a single output that starts at zero, (N, num_inputs) -> (N, 1)."""
    layers = hidden_layers(num_inputs, hidden, dropout=dropout, batch_norm=batch_norm)
    return nn.Sequential(*layers, output_layer(hidden[-1] if hidden else num_inputs))


def output_layer(num_inputs: int, *, bias: bool = True) -> nn.Linear:
    """A last layer, (N, num_inputs) -> (N, 1), that says nothing yet: a fresh model answers with the base rate."""
    layer = nn.Linear(num_inputs, 1, bias=bias)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def hidden_layers(
    num_inputs: int, hidden: tuple[int, ...], *, dropout: float, batch_norm: bool = False
) -> list[nn.Module]:
    """ReLU layers, (N, num_inputs) -> (N, the last of `hidden`); with `batch_norm` normalised before the ReLU."""
    layers: list[nn.Module] = []
    for width in hidden:
        normalisation = [nn.BatchNorm1d(width)] if batch_norm else []
        layers += [nn.Linear(num_inputs, width), *normalisation, nn.ReLU(), nn.Dropout(dropout)]
        num_inputs = width
    return layers
