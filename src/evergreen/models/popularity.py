"""Popularity: the baseline to beat. Every item has one score, the same for all users.

The score is one column of the item's activity: its positives, or its smoothed rate, over one window. The column is
chosen on validation rows, by what the model is for: log loss for clicks, squared error for ratings, and for
interactions the place of the chosen items in the whole catalogue (drawn negatives are mostly items that nobody wants;
log loss on them prefers a window that is far too long for the top of a list).
"""

from __future__ import annotations

import logging
import re
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evergreen.contracts.feature_tables import WINDOWS_HOURS
from evergreen.contracts.mapping import LogKind
from evergreen.models.base import ModelConfig, RankingModel
from evergreen.models.calibration import fit_platt, sigmoid
from evergreen.models.encoding import ITEM_FIELD
from evergreen.models.inputs import EncodedRows, InputSpec

logger = logging.getLogger(__name__)

_COLUMN = re.compile(rf"item_(rate|positives)_({'|'.join(WINDOWS_HOURS)})")


class PopularityConfig(ModelConfig):
    """Popularity has no hyper-parameters."""


class Popularity(RankingModel):
    """bias + weight * the chosen column. A log whose items have no activity gets the base rate for every row."""

    Config: ClassVar[type[ModelConfig]] = PopularityConfig

    weights: Tensor

    def __init__(self, config: PopularityConfig, spec: InputSpec) -> None:
        super().__init__(spec)
        self.register_buffer("weights", torch.zeros(spec.numeric_width))

    @property
    def column(self) -> str | None:
        """The chosen column; None when items have no activity."""
        chosen = [column.name for column, weight in zip(self.spec.numeric, self.weights, strict=False) if weight != 0]
        return chosen[0] if chosen else None

    def response(self, categorical: Tensor, numeric: Tensor, bags: Tensor) -> Tensor:
        """(N,) weighted popularity."""
        return numeric @ self.weights

    def fit(
        self,
        train: EncodedRows,
        train_labels: NDArray[np.float32],
        validation: EncodedRows,
        validation_labels: NDArray[np.float32],
        *,
        kind: LogKind,
    ) -> dict[str, float]:
        """Fit weight and bias of each candidate column on training rows; keep the best on validation rows.

        Returns:
            By column, what was compared (less is better): log loss, mean squared error, or one minus the estimated NDCG
            over the catalogue. A column that speaks against popular items on the training rows is not a candidate.
        """
        losses: dict[str, float] = {}
        num_items = next((field.num_rows for field in self.spec.categorical if field.name == ITEM_FIELD), 0)
        for place, column in enumerate(self.spec.numeric):
            match = _COLUMN.fullmatch(column.name)
            if match is None:
                continue
            weights = np.zeros(self.spec.numeric_width, dtype=np.float32)
            weights[place] = 1.0
            if column.missing is not None and match[1] == "positives":
                weights[column.missing] = column.zero  # an item without a row yet has had no positives
            slope, bias = _line(train.numeric @ weights, train_labels, kind)
            if slope <= 0:
                continue
            scores = slope * (validation.numeric @ weights).astype(np.float64) + bias
            losses[column.name] = _loss(scores, validation_labels, kind, num_items=num_items)
            if losses[column.name] == min(losses.values()):
                self.set_output(bias=bias, scale=1.0)
                self.weights.copy_(torch.from_numpy(slope * weights))
        if not losses:
            logger.warning(
                "popularity: no column item_positives_* or item_rate_* that helps: every row gets the base rate"
            )
        return losses


def _line(x: NDArray[np.float32], labels: NDArray[np.float32], kind: LogKind) -> tuple[float, float]:
    """Slope and bias that fit the labels best."""
    if kind is not LogKind.RATINGS:
        fitted = fit_platt(x, labels, min_slope=-np.inf)
        return fitted.slope, fitted.intercept
    values, y = x.astype(np.float64), labels.astype(np.float64)
    variance = float(values.var())
    slope = float(((values - values.mean()) * (y - y.mean())).mean()) / variance if variance > 0 else 0.0
    return slope, float(y.mean() - slope * values.mean())


def _loss(scores: NDArray[np.float64], labels: NDArray[np.float32], kind: LogKind, *, num_items: int) -> float:
    if kind is LogKind.RATINGS:
        return float(np.square(scores - labels).mean())
    if kind is LogKind.INTERACTIONS:
        return 1.0 - _estimated_ndcg(scores, labels, num_items=num_items)
    p = np.clip(sigmoid(scores), 1e-7, 1 - 1e-7)
    return float(-(labels * np.log(p) + (1 - labels) * np.log1p(-p)).mean())


def _estimated_ndcg(scores: NDArray[np.float64], labels: NDArray[np.float32], *, num_items: int) -> float:
    """NDCG over a catalogue of `num_items`, estimated from a sample of negatives.

    The share of negatives that score above a positive (ties half), times the size of the catalogue, is about its rank.
    """
    negatives = np.sort(scores[labels == 0])
    positives = scores[labels == 1]
    below = np.searchsorted(negatives, positives, side="left") + np.searchsorted(negatives, positives, side="right")
    share_above = 1.0 - 0.5 * below / len(negatives)
    return float((1.0 / np.log2(2.0 + share_above * num_items)).mean())
