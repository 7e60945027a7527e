from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from evergreen.contracts.evaluation import Verdict
from evergreen.evaluation.gate import GateConfig, gate_challenger

GENEROUS = GateConfig(latency_budget_ms=1000)  # other tests run beside


def truth(table: pa.Table) -> np.ndarray:
    return np.asarray(table["x"].to_numpy())


def blurred(table: pa.Table) -> np.ndarray:
    """Half of what there is to know: calibrated, and worse."""
    return 0.5 * truth(table) + 0.5 * 0.118


def noisy(table: pa.Table) -> np.ndarray:
    """As good as `truth`, but for a hair."""
    return truth(table) * (1 + 0.001 * np.sin(np.arange(table.num_rows)))


def gate(world: Any, challenger: Callable[..., Any], incumbent: Callable[..., Any] | None, **changes: Any) -> Any:
    config = GENEROUS.model_copy(update=changes)
    old = world.scorer("deepfm", incumbent) if incumbent else None
    return gate_challenger(world.training_set, world.scorer("deepfm", challenger), old, config=config)


def test_better_challenger_of_the_same_kind_of_model_passes(clicks: Any) -> None:
    report = gate(clicks, truth, blurred)
    assert report.passed and report.verdict is Verdict.BETTER
    assert report.difference.high < 0 and report.challenger_value.value < report.incumbent_value.value
    assert (report.rows, report.metric) == (4_000, "normalized_entropy")


def test_worse_challenger_does_not_pass(clicks: Any) -> None:
    report = gate(clicks, blurred, truth)
    assert not report.passed and report.verdict is Verdict.WORSE and report.reason.endswith("worse")


def test_challenger_that_is_as_good_passes_only_where_that_is_enough(clicks: Any) -> None:
    report = gate(clicks, noisy, truth)
    assert not report.passed and report.verdict is Verdict.TIED
    assert gate(clicks, noisy, truth, must_beat=False).passed


def test_first_model_has_nothing_to_beat(clicks: Any) -> None:
    report = gate(clicks, truth, None)
    assert report.passed and report.incumbent is report.difference is None


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_challenger_that_is_not_calibrated_does_not_pass(clicks: Any, factor: float) -> None:
    report = gate(clicks, lambda table: np.minimum(truth(table) * factor, 0.99), blurred)
    assert not report.passed and "times the clicks that came" in report.reason


def test_slow_challenger_does_not_pass(clicks: Any) -> None:
    report = gate(clicks, truth, blurred, latency_budget_ms=1e-6)
    assert not report.passed and "over the budget" in report.reason


def test_few_clicks_decide_nothing(clicks: Any) -> None:
    report = gate(clicks, truth, blurred, min_positives=100_000)
    assert not report.passed and "100000 needed" in report.reason


def test_ratings_are_compared_by_their_error(ratings: Any) -> None:
    report = gate(ratings, truth, lambda table: np.full(table.num_rows, 3.2))
    assert report.passed and report.metric == "rmse" and report.click_rate_ratio is None


def test_models_of_other_snapshots_are_compared(clicks: Any) -> None:
    old = replace(clicks.scorer("deepfm", blurred), snapshot_id="of last week")
    assert gate_challenger(clicks.training_set, clicks.scorer("deepfm", truth), old, config=GENEROUS).passed


@pytest.mark.parametrize("stale", ["model", "rows"])
def test_challenger_that_is_older_than_what_serves_does_not_pass(clicks: Any, stale: str) -> None:
    challenger, old = clicks.scorer("deepfm", truth), clicks.scorer("deepfm", blurred)
    if stale == "model":
        challenger = replace(challenger, as_of=old.as_of - timedelta(days=7))
    else:
        old = replace(old, as_of=old.as_of + timedelta(days=7))
    report = gate_challenger(clicks.training_set, challenger, old, config=GENEROUS)
    assert not report.passed and report.reason.startswith("it knows the world until 20")
