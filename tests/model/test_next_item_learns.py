"""Next-item models find the order in sequences, where popularity cannot."""

from __future__ import annotations

import numpy as np
import pytest

from evergreen.training.next_item import (
    NextItemConfig,
    evaluate_counts,
    evaluate_next_item,
    train_next_item,
)
from evergreen.training.sequences import Sequences, leave_one_out

NUM_ITEMS, FOLLOWERS = 120, 3


@pytest.fixture(scope="module")
def markov() -> Sequences:
    """After each item come, most of the time, one of three others; all items are equally popular."""
    rng = np.random.default_rng(0)
    shifts = np.array([7, 23, 51])
    num_users, length = 400, 24
    items = np.empty((num_users, length), dtype=np.int64)
    items[:, 0] = rng.integers(NUM_ITEMS, size=num_users)
    for step in range(1, length):
        follows = (items[:, step - 1] + rng.choice(shifts, size=num_users)) % NUM_ITEMS
        anything = rng.integers(NUM_ITEMS, size=num_users)
        items[:, step] = np.where(rng.random(num_users) < 0.9, follows, anything)
    return Sequences.from_interactions(np.repeat(np.arange(num_users), length), items.ravel())


@pytest.mark.parametrize(
    "settings", [{"loss": "softmax"}, {"loss": "softmax", "precision": "bfloat16"}, {"loss": "gbce", "negatives": 60}]
)
def test_markov_order_is_learned(markov: Sequences, settings: dict[str, object]) -> None:
    train, validation, test = leave_one_out(markov)
    config = NextItemConfig.model_validate(
        {
            "width": 32, "layers": 1, "heads": 1, "dropout": 0.1, "max_length": 24,
            "epochs": 14, "learning_rate": 1e-2, "batch_positions": 1024, **settings,
        }
    )  # fmt: skip
    model, curve = train_next_item(train, validation, config)
    report = evaluate_next_item(model, test)
    best = 0.9 * (1 + 1 / np.log2(3) + 1 / 2) / FOLLOWERS  # the three followers rank first, in any order
    assert report["ndcg@10"] > 0.75 * best
    assert evaluate_counts(train.counts(), test)["ndcg@10"] < 0.15
    assert max(point.ndcg for point in curve) == pytest.approx(
        evaluate_next_item(model, validation)["ndcg@10"], abs=0.02
    )
