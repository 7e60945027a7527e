"""All models on the same test rows, for the three kinds of log, with an honest verdict."""

import json
import time

import numpy as np
import pyarrow as pa
import pytest

from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.evaluation import BASE_RATE, Evaluation, Latency, Verdict
from evergreen.evaluation.evaluate import EvaluationConfig, evaluate_models
from evergreen.evaluation.ranking import RECENT_POPULARITY
from evergreen.metrics.binary import auc, normalized_entropy
from evergreen.metrics.regression import rmse

CONFIG = EvaluationConfig(latency_budget_ms=5_000, latency_repetitions=10, num_replicates=100, max_queries=60)


def x(table: pa.Table) -> np.ndarray:
    return table["x"].to_numpy()


def noise(table: pa.Table) -> np.ndarray:
    """Knows nothing."""
    return np.random.default_rng(0).uniform(0.02, 0.25, table.num_rows)


def own_kind(table: pa.Table) -> np.ndarray:
    users, items = (np.array([int(v[1:]) for v in table[n].to_pylist()]) for n in ("user_id", "item_id"))
    return (users % 4 == items % 4).astype(float)


def popular(table: pa.Table) -> np.ndarray:
    return table["item_positives_7d"].cast(pa.float64()).fill_null(0).to_numpy()


def sigmoid(scores: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(1.4 - scores))


def run(world, packages, out, config=CONFIG) -> Evaluation:
    return evaluate_models(
        world.training_set, packages, out, tables=world.tables, snapshot=world.snapshot, config=config
    )


@pytest.fixture(scope="module")
def clicked(clicks, tmp_path_factory) -> Evaluation:
    packages = [clicks.scorer("deepfm", x), clicks.scorer("logistic_regression", noise)]
    return run(clicks, packages, tmp_path_factory.mktemp("out") / "evaluation")


def test_clicks_metrics_are_those_of_the_test_rows(clicks, clicked):
    rows = clicks.training_set.read("test")
    metrics = clicked.model("deepfm").metrics
    assert metrics["auc"].value == pytest.approx(auc(rows["label"].to_numpy(), x(rows)))
    assert metrics["normalized_entropy"].value == pytest.approx(normalized_entropy(rows["label"].to_numpy(), x(rows)))
    assert 0.8 < metrics["click_rate_ratio"].value < 1.2
    assert metrics["expected_calibration_error"].value < 0.03
    for estimate in metrics.values():
        assert estimate.low <= estimate.high
    assert clicked.result.test_rows == 4_000
    assert clicked.result.resampled == "users"
    assert clicked.result.num_clusters == 200


def test_clicks_champion_is_the_model_that_knows(clicked):
    assert clicked.champion == "deepfm"
    assert clicked.result.champion_version == "deepfm-0123456789ab"
    assert clicked.result.primary_metric == "normalized_entropy"
    assert clicked.model("deepfm").beats_baseline
    assert clicked.model("deepfm").against_champion is None
    assert clicked.model("logistic_regression").against_champion.verdict is Verdict.WORSE
    assert not clicked.model("logistic_regression").beats_baseline
    assert "beats the base rate" in clicked.reason


def test_base_rate_is_the_constant_of_the_train_rows(clicks, clicked):
    rows = clicks.training_set.read("test")
    base = clicked.model(BASE_RATE)
    rate = clicks.training_set.manifest.splits["train"].label_mean
    assert base.metrics["auc"].value == 0.5
    assert base.metrics["normalized_entropy"].value == pytest.approx(
        normalized_entropy(rows["label"].to_numpy(), np.full(rows.num_rows, rate))
    )
    assert base.version is None and base.latency is None and base.beats_baseline is None


def test_models_are_listed_from_simple_to_complex(clicked):
    assert [m.name for m in clicked.result.models] == [BASE_RATE, "logistic_regression", "deepfm"]


def test_slices_split_the_rows_by_user_item_and_day(clicked):
    slices = {part.name: part for part in clicked.result.slices}
    assert slices["new users"].rows + slices["known users"].rows == 4_000
    assert slices["new users"].rows > 1_500
    assert slices["new items"].rows == 0
    assert slices["new items"].skipped == "0 rows, at least 100 are needed"
    days = [part for part in clicked.result.slices if part.dimension == "day"]
    assert [part.name for part in days] == [f"2024-03-{day}" for day in range(27, 32)] + ["2024-04-01", "2024-04-02"]
    assert sum(part.positives for part in days) == clicked.result.test_positives
    assert set(days[0].models) == {BASE_RATE, "logistic_regression", "deepfm"}


