"""Position bias: what is shown further down is looked at less, so it is clicked less, whatever it is worth.

Two ways out. `PositionEffect` is a term of the position that is learned beside the model and held constant when
serving. `examination_weights` weighs clicks by 1 / the probability that their position was looked at.

Sources: Craswell et al. 2008, An experimental comparison of click position-bias models (a click is examination times
relevance); Zhao et al. 2019, Recommending what video to watch next (position as a shallow tower beside the network);
Joachims et al. 2017, Unbiased learning-to-rank with biased feedback (inverse propensity of clicks).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from evergreen.contracts.artifact import JsonModel

UNKNOWN = 0
"""Position of a row whose position is unknown."""

_PRIOR_CLICKS = 5.0
"""Clicks of the top position's rate that are added to each position before it is compared with the top."""
_MAX_INVERSE_PROPENSITY = 10.0
"""Against the mean."""
_ROUNDS = 100
_SPEED = 10.0
"""Steps of the effects against those of other tables. They have hundreds of rows a batch, and must be there before the
network has learned to say the same in other words: at 1, early stopping comes before they are half learned."""


class PositionEffects(JsonModel):
    """What a model learned about positions, in log-odds against an average position (see `PositionEffect.constant`)."""

    effects: tuple[float, ...]
    """By position, from `UNKNOWN`, which is 0; positions beyond the last are like the last."""

    def at(self, positions: NDArray[np.integer]) -> NDArray[np.float64]:
        """(n,) what to add to scores of (n,) positions to predict the clicks of rows shown there."""
        place = np.clip(positions, UNKNOWN, len(self.effects) - 1)
        effects: NDArray[np.float64] = np.array(self.effects, dtype=np.float64)[place]
        return effects


class PositionEffect(nn.Module):
    """A learned term of the position, added to scores in training only. Starts at zero.

    Deviates from Zhao et al. 2019: the tower reads the position alone, so that its mean can move into the model's bias
    and nothing of it has to be served. Where they drop positions at random, to keep the network from leaning on them,
    nothing is dropped: what the two of them share is additive, and a position says nothing but itself.
    """

    def __init__(self, num_positions: int) -> None:
        """Positions run from 1 to `num_positions`; what is shown further down shares the last."""
        super().__init__()
        # In units of 1 / _SPEED. The name puts it among the tables that Adagrad trains: Adam's steps are too short to
        # arrive in a few hundred, and as long for a position seen twice as for the top.
        self.bin_table = nn.Parameter(torch.zeros(num_positions + 1, 1))

    @property
    def num_positions(self) -> int:
        """Positions that have an effect of their own."""
        return len(self.bin_table) - 1

    def forward(self, positions: Tensor) -> Tensor:
        """(N,) log-odds to add to the scores of (N,) positions; 0, and never trained, where unknown."""
        place = positions.long().clamp(UNKNOWN, self.num_positions)
        return _SPEED * functional.embedding(place, self.bin_table, padding_idx=UNKNOWN).squeeze(1)

    def penalty(self, num_rows: int) -> Tensor:
        """What to add to the mean loss of a batch: a standard normal prior on each effect.

        It binds positions with a few clicks and is nothing to those with hundreds.

        Args:
            num_rows: training rows, over which the loss is a mean.
        """
        return (_SPEED * self.bin_table).square().sum() / (2 * num_rows)

    def constant(self, positions: NDArray[np.integer]) -> float:
        """The effect of an average position: add it to the model's bias after training.

        It is the logarithm of the mean of exp(effect) over the training rows of known position, at which rare clicks
        come out as many as they are; the mean effect itself would promise too few, the more so the more positions
        differ. 0 when no position is known.
        """
        known = positions[positions > UNKNOWN]
        if len(known) == 0:
            return 0.0
        return float(np.log(np.exp(self._effects()[np.minimum(known, self.num_positions)]).mean()))

    def centred(self, positions: NDArray[np.integer]) -> PositionEffects:
        """The effects less their `constant`, for the package. `positions` are those of the training rows."""
        effects = self._effects() - self.constant(positions)
        effects[UNKNOWN] = 0.0
        return PositionEffects(effects=tuple(effects.tolist()))

    def _effects(self) -> NDArray[np.float64]:
        """(num_positions + 1,)."""
        effects: NDArray[np.float64] = _SPEED * self.bin_table.detach().squeeze(1).double().cpu().numpy()
        return effects


@dataclass(frozen=True)
class ExaminationWeights:
    """Row weights that undo the position, and what they rest on."""

    weights: NDArray[np.float32]
    """(n,): 1 / P(examined) for clicks, scaled to 1 on average over them; 1 for the other rows."""
    examination: tuple[float, ...]
    """By position, from `UNKNOWN` (1): the probability that it is looked at, relative to the top position."""
    effective_clicks: float
    """Clicks of equal weight that would say as much (Kish 1965). Far below the clicks of the log: the weights cost
    more in noise than they bring."""


