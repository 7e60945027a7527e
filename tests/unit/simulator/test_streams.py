from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import kstest

from evergreen.simulator.streams import KeyedDraws

REQUESTS, ITEMS = (grid.ravel() for grid in np.meshgrid(np.arange(300), np.arange(200), indexing="ij"))


def test_a_keys_number_does_not_depend_on_the_others():
    draws = KeyedDraws(3, "clicks", 7)
    some = np.arange(0, len(REQUESTS), 11)
    assert np.array_equal(draws.uniform(REQUESTS, ITEMS)[some], draws.uniform(REQUESTS[some], ITEMS[some]))


@pytest.mark.parametrize("other", [KeyedDraws(4, "clicks", 7), KeyedDraws(3, "rates", 7), KeyedDraws(3, "clicks", 8)])
def test_seed_name_and_step_each_give_other_numbers(other: KeyedDraws):
    one, two = (draws.uniform(REQUESTS, ITEMS) for draws in (KeyedDraws(3, "clicks", 7), other))
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.02


def test_numbers_are_uniform_and_those_of_neighbouring_keys_unrelated():
    numbers = KeyedDraws(0, "clicks", 1).uniform(REQUESTS, ITEMS)
    assert kstest(numbers, "uniform").pvalue > 0.001
    grid = numbers.reshape(300, 200)
    assert abs(np.corrcoef(grid[1:].ravel(), grid[:-1].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(grid[:, 1:].ravel(), grid[:, :-1].ravel())[0, 1]) < 0.02
    assert not np.array_equal(grid[:200], grid[:200].T), "(a, b) is not (b, a)"


def test_normal_numbers_are_standard():
    assert kstest(KeyedDraws(0, "delays", 1).normal(REQUESTS, ITEMS), "norm").pvalue > 0.001
