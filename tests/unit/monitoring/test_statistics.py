"""The tests hold their level on clustered rows, and see what there is to see."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from scipy.spatial import distance

from evergreen.monitoring.statistics import (
    CellShares,
    benjamini_hochberg,
    jensen_shannon,
    mean_p_value,
    normal_scores,
    shape_p_value,
)

CELLS = 8
EDGES = stats.norm.ppf(np.arange(1, CELLS) / CELLS)


def totals(rng: np.random.Generator, num_users: int, *, shift: float = 0.0, by_row: bool = False) -> np.ndarray:
    """(num_users or num_rows, CELLS) of rows that are normal, half of their variance between users."""
    sizes = rng.integers(1, 30, num_users)
    users = np.repeat(np.arange(num_users), sizes)
    values = np.sqrt(0.5) * (rng.normal(size=num_users)[users] + rng.normal(size=len(users))) + shift
    clusters = np.arange(len(users)) if by_row else users
    counts = np.zeros((clusters[-1] + 1, CELLS))
    np.add.at(counts, (clusters, np.searchsorted(EDGES, values)), 1)
    return counts


def sample(rng: np.random.Generator, num_users: int, *, shift: float = 0.0, by_row: bool = False) -> CellShares:
    return CellShares.from_totals(totals(rng, num_users, shift=shift, by_row=by_row))


def p_values(rng: np.random.Generator, *, num: int, num_users: int, by_row: bool = False) -> np.ndarray:
    """(num, 3) of the mean, the shape and one cell; both samples come from the same world."""
    last = np.eye(CELLS)[-1]
    return np.array(
        [
            [
                mean_p_value(one, other, normal_scores(other.shares)),
                shape_p_value(one, other),
                mean_p_value(one, other, last),
            ]
            for one, other in (
                (sample(rng, num_users, by_row=by_row), sample(rng, 300, by_row=by_row)) for _ in range(num)
            )
        ]
    )


def test_tests_hold_their_level_when_rows_of_a_user_are_alike() -> None:
    found = p_values(np.random.default_rng(1), num=600, num_users=100)
    for level in (0.05, 0.01):
        allowed = level + 3.5 * np.sqrt(level * (1 - level) / len(found))
        assert ((found <= level).mean(axis=0) <= allowed).all()
    assert (found <= 0.2).mean(axis=0).min() > 0.1  # they are not just never significant


def test_taking_rows_for_independent_would_raise_the_alarm_all_the_time() -> None:
    found = p_values(np.random.default_rng(1), num=60, num_users=100, by_row=True)
    assert (found[:, 0] <= 0.01).mean() > 0.3


def test_shift_of_users_is_seen() -> None:
    rng = np.random.default_rng(2)
    one, other = sample(rng, 300, shift=0.4), sample(rng, 1_000)
    assert mean_p_value(one, other, normal_scores(other.shares)) < 1e-4
    assert shape_p_value(one, other) < 1e-3


def test_one_user_with_most_of_the_rows_counts_as_little_more_than_one() -> None:
    counts = np.ones((200, 2))
    counts[0] = 100_000
    assert CellShares.from_totals(counts).effective_clusters == pytest.approx(1.0, abs=0.02)
    assert CellShares.from_totals(np.ones((200, 2))).effective_clusters == pytest.approx(200)


def test_users_who_all_agree_are_no_certainty() -> None:
    def agreeing(num_users: int, *cells: float) -> CellShares:
        return CellShares.from_totals(np.tile(cells, (num_users, 1)))

    is_second = np.array([0.0, 1.0])
    assert 1e-5 < mean_p_value(agreeing(5, 0, 3), agreeing(5, 3, 0), is_second) < 0.1
    assert 0 < mean_p_value(agreeing(60, 0, 3), agreeing(60, 3, 0), is_second) < 1e-12
    assert shape_p_value(agreeing(5, 0, 3), agreeing(5, 3, 0)) == 1.0  # fewer users than a cell needs
    assert 0 < shape_p_value(agreeing(60, 0, 3), agreeing(60, 3, 0)) < 1e-12


def test_equal_samples_differ_in_nothing() -> None:
    one = sample(np.random.default_rng(3), 50)
    assert mean_p_value(one, one, np.arange(CELLS)) == pytest.approx(1.0)
    assert shape_p_value(one, one) == 1.0
    constant = CellShares.from_totals(np.tile([4.0], (9, 1)))
    assert shape_p_value(constant, constant) == mean_p_value(constant, constant, np.ones(1)) == 1.0


def test_known_rows_are_measured_as_if_the_missing_were_not_there() -> None:
    counts = totals(np.random.default_rng(4), 80)
    known, direct = CellShares.from_totals(counts).known(), CellShares.from_totals(counts[:, :-1])
    np.testing.assert_allclose(known.shares, direct.shares)
    np.testing.assert_allclose(known.covariance, direct.covariance, atol=1e-15)


def test_cells_of_a_few_users_do_not_make_a_window_unlike() -> None:
    rng = np.random.default_rng(5)
    one, other = (np.hstack([totals(rng, 200), np.zeros((200, 20))]) for _ in range(2))
    one[np.arange(4), CELLS + np.arange(4)] = 1  # four users, each in a cell that nobody else has
    assert shape_p_value(CellShares.from_totals(one), CellShares.from_totals(other)) > 0.05


def test_distance_is_that_of_scipy() -> None:
    rng = np.random.default_rng(6)
    one, other = rng.dirichlet(np.ones(7)), np.append(rng.dirichlet(np.ones(6)), 0.0)
    assert jensen_shannon(one, other) == pytest.approx(distance.jensenshannon(one, other, base=2))
    assert jensen_shannon(one, one) == 0.0


def test_adjusted_p_values_are_those_of_scipy() -> None:
    found = np.random.default_rng(7).random(50) ** 3
    np.testing.assert_allclose(benjamini_hochberg(found), stats.false_discovery_control(found))
    assert len(benjamini_hochberg([])) == 0
