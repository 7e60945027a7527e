"""The detector: who is unlike people, and how often it is wrong about people."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from evergreen.fraud.detector import tail_shares


def _people(rng: np.random.Generator, num: int) -> np.ndarray:
    return rng.normal(size=(num, 3)) * [1.0, 2.0, 0.5]


@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_no_more_people_than_promised_are_beyond_a_tail_share(correlation: float) -> None:
    rng = np.random.default_rng(0)
    people = rng.multivariate_normal(np.zeros(3), np.eye(3) * (1 - correlation) + correlation, 10_000)
    tails = tail_shares(people)
    for share in (0.05, 0.01, 0.005):
        assert 0.3 * share < (tails < share).mean() < 1.2 * share


def test_bots_at_the_upper_end_of_all_measures_come_first() -> None:
    rng = np.random.default_rng(3)
    bots = _people(rng, 40) + np.array([3.0, 6.0, 1.5])
    tails = tail_shares(np.concatenate([_people(rng, 2_000), bots]))
    assert average_precision_score(np.arange(2_040) >= 2_000, -tails) > 0.95


def test_the_unusually_human_are_not_suspicious() -> None:
    rng = np.random.default_rng(4)
    people = np.concatenate([_people(rng, 2_000), _people(rng, 20) - np.array([6.0, 12.0, 3.0])])
    assert tail_shares(people)[2_000:].min() > 0.5


def test_unknown_measures_count_as_the_middle() -> None:
    measures = _people(np.random.default_rng(5), 500)
    measures[:10] = np.nan
    tails = tail_shares(measures)
    assert np.isfinite(tails).all() and tails[:10].min() > 0.5


def test_measures_that_say_nothing_make_nobody_suspicious() -> None:
    assert (tail_shares(np.zeros((100, 3))) == 1).all()
