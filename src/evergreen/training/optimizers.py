"""Which parameter is trained by what: row-wise Adagrad for tables, Adagrad for bins of numbers, Adam for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from evergreen.models.inputs import PAD
from evergreen.models.layers import SharedTable
from evergreen.training.config import TrainingConfig
from evergreen.training.row_wise_adagrad import RowWiseAdagrad

_WEIGHT_COLUMNS = 1
"""Column 0 of a table's row is a weight, whose gradients are far larger than the vector's beside it."""


class Optimizers:
    """All parameters of a module, each with the optimizer that suits it."""

    def __init__(self, module: nn.Module, config: TrainingConfig) -> None:
        # In the order of the module, as `bins` and `dense` are: a set's differs from process to process.
        tables = list(dict.fromkeys(m.weight for m in module.modules() if isinstance(m, SharedTable)))
        in_tables = set(tables)
        bins: list[nn.Parameter] = []
        dense: list[nn.Parameter] = []
        for name, parameter in module.named_parameters():
            if parameter not in in_tables:
                (bins if name.endswith("bin_table") else dense).append(parameter)
        self._optimizers: list[torch.optim.Optimizer] = []
        if tables:
            self._optimizers.append(_table_optimizer(tables, config))
        if bins:
            self._optimizers.append(
                torch.optim.Adagrad(
                    bins, lr=config.bin_learning_rate, initial_accumulator_value=config.initial_accumulator
                )
            )
        if dense:
            self._optimizers.append(torch.optim.Adam(dense, lr=config.learning_rate, fused=True))
        self._parameters = [*tables, *bins, *dense]
        self._dense_tables = tables if config.table_optimizer == "adam" else []
        self._rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self._optimizers]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters, in an order that every process of a run shares."""
        return self._parameters

    def scale_learning_rates(self, factor: float) -> None:
        """Set every learning rate to `factor` times what it started with."""
        for optimizer, rates in zip(self._optimizers, self._rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor

    def step(self) -> None:
        """Move every parameter against its gradient, and drop the gradients."""
        for parameter in self._dense_tables:
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = parameter.grad.to_dense()
                parameter.grad[PAD] = 0.0
        for optimizer in self._optimizers:
            optimizer.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Forget the gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """All that steps have left behind, by name."""
        return {
            f"{number}/{parameter}/{name}": value
            for number, optimizer in enumerate(self._optimizers)
            for parameter, values in optimizer.state_dict()["state"].items()
            for name, value in values.items()
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        for number, optimizer in enumerate(self._optimizers):
            restored: dict[int, dict[str, Any]] = {}
            for key, value in state.items():
                owner, parameter, name = key.split("/")
                if int(owner) == number:
                    restored.setdefault(int(parameter), {})[name] = value
            optimizer.load_state_dict({"state": restored, "param_groups": optimizer.state_dict()["param_groups"]})


def _table_optimizer(tables: list[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    if config.table_optimizer == "adam":
        return torch.optim.Adam(tables, lr=config.embedding_learning_rate, weight_decay=config.embedding_l2, fused=True)
    return RowWiseAdagrad(
        tables,
        config.embedding_learning_rate,
        initial_accumulator_value=config.initial_accumulator,
        weight_decay=config.embedding_l2,
        split=_WEIGHT_COLUMNS,
    )
