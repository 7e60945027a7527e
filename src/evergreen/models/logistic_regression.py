"""Logistic regression on hashed categories and binned numbers: linear regression for ratings.

Source: McMahan et al. 2013, Ad click prediction: a view from the trenches. Deviates: Adam with early stopping in place
of FTRL-Proximal; numbers enter both as they are and by quantile bin, so that a response need not be a straight line.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from evergreen.contracts.training_set import ColumnKind
from evergreen.models.base import ModelConfig, RankingModel
from evergreen.models.inputs import InputSpec
from evergreen.models.layers import FirstOrder, SharedTable


class LogisticRegressionConfig(ModelConfig):
    """Logistic regression has no hyper-parameters of its own."""


class LogisticRegression(RankingModel):
    """A weight for each category, each number and each bin of a number.

    A user's history is left out: without products of features it can only shift all items of a user alike.
    """

    Config: ClassVar[type[ModelConfig]] = LogisticRegressionConfig

    def __init__(self, config: LogisticRegressionConfig, spec: InputSpec) -> None:
        super().__init__(spec)
        self.table = SharedTable(spec, 1, init_std=0.0)
        self.first_order = FirstOrder(spec)
        self._multi = [place for place, bag in enumerate(spec.bags) if bag.kind is ColumnKind.MULTI]

    def response(self, categorical: Tensor, numeric: Tensor, bags: Tensor) -> Tensor:
        """(N,) sum of the weights."""
        total: Tensor = self.category_terms(categorical, bags) + self.first_order(numeric)
        return total

    def category_terms(self, categorical: Tensor, bags: Tensor) -> Tensor:
        """(N,) sum of the weights of categories and of what bags hold."""
        total: Tensor = self.table.lookup(categorical).sum(dim=(1, 2))
        if self._multi:
            total = total + self.table.pool(bags, exponent=1.0)[:, self._multi].sum(dim=(1, 2))
        return total
