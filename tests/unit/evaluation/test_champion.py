"""The champion is chosen by quality, within the latency budget, and the simplest of equals wins."""

from evergreen.contracts.evaluation import BASE_RATE, Difference, Estimate, Latency, Verdict
from evergreen.evaluation.champion import Choice, Contender, choose_champion

ORDER = ("popularity", "logistic_regression", "factorization_machine", "deepfm", "transformer")


def contender(name: str, value: float | None, p99: float = 5.0, *, budget: float = 50) -> Contender:
    estimate = (
        Estimate(value=None, reason="one class only") if value is None else Estimate(value=value, low=value, high=value)
    )
    return Contender(
        name, estimate, Latency(rows=500, repetitions=100, p50_ms=p99, p99_ms=p99, within_budget=p99 <= budget)
    )


def choose(
    contenders: list[Contender],
    *,
    baseline: tuple[str, float] = (BASE_RATE, 1.0),
    sure: float = 0.02,
    lower: bool = True,
    budget: float = 50,
) -> Choice:
    """Differences of at least `sure` are outside the interval."""
    values = {c.name: c.value.value for c in contenders} | {baseline[0]: baseline[1]}
    differences = {}
    for a, x in values.items():
        for b, y in values.items():
            if a != b and x is not None and y is not None:
                better = (x < y) == lower
                verdict = Verdict.TIED if abs(x - y) < sure else Verdict.BETTER if better else Verdict.WORSE
                interval = Estimate(value=x - y, low=x - y - sure, high=x - y + sure)
                differences[a, b] = Difference(against=b, estimate=interval, verdict=verdict)
            elif a != b:
                undefined = Estimate(value=None, reason="one class only")
                differences[a, b] = Difference(against=b, estimate=undefined, verdict=Verdict.TIED)
    return choose_champion(
        contenders,
        differences,
        metric="normalized_entropy",
        lower_is_better=lower,
        baseline=baseline[0],
        latency_budget_ms=budget,
        simplest_first=ORDER,
    )


def test_best_model_wins_and_the_reason_names_the_next_and_the_baseline():
    choice = choose([contender("deepfm", 0.80), contender("logistic_regression", 0.90), contender("popularity", 0.95)])
    assert choice.champion == "deepfm"
    assert choice.any_beats_baseline
    assert "ahead of logistic_regression" in choice.reason
    assert "-0.1000 [-0.1200, -0.0800], outside the interval" in choice.reason
    assert "It beats the base rate by -0.2000" in choice.reason


def test_tie_goes_to_the_simplest():
    choice = choose(
        [contender("deepfm", 0.800), contender("factorization_machine", 0.805), contender("popularity", 0.9)]
    )
    assert choice.champion == "factorization_machine"
    assert "as good as deepfm" in choice.reason
    assert "simpler" in choice.reason


def test_the_simplest_leader_says_that_it_is_ahead_but_within_the_interval():
    choice = choose([contender("deepfm", 0.805), contender("popularity", 0.800)])
    assert choice.champion == "popularity"
    assert "but within the interval" in choice.reason


def test_reason_says_when_the_simpler_model_is_faster_too():
    choice = choose([contender("deepfm", 0.800, p99=20), contender("logistic_regression", 0.805, p99=2)])
    assert "faster (p99 2.0 against 20.0 ms)" in choice.reason


def test_metric_where_higher_is_better():
    choice = choose([contender("deepfm", 0.3), contender("popularity", 0.2)], baseline=("popularity", 0.2), lower=False)
    assert choice.champion == "deepfm"
    assert "It beats popularity by +0.1000" in choice.reason


def test_model_over_the_latency_budget_is_left_out_and_named():
    choice = choose([contender("deepfm", 0.7, p99=80), contender("logistic_regression", 0.9)])
    assert choice.champion == "logistic_regression"
    assert "deepfm is left out: its p99 of 80.0 ms is over the budget of 50 ms" in choice.reason


ZOO = (
    ("popularity", 0.95, 2.0),
    ("logistic_regression", 0.90, 3.0),
    ("factorization_machine", 0.88, 4.0),
    ("deepfm", 0.84, 5.0),
    ("transformer", 0.80, 30.0),
)