def examination_weights(
    positions: NDArray[np.integer],
    labels: NDArray[np.floating],
    *,
    propensities: NDArray[np.floating] | None = None,
    items: NDArray[np.integer] | None = None,
    max_weight: float = 10.0,
) -> ExaminationWeights:
    """Weigh clicks by 1 / the probability that their position was examined.

    A click at position k happens with probability P(examined k) x relevance, so clicks counted 1 / P(examined k) times
    are as many as the relevance says. Rows without a click keep weight 1: the unbiased loss of Saito et al. 2020 would
    also take 1 / P(examined) - 1 of a negative from every click, which is left out, because negative weights make the
    loss unbounded and the relevance of a click is far below 1 in any log of impressions.

    Args:
        positions: (n,) from 1; 0 where unknown: such rows weigh like the top position.
        labels: (n,) 0 or 1.
        propensities: see `examination_by_position`.
        items: see `examination_by_position`.
        max_weight: 1 / P(examined) is cut there, relative to the top.

    Raises:
        ValueError: max_weight is below 1.
    """
    if not max_weight >= 1:
        raise ValueError(f"max_weight={max_weight}: must be at least 1, the weight of the top position")
    examination = examination_by_position(positions, labels, propensities=propensities, items=items)
    clicked = labels > 0
    weights = np.ones(len(labels))
    place = np.clip(positions[clicked], UNKNOWN, len(examination) - 1)
    inverse = np.minimum(1.0 / np.maximum(examination[place], 1.0 / max_weight), max_weight)
    weights[clicked] = inverse / inverse.mean() if len(inverse) else inverse
    effective = float(inverse.sum() ** 2 / np.square(inverse).sum()) if len(inverse) else 0.0
    return ExaminationWeights(weights.astype(np.float32), tuple(examination.tolist()), effective)


def examination_by_position(
    positions: NDArray[np.integer],
    labels: NDArray[np.floating],
    *,
    propensities: NDArray[np.floating] | None = None,
    items: NDArray[np.integer] | None = None,
) -> NDArray[np.float64]:
    """Estimate from the log how likely each position is looked at, relative to the top one.

    Click rates by position tell it only where positions hold alike items. A policy that puts good items on top breaks
    that; either of two things mends it:

    - propensities: rows weighed by 1 / propensity are those of a policy that shows every item alike, at any position;
    - items: clicks are fitted as rate of the item x examination of the position, by maximum likelihood of Poisson
      counts (the position-based model of Craswell et al. 2008 with rare clicks), so that each item is compared with
      itself at other positions.

    Args:
        positions: (n,) from 1; 0 where unknown: such rows are not used.
        labels: (n,) 0 or 1.
        propensities: (n,) probability that the logging policy put the item there, nan where unknown; such rows are not
            used, and if all are, items are. 1 / propensity is cut at ten times its mean.
        items: (n,) codes of the items, from 0.

    Returns:
        (num_positions + 1,): 1 for `UNKNOWN` and for the top, and for a position without rows that of the nearest one
        above. Positions with few clicks, or with few that carry most of the weight, are pulled towards 1.
    """
    use = positions > UNKNOWN
    if propensities is not None and (use & (propensities > 0)).any():
        use &= propensities > 0
    else:
        propensities = None
    if not use.any():
        return np.ones(2)
    place, clicks = positions[use].astype(np.int64), labels[use].astype(np.float64)
    if not clicks.any():
        return np.ones(int(place.max()) + 1)
    weights = np.ones(len(place))
    if propensities is not None:
        # Divided by their mean, weighted counts are in the unit of rows, which the prior is in, too.
        weights = 1.0 / propensities[use].astype(np.float64)
        weights = np.minimum(weights / weights.mean(), _MAX_INVERSE_PROPENSITY)
    if propensities is None and items is not None:
        views, counts = _views_of_equal_items(place, clicks, items[use])
    else:
        views = np.bincount(place, weights).astype(np.float64)
        counts = np.bincount(place, weights * clicks).astype(np.float64)
    top = int(place.min())
    top_rate = counts[top] / views[top]
    examination = np.ones(len(views))
    if top_rate > 0:
        # Clicks of uneven weight say less than as many of equal weight (Kish 1965).
        prior = _PRIOR_CLICKS * float((weights**2 @ clicks) / (weights @ clicks))
        examination = (counts + prior) / (views * top_rate + prior)
    examination[: top + 1] = 1.0
    for position in np.flatnonzero(views[top:] == 0) + top:
        examination[position] = examination[position - 1]
    return examination


def _views_of_equal_items(
    place: NDArray[np.int64], clicks: NDArray[np.float64], items: NDArray[np.integer]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """By position, views weighted by the item's click rate, and clicks.

    The two steps, each the maximum given the other: an item's rate is its clicks over its examined views, a position's
    examination its clicks over its views weighted by the rates of the items there.
    """
    _, code = np.unique(items, return_inverse=True)
    width = int(place.max()) + 1
    cells, cell_views = np.unique(code * width + place, return_counts=True)
    cell_item, cell_place = cells // width, cells % width
    clicks_of_item = np.bincount(code, clicks)
    counts = np.bincount(place, clicks).astype(np.float64)
    views, examination = np.zeros(width), np.ones(width)
    for _ in range(_ROUNDS):
        rate = clicks_of_item / np.bincount(cell_item, cell_views * examination[cell_place])
        views = np.bincount(cell_place, cell_views * rate[cell_item], minlength=width).astype(np.float64)
        update = np.divide(counts, views, out=np.ones(width), where=views > 0)
        update = np.maximum(update, 1e-6)  # an item seen only at positions without a click still needs views
        moved = np.abs(np.log(update / examination)).max()
        examination = update
        if moved < 1e-6:
            break
    return views, counts
