"""Next-item recommendation: a Transformer trained on whole user sequences, ranking the full catalogue.

Source: Kang and McAuley 2018 (SASRec), with the losses that came after: a softmax over the whole catalogue (Klenitskiy
and Vasilev 2023, Turning dross into gold loss), and gBCE over sampled negatives for catalogues that are too large for
it (Petrov and Macdonald 2023, gSASRec). Deviates: negatives are shared by the positions of a batch, which makes them a
matrix product; sequences of like length are batched together; weights are averaged over the steps (Polyak).
"""

from __future__ import annotations

import copy
import logging
import math
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from evergreen.contracts.artifact import JsonModel
from evergreen.contracts.errors import TrainingError
from evergreen.models.inputs import PAD
from evergreen.models.transformer import CausalEncoder, last_states
from evergreen.training.next_item_losses import SoftmaxLoss, gbce_loss
from evergreen.training.sequences import Holdout, Sequences, batches, latest

logger = logging.getLogger(__name__)

_SCORED_USERS = 512


class NextItemConfig(JsonModel):
    """How a next-item model is built and trained. Equal configurations on equal sequences give equal weights."""

    seed: int = 0
    """Of initial weights, batch order, dropout and negatives."""
    width: int = Field(default=64, ge=1)
    """Of item vectors and states."""
    layers: int = Field(default=2, ge=1)
    heads: int = Field(default=2, ge=1)
    """Divides `width`."""
    dropout: float = Field(default=0.2, ge=0, lt=1)
    max_length: int = Field(default=200, ge=1)
    """Items that a user's state reads; of longer sequences all windows are trained on, and the last one is read."""
    loss: Literal["softmax", "gbce"] = "softmax"
    negatives: int = Field(default=256, ge=1)
    """Items drawn for each batch, for gbce."""
    gbce_t: float = Field(default=0.75, ge=0, le=1)
    """Calibration of gbce: at 0 it is plain cross-entropy, at 1 scores are as if all items had been negatives."""
    learning_rate: float = Field(default=2e-3, gt=0)
    """Adam's at its highest; it rises over the first 5 % of the steps and falls to nothing by a cosine."""
    weight_decay: float = Field(default=0.0, ge=0)
    batch_positions: int = Field(default=4096, ge=1)
    """Items in a batch, padding included."""
    epochs: int = Field(default=40, ge=1)
    patience: int = Field(default=10, ge=1)
    """Evaluations in a row without a better NDCG@10 on validation after which training stops."""
    validation_users: int = Field(default=2048, ge=1)
    """Users that early stopping looks at, spread evenly."""
    max_seconds: float | None = Field(default=None, gt=0)
    """Wall time after which training stops, with the learning rate falling towards that moment instead of the last
    epoch: runs with a limit depend on the machine's speed."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the matrix products. bfloat16 is several times faster on processors that have it; weights stay float32."""


class NextItemModel(nn.Module):
    """Scores every item of a catalogue by the product of its vector and the state after a history."""

    def __init__(self, num_items: int, config: NextItemConfig) -> None:
        super().__init__()
        if config.width % config.heads:
            raise TrainingError(f"width={config.width} cannot be shared by heads={config.heads}: make it a multiple")
        self.max_length = config.max_length
        self.items = nn.Parameter(torch.randn(1 + num_items, config.width) * config.width**-0.5)
        with torch.no_grad():
            self.items[PAD] = 0.0
        self.encoder = CausalEncoder(
            config.width,
            layers=config.layers,
            heads=config.heads,
            dropout=config.dropout,
            max_length=config.max_length,
        )

    def states(self, items: Tensor) -> Tensor:
        """(N, L, width) states after each item of (N, L) sequences, oldest first and padded after."""
        vectors = functional.embedding(items, self.items, padding_idx=PAD)
        states: Tensor = self.encoder(vectors, (items != PAD).sum(dim=1))
        return states

    def forward(self, items: Tensor) -> Tensor:
        """(N, 1 + num_items) scores of what follows (N, L) sequences; padding scores -inf."""
        last = last_states(self.states(items), (items != PAD).sum(dim=1))
        scores = last @ self.items.t().to(last.dtype)
        scores[:, PAD] = -math.inf
        return scores