def test_written_evaluation_reads_back(clicked):
    loaded = Evaluation.load(clicked.path)
    assert loaded.result == clicked.result
    assert json.loads((clicked.path / "metrics.json").read_text())["champion"] == "deepfm"
    with pytest.raises(ArtifactError, match="'svm' was not evaluated"):
        loaded.model("svm")


def test_curves_hold_roc_calibration_and_confusion(clicked):
    curve = clicked.curves().models["deepfm"]
    assert 2 < len(curve.thresholds) <= 200
    assert np.isfinite(curve.thresholds).all()
    assert sum(sum(row) for row in curve.confusion) == sum(one.rows for one in curve.calibration) == 4_000
    assert BASE_RATE not in clicked.curves().models


def test_same_seed_same_figures(clicks, clicked, tmp_path):
    packages = [clicks.scorer("logistic_regression", noise), clicks.scorer("deepfm", x)]  # in another order
    again = run(clicks, packages, tmp_path / "again")
    assert [m.metrics for m in again.result.models] == [m.metrics for m in clicked.result.models]
    assert again.result.slices == clicked.result.slices


def test_equal_models_leave_the_simplest_as_champion(clicks, tmp_path):
    evaluation = run(clicks, [clicks.scorer("deepfm", x), clicks.scorer("factorization_machine", x)], tmp_path / "e")
    assert evaluation.champion == "factorization_machine"
    assert evaluation.model("deepfm").against_champion.verdict is Verdict.TIED


def test_models_that_know_nothing_do_not_beat_the_base_rate_and_the_verdict_says_so(clicks, tmp_path):
    evaluation = run(clicks, [clicks.scorer("popularity", noise), clicks.scorer("deepfm", noise)], tmp_path / "e")
    assert not evaluation.result.any_beats_baseline
    assert "No model beats the base rate outside the interval" in evaluation.reason
    assert "does not beat the base rate" in evaluation.report.read_text()


def test_a_slow_model_is_not_champion(clicks, tmp_path):
    def slow(table: pa.Table) -> np.ndarray:
        time.sleep(0.02)
        return x(table)

    config = CONFIG.model_copy(update={"latency_budget_ms": 15.0})
    evaluation = run(
        clicks, [clicks.scorer("deepfm", slow), clicks.scorer("popularity", noise)], tmp_path / "e", config
    )
    assert not evaluation.model("deepfm").latency.within_budget
    assert evaluation.model("deepfm").latency.p50_ms >= 20
    assert "deepfm is left out" in evaluation.reason or "No model meets the latency budget" in evaluation.reason


def test_test_rows_without_a_click_are_evaluated_as_far_as_they_go(write_world, split_rows, tmp_path):
    rows = {
        split: split_rows(split, (np.arange(300) % 10 == 0) if split != "test" else np.zeros(300), np.full(300, 0.1))
        for split in ("train", "validation", "test")
    }
    world = write_world(tmp_path / "world", "impressions", rows)
    evaluation = run(world, [world.scorer("deepfm", x), world.scorer("popularity", x)], tmp_path / "e")
    estimate = evaluation.model("deepfm").metrics["auc"]
    assert estimate.value is None
    assert estimate.reason == "these rows have one class only"
    assert evaluation.model("deepfm").metrics["log_loss"].value == pytest.approx(-np.log(0.9))
    assert evaluation.champion == "popularity"
    assert "undefined" in evaluation.reason
    assert evaluation.curves().models == {}


def test_ratings_are_compared_by_rmse_against_the_mean(ratings, tmp_path):
    evaluation = run(ratings, [ratings.scorer("deepfm", x)], tmp_path / "e")
    rows = ratings.training_set.read("test")
    deepfm, base = evaluation.model("deepfm"), evaluation.model(BASE_RATE)
    assert set(deepfm.metrics) == {"rmse", "mae"}
    assert deepfm.metrics["rmse"].value == pytest.approx(rmse(rows["label"].to_numpy(), x(rows)))
    assert deepfm.metrics["rmse"].high < base.metrics["rmse"].low
    assert deepfm.beats_baseline
    assert evaluation.result.primary_metric == "rmse"
    assert all(part.skipped is None for part in evaluation.result.slices if part.dimension == "user")
    assert evaluation.curves().models == {}


