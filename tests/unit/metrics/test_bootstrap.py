"""The cluster bootstrap: intervals cover, pairs cancel, the seed decides."""

import math

import numpy as np
import pytest

from evergreen.metrics.binary import Auc, NormalizedEntropy
from evergreen.metrics.bootstrap import cluster_bootstrap
from evergreen.metrics.statistic import Mean


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    values, clusters = np.random.default_rng(0).normal(size=500), np.arange(500)
    runs = [cluster_bootstrap({"mean": Mean(values)}, clusters, seed=seed).interval("mean") for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_the_value_is_the_metric_of_the_rows_as_they_are():
    values = np.random.default_rng(0).normal(size=500)
    interval = cluster_bootstrap({"mean": Mean(values)}, np.arange(500)).interval("mean")
    assert interval.value == pytest.approx(values.mean())
    assert interval.low < interval.value < interval.high


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(7)
    covered = 0
    for trial in range(200):
        tastes = rng.normal(size=60)  # rows of a user share a taste: the truth is 0
        rows = np.repeat(tastes, 8) + 0.3 * rng.normal(size=480)
        interval = cluster_bootstrap({"m": Mean(rows)}, np.repeat(np.arange(60), 8), seed=trial).interval("m")
        covered += interval.low <= 0 <= interval.high
    assert 180 <= covered <= 198


def test_rows_of_one_user_count_as_one_draw():
    rng = np.random.default_rng(0)
    values = np.repeat(rng.normal(size=50), 20)
    by_user = cluster_bootstrap({"m": Mean(values)}, np.repeat(np.arange(50), 20)).interval("m")
    by_row = cluster_bootstrap({"m": Mean(values)}, np.arange(1000)).interval("m")
    assert (by_user.high - by_user.low) > 3 * (by_row.high - by_row.low)


def test_a_paired_difference_is_far_surer_than_the_two_intervals():
    rng = np.random.default_rng(0)
    hard = rng.normal(size=800)
    statistics = {"a": Mean(hard), "b": Mean(hard + 0.05 + 0.1 * rng.normal(size=800))}
    bootstrap = cluster_bootstrap(statistics, np.arange(800))
    a, b = bootstrap.interval("a"), bootstrap.interval("b")
    assert a.high > b.low  # alone they overlap
    difference = bootstrap.difference("b", "a")
    assert difference.excludes_zero
    assert difference.low > 0
    assert bootstrap.difference("a", "b").high == pytest.approx(-difference.low)


def test_a_model_against_itself_is_exactly_a_tie():
    labels = np.random.default_rng(0).integers(0, 2, 300)
    scores = np.random.default_rng(1).random(300)
    bootstrap = cluster_bootstrap({"a": Auc(labels, scores), "b": Auc(labels, scores)}, np.arange(300))
    difference = bootstrap.difference("a", "b")
    assert (difference.low, difference.value, difference.high) == (0, 0, 0)
    assert not difference.excludes_zero


def test_draws_without_a_click_are_left_out_of_the_interval():
    labels = np.array([1, 0, 0, 0, 0])
    bootstrap = cluster_bootstrap({"ne": NormalizedEntropy(labels, np.full(5, 0.2))}, np.arange(5))
    undefined = np.isnan(bootstrap.replicates["ne"])
    assert 0 < undefined.sum() < 200
    interval = bootstrap.interval("ne")
    assert math.isfinite(interval.low) and math.isfinite(interval.high)


def test_an_undefined_metric_has_an_undefined_interval():
    interval = cluster_bootstrap({"auc": Auc([0, 0], [0.1, 0.2])}, [0, 1]).interval("auc")
    assert math.isnan(interval.value) and math.isnan(interval.low) and not interval.excludes_zero


def test_gaps_in_the_cluster_codes_change_nothing():
    values = np.random.default_rng(0).normal(size=100)
    dense = cluster_bootstrap({"m": Mean(values)}, np.arange(100)).interval("m")
    sparse = cluster_bootstrap({"m": Mean(values)}, np.arange(100) * 1_000).interval("m")
    assert dense == sparse


@pytest.mark.parametrize(
    ("clusters", "replicates", "message"),
    [([0, 1], 5, "m: 3 rows, but there are 2 clusters"), ([0, 1, -1], 5, "from 0"), ([0, 1, 2], 0, "num_replicates=0")],
)
def test_malformed_calls_are_refused(clusters, replicates, message):
    with pytest.raises(ValueError, match=message):
        cluster_bootstrap({"m": Mean([1.0, 2.0, 3.0])}, clusters, num_replicates=replicates)