@dataclass(frozen=True)
class NextItemCurvePoint:
    """One evaluation, after an epoch."""

    epoch: int
    train_loss: float
    ndcg: float
    """NDCG@10 of the validation users that are watched."""
    seconds: float
    """Wall time since training began, evaluations included."""


def train_next_item(
    train: Sequences, validation: Holdout, config: NextItemConfig
) -> tuple[NextItemModel, list[NextItemCurvePoint]]:
    """Train until NDCG@10 on validation stops rising; the model has the averaged weights of the best evaluation.

    Args:
        train: sequences to learn from; each item is predicted from those before it.
        validation: decides when to stop.
        config: how.

    Raises:
        TrainingError: no sequence has two items, or the loss is not finite.
    """
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    model = NextItemModel(train.num_items, config)
    average = copy.deepcopy(model)
    averaged: list[Tensor] = list(average.parameters())
    weights: list[Tensor] = list(model.parameters())
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay, fused=True
    )
    watched = validation.every(config.validation_users)
    curve: list[NextItemCurvePoint] = []
    best: dict[str, Tensor] = {}
    started, waited = time.perf_counter(), 0
    for epoch in range(config.epochs):
        model.train()
        steps = batches(
            train, max_length=config.max_length, batch_positions=config.batch_positions, generator=generator
        )
        if not steps:
            raise TrainingError("no training sequence has two items: there is nothing to predict")
        total, positions = 0.0, 0
        for step, (inputs, targets) in enumerate(steps):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * _schedule(
                    epoch + step / len(steps), time.perf_counter() - started, config
                )
            value = _loss(model, inputs, targets, config, generator)
            optimizer.zero_grad(set_to_none=True)
            value.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step_of_all = epoch * len(steps) + step
            with torch.no_grad():  # over about the last epoch of steps
                torch._foreach_lerp_(averaged, weights, 1 / min(1 + step_of_all, max(2, len(steps))))
            num_targets = int((targets != PAD).sum())
            total += value.item() * num_targets
            positions += num_targets
        loss = total / positions
        if not math.isfinite(loss):
            raise TrainingError(f"next-item: the loss is {loss} in epoch {epoch + 1}: lower learning_rate")
        report = evaluate_next_item(average, watched, precision=config.precision)
        seconds = time.perf_counter() - started
        curve.append(NextItemCurvePoint(epoch + 1, loss, report["ndcg@10"], seconds))
        logger.info(
            "next-item epoch %d: loss %.4f, validation NDCG@10 %.4f, %.0f items/s, %.0f s",
            epoch + 1, loss, report["ndcg@10"], positions * (epoch + 1) / seconds, seconds,
        )  # fmt: skip
        waited = 0 if not best or report["ndcg@10"] > max(point.ndcg for point in curve[:-1]) else waited + 1
        if waited == 0:
            best = {name: weight.clone() for name, weight in average.state_dict().items()}
        out_of_time = config.max_seconds is not None and seconds >= config.max_seconds
        if waited >= config.patience or out_of_time:
            break
    model.load_state_dict(best)
    return model.eval(), curve


def _schedule(epoch: float, seconds: float, config: NextItemConfig) -> float:
    """Share of the highest learning rate: a short rise, then a cosine."""
    progress = epoch / config.epochs
    if config.max_seconds is not None:
        progress = max(progress, min(1.0, seconds / config.max_seconds))
    warm_up = min(1.0, (progress + 1e-3) / 0.05)
    return warm_up * 0.5 * (1 + math.cos(math.pi * progress))


def _autocast(precision: str) -> AbstractContextManager[None]:
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")


