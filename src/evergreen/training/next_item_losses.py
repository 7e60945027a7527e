"""Losses of next-item models over large catalogues."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_SOFTMAX_ROWS = 64
"""Positions whose logits exist at a time: they stay in the processor's cache."""
_MIN_PROBABILITY = 1e-30
"""Below it the loss that is reported stops rising; gradients are exact."""


class SoftmaxLoss(torch.autograd.Function):
    """Mean cross-entropy of the softmax over all items but padding, without ever holding all logits.

    Gradients are made in the forward pass, a chunk of positions at a time: logits are made once, and stay in cache.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, items: Tensor, targets: Tensor, bfloat16: bool) -> Tensor:
        """Loss of (P, width) states against (1 + num_items, width) items and (P,) targets, none of them PAD."""
        kind = torch.bfloat16 if bfloat16 else torch.float32
        weight = items[1:].to(kind)
        place = targets - 1
        states = states.to(kind)
        state_gradient = torch.empty_like(states, dtype=torch.float32)
        item_gradient = torch.zeros_like(items)
        total = torch.zeros((), dtype=torch.float64)
        for start in range(0, len(states), _SOFTMAX_ROWS):
            rows = slice(start, start + _SOFTMAX_ROWS)
            probability = torch.softmax(states[rows] @ weight.t(), dim=1, dtype=torch.float32)
            chosen = probability.gather(1, place[rows, None])
            total -= chosen.clamp(min=_MIN_PROBABILITY).log().sum(dtype=torch.float64)
            probability.scatter_add_(1, place[rows, None], torch.full_like(chosen, -1.0))
            gradient = probability.to(kind)
            state_gradient[rows] = gradient @ weight
            item_gradient[1:] += gradient.t() @ states[rows]
        ctx.save_for_backward(state_gradient / len(states), item_gradient / len(states))
        return (total / len(states)).float()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Scale what the forward pass made."""
        state_gradient, item_gradient = ctx.saved_tensors
        return state_gradient * outputs[0], item_gradient * outputs[0], None, None


def gbce_loss(states: Tensor, items: Tensor, targets: Tensor, negatives: Tensor, *, t: float) -> Tensor:
    """Mean generalised binary cross-entropy: the positive's probability is taken to the power beta.

    Args:
        states: (P, width).
        items: (1 + num_items, width) vectors, row 0 is padding.
        targets: (P,) the item that follows.
        negatives: (k,) items drawn uniformly; one that is a position's target does not count there.
        t: 0 for plain binary cross-entropy (beta = 1), 1 for beta = k / (num_items - 1).

    Source: Petrov and Macdonald 2023, equations 11 and 12. Deviates: a constant is added to all scores, with which
    vectors of zero predict the base rate; otherwise the first epochs go into learning that most items are negatives.
    """
    share = min(1.0, len(negatives) / max(1, len(items) - 2))
    beta = share * (t * (1 - 1 / share) + 1 / share)
    base = math.log(beta / len(negatives))
    positive = (states * functional.embedding(targets, items)).sum(dim=1) + base
    negative = states @ functional.embedding(negatives, items).t() + base
    negative = negative.masked_fill(negatives == targets[:, None], -math.inf)
    return (beta * functional.softplus(-positive) + functional.softplus(negative).sum(dim=1)).mean()