def choose_from_the_zoo(budget: float, zoo=ZOO) -> Choice:
    return choose([contender(name, value, p99, budget=budget) for name, value, p99 in zoo], budget=budget)


def test_an_extreme_budget_takes_logistic_regression_and_says_what_it_cost():
    choice = choose_from_the_zoo(3.5)
    assert choice.champion == "logistic_regression"
    assert "transformer is left out: its p99 of 30.0 ms is over the budget of 3.5 ms" in choice.reason
    assert "without the budget it would be better by -0.1000 [-0.1200, -0.0800]" in choice.reason
    assert "The simpler popularity (p99 2.0 ms): it is worse by +0.0500" in choice.reason


def test_a_loose_budget_takes_the_transformer_and_says_why_no_simpler_model_would_do():
    choice = choose_from_the_zoo(50)
    assert choice.champion == "transformer"
    assert "Of 4 simpler models deepfm is best (p99 5.0 ms): it is worse by +0.0400" in choice.reason
    assert "left out" not in choice.reason


def test_each_budget_takes_the_best_model_that_it_allows():
    champions = [choose_from_the_zoo(budget).champion for budget in (2.5, 3.5, 4.5, 5.5, 29, 31)]
    assert champions == [
        "popularity", "logistic_regression", "factorization_machine", "deepfm", "deepfm", "transformer",
    ]  # fmt: skip


def test_a_model_left_out_that_is_no_better_is_called_so():
    choice = choose([contender("deepfm", 0.895, p99=80), contender("logistic_regression", 0.9)])
    assert "over the budget of 50 ms; it is no better outside the interval (-0.0050" in choice.reason


def test_a_simpler_model_that_is_worse_than_the_leader_is_named_when_an_equal_of_the_leader_is_taken():
    choice = choose([contender("deepfm", 0.80), contender("factorization_machine", 0.81), contender("popularity", 0.9)])
    assert choice.champion == "factorization_machine"
    assert "The simpler popularity (p99 5.0 ms): it is worse than deepfm by +0.1000" in choice.reason


def test_when_all_are_over_the_budget_the_fastest_serves_and_the_reason_says_so():
    choice = choose([contender("deepfm", 0.7, p99=80), contender("logistic_regression", 0.9, p99=60)])
    assert choice.champion == "logistic_regression"
    assert choice.reason.startswith("No model meets the latency budget of 50 ms")


def test_no_model_beats_the_base_rate_is_said():
    choice = choose([contender("deepfm", 0.99), contender("popularity", 1.0)])
    assert choice.champion == "popularity"
    assert not choice.any_beats_baseline
    assert "No model beats the base rate outside the interval: popularity differs by +0.0000" in choice.reason


def test_an_equal_that_does_not_beat_the_baseline_is_not_taken_for_a_leader_that_does():
    # popularity is tied with deepfm and with the base rate, deepfm is surely better than the base rate.
    choice = choose([contender("deepfm", 0.975), contender("popularity", 0.985)])
    assert choice.champion == "deepfm"
    assert "not worse than deepfm outside the interval, but does not beat the base rate" in choice.reason


def test_popularity_as_the_baseline_stays_when_nothing_beats_it():
    choice = choose(
        [contender("deepfm", 0.205), contender("popularity", 0.2)], baseline=("popularity", 0.2), lower=False
    )
    assert choice.champion == "popularity"
    assert "No model beats popularity outside the interval." in choice.reason


def test_undefined_metric_chooses_the_simplest_and_says_why():
    choice = choose([contender("deepfm", None), contender("logistic_regression", None)])
    assert choice.champion == "logistic_regression"
    assert "undefined on the test rows (one class only)" in choice.reason


def test_single_model_is_champion():
    choice = choose([contender("deepfm", 0.9)])
    assert choice.champion == "deepfm"
    assert "only model to choose from" in choice.reason


def test_unknown_model_counts_as_more_complex():
    assert choose([contender("house_special", 0.8), contender("deepfm", 0.8)]).champion == "deepfm"