def _loss(
    model: NextItemModel, inputs: Tensor, targets: Tensor, config: NextItemConfig, generator: torch.Generator
) -> Tensor:
    """Mean loss over the items predicted, a scalar."""
    with _autocast(config.precision):
        states = model.states(inputs)
    real = targets != PAD
    states, targets = states[real], targets[real]
    if config.loss == "softmax":
        value: Tensor = SoftmaxLoss.apply(states, model.items, targets, config.precision == "bfloat16")
        return value
    negatives = torch.randint(1, len(model.items), (config.negatives,), generator=generator)
    return gbce_loss(states.float(), model.items, targets, negatives, t=config.gbce_t)


def evaluate_next_item(
    model: NextItemModel, holdout: Holdout, *, warm: NDArray[np.bool_] | None = None, precision: str = "float32"
) -> dict[str, float]:
    """Rank the full catalogue for each user. Items of the user's history are not candidates, as in the papers.

    Args:
        model: trained.
        holdout: histories, and the item that follows.
        warm: (1 + num_items,) whether training saw the item; reported apart when given.
        precision: of the matrix products.
    """
    model.eval()
    parts = []
    with torch.inference_mode(), _autocast(precision):
        for start in range(0, len(holdout.targets), _SCORED_USERS):
            rows = np.arange(start, min(start + _SCORED_USERS, len(holdout.targets)))
            lengths = holdout.histories.lengths[rows]
            kept = latest(holdout.histories, rows, model.max_length)
            scores = model(torch.from_numpy(kept)).float().numpy()
            seen = holdout.histories.items.take(rows)
            parts.append(_ranks(scores, np.repeat(np.arange(len(rows)), lengths), seen.values, holdout.targets[rows]))
    return ranking_report(np.concatenate(parts), holdout.targets, warm=warm)


def evaluate_counts(
    counts: NDArray[np.int64], holdout: Holdout, *, warm: NDArray[np.bool_] | None = None
) -> dict[str, float]:
    """Like `evaluate_next_item`, of one ranking for all users: (1 + num_items,) how often items occur."""
    parts = []
    for start in range(0, len(holdout.targets), _SCORED_USERS):
        rows = np.arange(start, min(start + _SCORED_USERS, len(holdout.targets)))
        scores = np.tile(counts.astype(np.float32), (len(rows), 1))
        scores[:, PAD] = -np.inf
        owner = np.repeat(np.arange(len(rows)), holdout.histories.lengths[rows])
        seen = holdout.histories.items.take(rows)
        parts.append(_ranks(scores, owner, seen.values, holdout.targets[rows]))
    return ranking_report(np.concatenate(parts), holdout.targets, warm=warm)


def ranking_report(
    ranks: NDArray[np.float64], targets: NDArray[np.int64], *, warm: NDArray[np.bool_] | None = None
) -> dict[str, float]:
    """HR@k and NDCG@k of one relevant item a user.

    Args:
        ranks: (num_users,) how many candidates rank before the target.
        targets: (num_users,) items.
        warm: (1 + num_items,) whether training saw the item.
    """
    groups = {"": np.ones(len(targets), bool)}
    if warm is not None:
        groups |= {"warm_items_": warm[targets], "cold_items_": ~warm[targets]}
    report: dict[str, float] = {}
    for name, chosen in groups.items():
        report[f"{name}users"] = float(chosen.sum())
        for k in (10, 100):
            hit = ranks[chosen] < k
            gain = np.where(hit, 1 / np.log2(ranks[chosen] + 2), 0.0)
            report[f"{name}hr@{k}"] = float(hit.mean()) if chosen.any() else math.nan
            report[f"{name}ndcg@{k}"] = float(gain.mean()) if chosen.any() else math.nan
    return report


def _ranks(
    scores: NDArray[np.float32], owner: NDArray[np.int64], seen: NDArray[np.int32], targets: NDArray[np.int64]
) -> NDArray[np.float64]:
    """(num_users,) candidates before the target; those that tie with it count half. Seen items are no candidates,
    unless the target itself was seen before."""
    rows = np.arange(len(targets))
    target = scores[rows, targets][:, None].copy()
    scores[owner, seen] = -np.inf
    higher: NDArray[np.int64] = (scores > target).sum(axis=1)
    tied = (scores == target).sum(axis=1)
    return np.asarray(higher + np.maximum(0, tied - 1) / 2)
