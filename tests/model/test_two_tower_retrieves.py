"""Two towers find what a user would choose among all items, popular ones at their due place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from evergreen.contracts.training_set import Side
from evergreen.models.inputs import CategoricalInput, EncodedRows, InputSpec
from evergreen.models.two_tower import TwoTower, TwoTowerConfig

NUM_USERS, NUM_ITEMS, NUM_CLICKS = 200, 150, 20_000
USER_START, ITEM_START = 1, 1 + NUM_USERS + 2
SPEC = InputSpec(
    categorical=(
        CategoricalInput(name="user_id", side=Side.USER, start=USER_START, num_rows=NUM_USERS + 2),
        CategoricalInput(name="item_id", side=Side.ITEM, start=ITEM_START, num_rows=NUM_ITEMS + 2),
    ),
    numeric=(),
    num_indicators=0,
    bags=(),
    num_embeddings=ITEM_START + NUM_ITEMS + 2,
    untrained_rows=(0, USER_START, USER_START + 1, ITEM_START, ITEM_START + 1),
)


def rows_of(user: np.ndarray, item: np.ndarray) -> EncodedRows:
    categorical = np.stack([USER_START + 2 + user, ITEM_START + 2 + item], axis=1).astype(np.int32)
    return EncodedRows(SPEC, categorical, np.empty((len(user), 0), np.float32), ())


@dataclass(frozen=True)
class World:
    """Users with tastes among items of unequal popularity, what they chose, and what they were shown beside it."""

    chance: np.ndarray
    """(NUM_USERS, NUM_ITEMS) probability that a user's next choice is the item."""
    train: EncodedRows
    labels: np.ndarray


@pytest.fixture(scope="module")
def world() -> World:
    rng = np.random.default_rng(0)
    taste, style = rng.normal(size=(NUM_USERS, 3)), rng.normal(size=(NUM_ITEMS, 3))
    popularity = -0.7 * np.log(1 + rng.permutation(NUM_ITEMS))
    weight = np.exp(popularity + 1.2 * taste @ style.T)
    chance = weight / weight.sum(axis=1, keepdims=True)
    user = rng.integers(NUM_USERS, size=NUM_CLICKS)
    chosen = (rng.random(NUM_CLICKS)[:, None] > chance.cumsum(axis=1)[user]).sum(axis=1)
    shown = rng.choice(NUM_ITEMS, size=NUM_CLICKS, p=np.exp(popularity) / np.exp(popularity).sum())
    train = rows_of(np.tile(user, 2), np.concatenate([chosen, shown]))
    return World(chance, train, np.repeat([1.0, 0.0], NUM_CLICKS).astype(np.float32))


def scores_after_training(world: World, **settings: object) -> np.ndarray:
    """(NUM_USERS, NUM_ITEMS) scores."""
    torch.manual_seed(0)
    config = TwoTowerConfig(embedding_dim=16, output_dim=16, hidden=(), dropout=0.0, id_dropout=0.0, **settings)
    model = TwoTower(config, SPEC)
    model.prepare(world.train, world.labels)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05)  # takes the table's sparse gradients, too
    labels = torch.from_numpy(world.labels)
    for _ in range(5):
        for batch in torch.split(torch.randperm(len(labels)), 512):
            loss = model.training_loss(world.train.inputs(batch.numpy()), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    with torch.inference_mode():
        users = model.user_vectors(rows_of(np.arange(NUM_USERS), np.zeros(NUM_USERS, int)).inputs())
        items = model.item_vectors(rows_of(np.zeros(NUM_ITEMS, int), np.arange(NUM_ITEMS)).inputs())
        return (users @ items.T).numpy()


def recall_at_10(scores: np.ndarray, chance: np.ndarray) -> float:
    """Probability that a user's next choice is among the ten items scored highest."""
    top = np.argsort(-scores, axis=1)[:, :10]
    return float(np.take_along_axis(chance, top, axis=1).sum(axis=1).mean())


def lead_of_popular_items(scores: np.ndarray, chance: np.ndarray) -> float:
    """By how much the tenth of items chosen most lies above all others, on average over users."""
    popular = chance.mean(axis=0) >= np.quantile(chance.mean(axis=0), 0.9)
    return float(scores[:, popular].mean() - scores[:, ~popular].mean())


@pytest.mark.parametrize("candidates", ["clicked", "not_clicked", "all"])
def test_retrieval_beats_popularity_and_gives_popular_items_their_due(world: World, candidates: str) -> None:
    corrected, uncorrected = (
        scores_after_training(world, candidates=candidates, correct_sampling=correct) for correct in (True, False)
    )
    best = recall_at_10(world.chance, world.chance)
    by_popularity = recall_at_10(np.tile(world.chance.mean(axis=0), (NUM_USERS, 1)), world.chance)
    assert by_popularity < 0.65 * best  # tastes matter here
    loss, loss_uncorrected = (best - recall_at_10(scores, world.chance) for scores in (corrected, uncorrected))
    assert loss < 0.05 * best
    assert loss_uncorrected > 3 * loss

    lead = lead_of_popular_items(np.log(world.chance), world.chance)
    assert lead_of_popular_items(corrected, world.chance) == pytest.approx(lead, rel=0.35)
    assert lead_of_popular_items(uncorrected, world.chance) < 0.2 * lead