def test_interactions_are_ranked_over_the_catalogue_against_popularity(reads, tmp_path):
    packages = [
        reads.scorer("deepfm", own_kind, probability=sigmoid),
        reads.scorer("popularity", popular, probability=sigmoid),
    ]
    evaluation = run(reads, packages, tmp_path / "e")
    result = evaluation.result
    assert (result.primary_metric, result.baseline, result.champion) == ("ndcg_at_10", "popularity", "deepfm")
    assert evaluation.model("popularity").beats_baseline is None
    assert evaluation.model("deepfm").beats_baseline
    assert evaluation.model(BASE_RATE).metrics["ndcg_at_10"].high < evaluation.model("deepfm").metrics["ndcg_at_10"].low
    expected = {f"{m}_at_{k}" for m in ("ndcg", "recall") for k in (5, 10, 20)}
    expected |= {"auc", "log_loss", "normalized_entropy", "expected_calibration_error", "click_rate_ratio"}
    assert set(evaluation.model("deepfm").metrics) == expected
    queries = result.queries
    assert queries.found == queries.without_new_items + queries.unreachable + queries.sampled_out + queries.evaluated
    assert {part.name for part in result.slices} >= {
        "new users", "known users", "users without history", "users with history", "new items", "known items",
    }  # fmt: skip
    assert result.resampled == "users"


def test_without_popularity_a_ranking_has_a_baseline_of_recent_popularity_all_the_same(reads, tmp_path):
    evaluation = run(reads, [reads.scorer("deepfm", own_kind, probability=sigmoid)], tmp_path / "e")
    assert [m.name for m in evaluation.result.models] == [BASE_RATE, RECENT_POPULARITY, "deepfm"]
    assert evaluation.result.baseline == RECENT_POPULARITY
    baseline = evaluation.model(RECENT_POPULARITY)
    assert set(baseline.metrics) == {f"{m}_at_{k}" for m in ("ndcg", "recall") for k in (5, 10, 20)}
    assert baseline.latency is None and baseline.version is None
    assert evaluation.model("deepfm").beats_baseline
    page = evaluation.report.read_text()
    assert "recent popularity ranks by positives an hour" in page
    assert (
        page.count("</span>recent popularity") == 3
    )  # ranking, differences, warm and cold; it predicts no probability


def test_recent_popularity_is_not_added_beside_a_trained_popularity(reads, tmp_path):
    packages = [reads.scorer("popularity", popular, probability=sigmoid)]
    evaluation = run(reads, packages, tmp_path / "e")
    assert [m.name for m in evaluation.result.models] == [BASE_RATE, "popularity"]


def test_an_extreme_budget_takes_logistic_regression_and_a_loose_one_the_transformer(clicks, tmp_path, monkeypatch):
    def measured(packages, request, config):
        p99 = {"popularity": 2.0, "logistic_regression": 3.0, "transformer": 20.0}
        return {
            name: Latency(rows=500, repetitions=10, p50_ms=ms, p99_ms=ms, within_budget=ms <= config.latency_budget_ms)
            for name, ms in p99.items()
        }

    monkeypatch.setattr("evergreen.evaluation.evaluate.measure_latency", measured)
    packages = [
        clicks.scorer("transformer", x),
        clicks.scorer("logistic_regression", lambda table: 0.5 * x(table) + 0.06),
        clicks.scorer("popularity", noise),
    ]
    champions = {}
    for budget in (5.0, 50.0):
        config = CONFIG.model_copy(update={"latency_budget_ms": budget})
        evaluation = run(clicks, packages, tmp_path / f"e{budget:g}", config)
        champions[budget] = evaluation.champion
    assert champions == {5.0: "logistic_regression", 50.0: "transformer"}
    assert "Of 2 simpler models logistic_regression is best" in evaluation.reason


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda world: [], "no models to evaluate"),
        (lambda world: [world.scorer("deepfm", x)] * 2, r"models \['deepfm'\] are given twice"),
        (lambda world: [world.scorer("deepfm", lambda t: np.full(t.num_rows, np.nan))], "4000 of 4000 predictions"),
    ],
)
def test_inputs_that_cannot_be_evaluated_are_refused(clicks, tmp_path, change, message):
    with pytest.raises(ArtifactError, match=message):
        run(clicks, change(clicks), tmp_path / "e")
    assert not (tmp_path / "e").exists()


def test_a_model_of_another_snapshot_is_refused(clicks, tmp_path):
    package = clicks.scorer("deepfm", x)
    package.snapshot_id = "f" * 64
    with pytest.raises(ArtifactError, match="was made from snapshot ffffffffffff"):
        run(clicks, [package], tmp_path / "e")


def test_an_empty_test_split_is_refused_with_a_way_out(write_world, split_rows, tmp_path):
    rows = {split: split_rows(split, np.arange(50) % 2, np.full(50, 0.5)) for split in ("train", "validation")}
    world = write_world(tmp_path / "world", "impressions", rows | {"test": rows["train"].slice(0, 0)})
    with pytest.raises(ArtifactError, match=r"test split has no rows.*test_fraction"):
        run(world, [world.scorer("deepfm", x)], tmp_path / "e")
