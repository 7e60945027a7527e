"""Drawn negatives: from the catalogue of the moment, never what the user knew."""

import numpy as np

from evergreen.training.negatives import draw_negatives


def _log(num_events: int, num_users: int, num_items: int, seed: int):
    rng = np.random.default_rng(seed)
    time = np.sort(rng.integers(0, 10_000, num_events))
    item = rng.integers(0, num_items, num_events)
    user = rng.integers(0, num_users, num_events)
    first_seen = np.full(num_items, 10_001)
    np.minimum.at(first_seen, item, time)
    return user, item, time, first_seen


def test_a_negative_existed_strictly_before_its_positive() -> None:
    user, item, time, first_seen = _log(500, 20, 80, seed=1)
    drawn = draw_negatives(user, item, time, first_seen, per_positive=4, rng=np.random.default_rng(0))
    assert (first_seen[drawn.item] < time[drawn.positive]).all()


def test_a_negative_is_nothing_that_its_user_met_up_to_then() -> None:
    user, item, time, first_seen = _log(500, 5, 40, seed=2)
    drawn = draw_negatives(user, item, time, first_seen, per_positive=4, rng=np.random.default_rng(0))
    for positive, negative in zip(drawn.positive, drawn.item, strict=True):
        met = item[(user == user[positive]) & (time <= time[positive])]
        assert negative not in met


def test_an_item_that_the_user_meets_later_may_be_drawn() -> None:
    """Leaving it out would use the future."""
    user, item, time = np.array([0, 1, 0]), np.array([0, 1, 1]), np.array([10, 5, 20])
    drawn = draw_negatives(user, item, time, np.array([4, 5]), per_positive=50, rng=np.random.default_rng(0))
    assert 1 in drawn.item[drawn.positive == 0]


def test_nothing_is_drawn_from_an_empty_catalogue() -> None:
    drawn = draw_negatives(
        np.array([0]), np.array([0]), np.array([5]), np.array([5]), per_positive=3, rng=np.random.default_rng(0)
    )
    assert len(drawn.positive) == len(drawn.item) == 0


def test_draws_are_uniform_over_the_catalogue_of_the_moment() -> None:
    n = 4000
    first_seen = np.arange(10)
    drawn = draw_negatives(
        np.arange(n), np.full(n, 9), np.full(n, 9), first_seen, per_positive=1, rng=np.random.default_rng(0)
    )
    share = np.bincount(drawn.item, minlength=10) / len(drawn.item)
    assert share[9] == 0
    assert np.abs(share[:9] - 1 / 9).max() < 0.02


def test_the_same_seed_draws_the_same() -> None:
    log = _log(200, 10, 30, seed=3)
    first, second = (draw_negatives(*log, per_positive=2, rng=np.random.default_rng(7)) for _ in range(2))
    assert (first.item == second.item).all()
