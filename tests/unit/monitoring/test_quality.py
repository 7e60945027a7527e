"""Quality on matured outcomes: the metrics themselves, honest intervals, and no number where rows are too few."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.evaluation import Estimate, Evaluation, EvaluationResult, ModelEvaluation
from evergreen.contracts.impressions import impression_schema
from evergreen.contracts.mapping import LogKind
from evergreen.contracts.outcomes import Outcomes
from evergreen.contracts.quality import QualityReport, Reference
from evergreen.metrics.binary import auc, expected_calibration_error, normalized_entropy
from evergreen.models.calibration import Calibration, IsotonicCalibration, PlattCalibration
from evergreen.monitoring.outcomes import join_outcomes
from evergreen.monitoring.quality import (
    QualityConfig,
    measure_quality,
    reference_in_service,
    reference_of_evaluation,
    relative_change,
)
from evergreen.monitoring.quality_rows import DRAWN, shown_probabilities

START = datetime(2026, 3, 9, tzinfo=UTC)
DAY = timedelta(days=1)
WINDOW = timedelta(hours=1)
Floats = NDArray[np.float64]


def sigmoid(logits: Floats) -> Floats:
    return 1 / (1 + np.exp(-logits))


def draw(
    num_rows: int,
    *,
    seed: int,
    start: datetime = START,
    length: timedelta = DAY,
    version: str = "m1",
    mean: float = -2.0,
    spread: float = 1.0,
    truth: float = 1.0,
    shift: float = 0.0,
    num_users: int = 200,
) -> dict[str, Any]:
    """Columns of impressions whose score is right when truth is 1 and shift is 0, and whether each is clicked."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(mean, spread, num_rows)
    seconds = np.sort(rng.uniform(0, length.total_seconds(), num_rows))
    return {
        "request_id": [f"{version}-{start:%d%H}-{seed}-{n}" for n in range(num_rows)],
        "event_timestamp": [start + timedelta(seconds=float(s)) for s in seconds],
        "user_id": [f"u{n}" for n in rng.integers(0, num_users, num_rows)],
        "model_version": [version] * num_rows,
        "score": sigmoid(logits),
        "position": np.ones(num_rows, np.int32),
        "sampling_rate": np.ones(num_rows),
        "degraded": [False] * num_rows,
        "clicked": rng.uniform(size=num_rows) < sigmoid(truth * logits + (1 - truth) * mean + shift),
    }


def outcomes_of(root: Path, *parts: Mapping[str, Any], as_of: datetime) -> Outcomes:
    """Log impressions and their clicks, and join them."""
    schema = impression_schema(())
    folder = root / "impressions" / "date=2026-03-09"
    folder.mkdir(parents=True)
    (root / "clicks").mkdir()
    for number, part in enumerate(parts):
        n = len(part["clicked"])
        columns = dict(part) | {
            "served_at": part["event_timestamp"],
            "known_user": [True] * n,
            "item_id": ["i"] * n,
            "category": ["c"] * n,
        }
        table = pa.table([pa.array(columns[field.name], field.type) for field in schema], schema)
        pq.write_table(table, folder / f"{number}.parquet")
        clicks = table.select(["request_id", "item_id", "event_timestamp"]).rename_columns(
            ["request_id", "item_id", "click_timestamp"]
        )
        pq.write_table(clicks.filter(pa.array(part["clicked"])), root / "clicks" / f"{number}.parquet")
    join_outcomes(str(root / "impressions"), str(root / "clicks"), root / "outcomes", window=WINDOW, as_of=as_of)
    return Outcomes.load(root / "outcomes")


def measure(outcomes: Outcomes, *, days: float = 1, **options: Any) -> QualityReport:
    options = {"as_of": START + 10 * DAY, "start": START, "end": START + days * DAY} | options
    return measure_quality(outcomes, **options)


def test_figures_are_the_metrics_of_the_rows(tmp_path: Path) -> None:
    rows = draw(5000, seed=0)
    report = measure(outcomes_of(tmp_path, rows, as_of=START + 2 * DAY))
    figures = report.models[0].figures
    labels, scores = rows["clicked"].astype(float), rows["score"]
    assert (figures.rows, figures.clicks, figures.users) == (5000, labels.sum(), 200)
    for estimate, value in (
        (figures.click_rate, labels.mean()),
        (figures.normalized_entropy, normalized_entropy(labels, scores)),
        (figures.calibration_ratio, scores.sum() / labels.sum()),
        (figures.calibration_error, expected_calibration_error(labels, scores)),
        (figures.auc, auc(labels, scores)),
    ):
        assert estimate.value == pytest.approx(value)
        assert estimate.low is not None and estimate.high is not None and estimate.low < estimate.high
    assert report.matured_rows == 5000 and report.immature_rows == 0 and report.estimated is None


def test_days_and_models_are_measured_apart(tmp_path: Path) -> None:
    parts = [
        draw(1000, seed=1, version="m1"),
        draw(1000, seed=2, version="m1", start=START + DAY),
        draw(600, seed=3, version="m2", start=START + DAY),
    ]
    report = measure(outcomes_of(tmp_path, *parts, as_of=START + 3 * DAY), days=2)
    m1, m2 = report.model("m1"), report.model("m2")
    assert m1 is not None and m2 is not None and report.model("m3") is None
    assert [(d.date, d.figures.rows) for d in m1.days] == [(date(2026, 3, 9), 1000), (date(2026, 3, 10), 1000)]
    assert [(d.date, d.figures.rows) for d in m2.days] == [(date(2026, 3, 10), 600)]
    assert m1.days[1].figures.click_rate.value == pytest.approx(parts[1]["clicked"].mean())


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (draw(150, seed=0), "150 rows, at least 200 are needed"),
        (draw(300, seed=0, shift=-30.0), "0 clicks, at least 10 are needed"),
        (draw(300, seed=0, num_users=5), "5 users, at least 20 are needed"),
    ],
    ids=["rows", "clicks", "users"],
)
def test_small_sample_is_unknown_and_says_why(tmp_path: Path, rows: dict[str, Any], reason: str) -> None:
    references = {"m1": reference(0.8, 1.0)}
    report = measure(outcomes_of(tmp_path, rows, as_of=START + 2 * DAY), references=references)
    (model,) = report.models
    for estimate in (model.figures.normalized_entropy, model.figures.click_rate, model.figures.auc):
        assert estimate == Estimate(value=None, reason=reason)
    assert model.entropy_change.value is None and reason in str(model.entropy_change.reason)


def reference(entropy: float, ratio: float, half: float = 0.01) -> Reference:
    def estimate(value: float) -> Estimate:
        return Estimate(value=value, low=value - half, high=value + half)

    return Reference(
        source="made up", normalized_entropy=estimate(entropy), calibration_ratio=estimate(ratio), auc=estimate(0.7)
    )


def test_rows_of_one_user_are_not_taken_for_independent(tmp_path: Path) -> None:
    rows = draw(4000, seed=0)
    rng = np.random.default_rng(5)
    users = rng.integers(0, 100, 4000)
    # Who clicks, clicks on all: 100 users tell as much as 100 rows do.
    clicked = (rng.uniform(size=100) < 0.2)[users]
    clustered = rows | {"user_id": [f"u{u}" for u in users], "clicked": clicked}
    alone = rows | {"user_id": [f"u{n}" for n in range(4000)], "clicked": rng.permutation(clicked)}
    widths = []
    for name, part in (("clustered", clustered), ("alone", alone)):
        (tmp_path / name).mkdir()
        estimate = measure(outcomes_of(tmp_path / name, part, as_of=START + 2 * DAY)).models[0].figures.click_rate
        assert estimate.low is not None and estimate.high is not None
        widths.append(estimate.high - estimate.low)
    assert widths[0] > 4 * widths[1]


def test_requests_without_a_user_stand_for_themselves(tmp_path: Path) -> None:
    rows = draw(500, seed=0) | {"user_id": [None] * 500}
    assert measure(outcomes_of(tmp_path, rows, as_of=START + 2 * DAY)).models[0].figures.users == 500


def test_row_stands_for_as_many_as_its_sampling_rate_says(tmp_path: Path) -> None:
    full, tenth = draw(1000, seed=1, mean=-1.0), draw(1000, seed=2, mean=-3.0)
    tenth |= {"sampling_rate": np.full(1000, 0.1)}
    report = measure(outcomes_of(tmp_path, full, tenth, as_of=START + 2 * DAY))
    expected = (full["clicked"].sum() + 10 * tenth["clicked"].sum()) / 11_000
    assert report.models[0].figures.click_rate.value == pytest.approx(expected)


def test_degraded_rows_are_measured_and_counted(tmp_path: Path) -> None:
    rows = draw(500, seed=0)
    rows |= {"degraded": [n < 50 for n in range(500)]}
    report = measure(outcomes_of(tmp_path, rows, as_of=START + 2 * DAY))
    assert report.degraded_rows == 50 and report.models[0].figures.rows == 500


@dataclass(frozen=True)
class Effects:
    """Of two positions."""

    values: tuple[float, ...] = (0.0, 1.0, -1.0)

    def at(self, positions: NDArray[np.integer]) -> Floats:
        return np.array(self.values)[positions]


@dataclass(frozen=True)
class Model:
    calibration: Calibration | None
    position: Effects | None


PLATT = PlattCalibration(slope=0.7, intercept=-0.4)
ISOTONIC = IsotonicCalibration(scores=(-3.0, -1.0, 0.5), logits=(-4.0, -3.99, 1.0), end_slope=0.6)


@pytest.mark.parametrize("calibration", [PLATT, ISOTONIC], ids=["platt", "isotonic"])
def test_probabilities_move_to_the_position_as_the_model_would_have_said(calibration: Calibration) -> None:
    scores = np.linspace(-6, 4, 101)
    for position in (0, 1, 2):
        positions = np.full(101, position)
        moved = shown_probabilities(calibration.apply(scores), positions, Model(calibration, Effects()))
        assert moved == pytest.approx(calibration.apply(scores + Effects().at(positions)), rel=1e-9)
    probabilities = calibration.apply(scores)
    assert (shown_probabilities(probabilities, positions, Model(calibration, None)) == probabilities).all()
    assert (shown_probabilities(probabilities, positions, None) == probabilities).all()


def test_position_effects_make_a_biased_log_calibrated(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows, model = draw(20_000, seed=0), Model(PLATT, Effects())
    positions = np.ones(20_000, np.int32)  # everything was shown at the top
    at_top = shown_probabilities(rows["score"], positions, model)
    rows |= {"clicked": rng.uniform(size=20_000) < at_top, "position": positions}
    outcomes = outcomes_of(tmp_path, rows, as_of=START + 2 * DAY)
    plain, moved = (
        measure(outcomes, models=models).models[0].figures.calibration_ratio for models in ({}, {"m1": model})
    )
    assert plain.high is not None and plain.high < 0.8, "for the average position it promises too little"
    assert moved.low is not None and moved.high is not None and moved.low < 1 < moved.high


def test_change_of_taste_is_a_loss_and_no_change_is_none(tmp_path: Path) -> None:
    parts = [
        draw(20_000, seed=1, spread=1.5),
        draw(20_000, seed=2, spread=1.5, start=START + DAY),
        draw(20_000, seed=3, spread=1.5, start=START + 2 * DAY, truth=0.3),
    ]
    outcomes = outcomes_of(tmp_path, *parts, as_of=START + 4 * DAY)
    first = reference_in_service(outcomes, "m1", as_of=START + 4 * DAY, start=START, end=START + DAY)
    assert first is not None and first.source.startswith("first days in service")
    changes = []
    for day in (1, 2):
        start = START + day * DAY
        model = measure(outcomes, start=start, end=start + DAY, references={"m1": first}).models[0]
        changes.append((model.entropy_change, model.calibration_change))
    (same, same_ratio), (shifted, shifted_ratio) = changes
    assert same.low is not None and same.high is not None and same.low < 0 < same.high
    assert same_ratio.low is not None and same_ratio.high is not None and same_ratio.low < 0 < same_ratio.high
    assert shifted.value is not None and shifted.value > 0.05 and shifted.low is not None and shifted.low > 0.02
    assert shifted_ratio.low is not None and shifted_ratio.low > 0.1


def test_too_short_a_first_time_is_no_reference(tmp_path: Path) -> None:
    outcomes = outcomes_of(tmp_path, draw(100, seed=0), as_of=START + 2 * DAY)
    assert reference_in_service(outcomes, "m1", as_of=START + 2 * DAY, start=START, end=START + DAY) is None
    assert reference_in_service(outcomes, "m9", as_of=START + 2 * DAY, start=START, end=START + DAY) is None


def test_interval_of_a_change_covers_no_change_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(11)
    covered = 0
    for _ in range(400):
        new, old = (Estimate(value=v, low=v - 0.0392, high=v + 0.0392) for v in rng.normal(0.9, 0.02, 2))
        change = relative_change(new, old)
        assert change.low is not None and change.high is not None
        covered += change.low <= 0 <= change.high
    assert 368 <= covered <= 392  # 95 % of 400, and two standard deviations


def test_change_against_the_unknown_is_unknown() -> None:
    known, unknown = Estimate(value=0.9, low=0.8, high=1.0), Estimate(value=None, reason="3 rows")
    assert relative_change(unknown, known).reason == "this window: 3 rows"
    assert relative_change(known, unknown).reason == "the reference: 3 rows"
    assert relative_change(known, Estimate(value=0.0)).value is None
    exact = relative_change(known, Estimate(value=0.9))
    assert exact.value == pytest.approx(0) and exact.low == pytest.approx(0.8 / 0.9 - 1)


def test_estimate_is_what_the_labels_say_later(tmp_path: Path) -> None:
    young = draw(20_000, seed=2, start=START + DAY, mean=-2.0, spread=0.4)
    outcomes = outcomes_of(tmp_path, draw(20_000, seed=1), young, as_of=START + DAY + timedelta(hours=1))
    at_once = measure(outcomes, days=2)
    assert at_once.estimated is not None and at_once.immature_rows > 500
    join_outcomes(
        str(tmp_path / "impressions"),
        str(tmp_path / "clicks"),
        tmp_path / "outcomes",
        window=WINDOW,
        as_of=START + 3 * DAY,
    )
    later = measure(Outcomes.load(tmp_path / "outcomes"), start=START + DAY, days=2).models[0].figures
    estimated, actual = at_once.estimated.normalized_entropy, later.normalized_entropy
    assert estimated.value == pytest.approx(actual.value, abs=0.01)
    assert at_once.estimated.click_rate.value == pytest.approx(later.click_rate.value, abs=0.015)
    change = at_once.estimated.entropy_change
    assert change.low is not None and change.low > 0.05, "it sees that there is less to tell apart"


def test_estimate_is_corrected_by_what_scores_turned_out_to_mean(tmp_path: Path) -> None:
    """A model that promises too much is expected to go on promising too much."""
    parts = [draw(20_000, seed=1, shift=-1.0), draw(20_000, seed=2, shift=-1.0, start=START + DAY)]
    report = measure(outcomes_of(tmp_path, *parts, as_of=START + DAY + timedelta(hours=1)), days=2)
    assert report.estimated is not None
    rate = report.estimated.click_rate
    assert rate.low is not None and rate.high is not None
    assert rate.low < parts[1]["clicked"].mean() < rate.high < parts[1]["score"].mean()


def test_estimate_cannot_see_another_taste_at_the_same_score(tmp_path: Path) -> None:
    parts = [draw(20_000, seed=1), draw(20_000, seed=2, start=START + DAY, truth=-1.0)]
    report = measure(outcomes_of(tmp_path, *parts, as_of=START + DAY + timedelta(hours=1)), days=2)
    assert report.estimated is not None
    change = report.estimated.entropy_change
    assert change.low is not None and change.high is not None and change.low < 0.01 and change.high > -0.01


def test_estimate_without_matured_rows_of_the_model_is_unknown(tmp_path: Path) -> None:
    parts = [draw(1000, seed=1), draw(1000, seed=2, version="m2", start=START + DAY)]
    report = measure(outcomes_of(tmp_path, *parts, as_of=START + DAY + timedelta(minutes=59)), days=2)
    assert report.estimated is not None and report.estimated.model_version == "m2"
    assert report.estimated.normalized_entropy.reason == "nothing of this model is mature"


def test_models_are_compared_in_the_hours_in_which_both_served(tmp_path: Path) -> None:
    """The new one serves beside the old one in a bad hour; over all hours it would look worse."""
    hour = timedelta(hours=1)
    parts = [
        draw(8000, seed=1, version="old", length=hour, mean=-1.0),
        draw(8000, seed=2, version="old", start=START + 5 * hour, length=hour, mean=-3.0),
        draw(8000, seed=3, version="new", start=START + 5 * hour, length=hour, mean=-2.5),
    ]
    report = measure(outcomes_of(tmp_path, *parts, as_of=START + 2 * DAY))
    found = report.comparison("new", "old")
    assert found is not None and found.side_by_side and (found.rows, found.against_rows) == (8000, 8000)
    change = parts[2]["clicked"].mean() / parts[1]["clicked"].mean() - 1
    assert found.click_rate_change.value == pytest.approx(change) and change > 0.2
    assert found.click_rate_change.low is not None and found.click_rate_change.low > 0
    turned = report.comparison("old", "new")
    assert turned is not None and turned.click_rate_change.value == pytest.approx(1 / (1 + change) - 1)
    assert turned.click_rate_change.high is not None and turned.click_rate_change.high < 0
    assert report.comparison("new", "other") is None


def test_models_that_never_served_together_are_compared_apart(tmp_path: Path) -> None:
    parts = [draw(2000, seed=1, version="old"), draw(2000, seed=2, version="new", start=START + DAY)]
    found = measure(outcomes_of(tmp_path, *parts, as_of=START + 3 * DAY), days=2).comparison("new", "old")
    assert found is not None and not found.side_by_side
    assert found.click_rate_change.value == pytest.approx(parts[1]["clicked"].mean() / parts[0]["clicked"].mean() - 1)


def test_model_that_nobody_clicks_is_found_worse(tmp_path: Path) -> None:
    parts = [draw(2000, seed=1, version="old"), draw(2000, seed=2, version="new", shift=-20.0)]
    found = measure(outcomes_of(tmp_path, *parts, as_of=START + 2 * DAY)).comparison("new", "old")
    assert found is not None and found.click_rate_change.value == -1 and found.click_rate_change.high == -1


def test_beyond_max_rows_whole_users_are_drawn(tmp_path: Path) -> None:
    rows = draw(12_000, seed=0, num_users=600)
    outcomes = outcomes_of(tmp_path, rows, as_of=START + 2 * DAY)
    report = measure(outcomes, config=QualityConfig(max_rows=3000))
    figures = report.models[0].figures
    assert figures.rows + report.left_out[DRAWN] == report.matured_rows == 12_000
    assert 2000 < figures.rows < 4000 and figures.rows / figures.users == pytest.approx(20, rel=0.1)
    assert report == measure(outcomes, config=QualityConfig(max_rows=3000))


def test_new_rows_are_those_that_matured_since_training(tmp_path: Path) -> None:
    parts = [draw(500, seed=1), draw(700, seed=2, start=START + DAY)]
    outcomes = outcomes_of(tmp_path, *parts, as_of=START + 3 * DAY)
    assert measure(outcomes).new_matured_rows is None
    assert measure(outcomes, trained_as_of=START + DAY).new_matured_rows == 700
    assert measure(outcomes, trained_as_of=START + DAY, as_of=START + DAY).new_matured_rows == 0


def test_what_was_known_then_gives_what_was_measured_then(tmp_path: Path) -> None:
    parts = [draw(2000, seed=1), draw(2000, seed=2, start=START + DAY)]
    then = START + DAY + timedelta(hours=5)
    outcomes = outcomes_of(tmp_path, *parts, as_of=then)
    before = measure(outcomes, as_of=then, days=2)
    late = pa.table({"request_id": parts[0]["request_id"], "item_id": ["i"] * 2000})
    times = pa.array(parts[0]["event_timestamp"], pa.timestamp("us", tz="UTC"))
    pq.write_table(late.append_column("click_timestamp", times), tmp_path / "clicks" / "late.parquet")
    join_outcomes(
        str(tmp_path / "impressions"),
        str(tmp_path / "clicks"),
        tmp_path / "outcomes",
        window=WINDOW,
        as_of=START + 4 * DAY,
    )
    outcomes = Outcomes.load(tmp_path / "outcomes")
    assert measure(outcomes, as_of=then, days=2) == before
    assert measure(outcomes, as_of=START + 4 * DAY, days=2).models[0].figures.clicks > before.models[0].figures.clicks


def test_ratings_are_refused_by_name(tmp_path: Path) -> None:
    rows = draw(300, seed=0)
    rows["score"][7] = 3.5
    with pytest.raises(ArtifactError, match=r"score 3\.5 of request m1-.* is no probability"):
        measure(outcomes_of(tmp_path, rows, as_of=START + 2 * DAY))


def test_range_without_impressions_is_an_empty_report(tmp_path: Path) -> None:
    report = measure(outcomes_of(tmp_path, draw(300, seed=0), as_of=START + 2 * DAY), start=START + 5 * DAY, days=6)
    assert report.models == () and report.matured_rows == 0 and report.estimated is None


def test_report_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    parts = [draw(2000, seed=1), draw(2000, seed=2, start=START + DAY, version="m2")]
    outcomes = outcomes_of(tmp_path, *parts, as_of=START + DAY + timedelta(hours=2))
    report = measure(outcomes, days=2, references={"m1": reference(0.8, 1.0)})
    report.write(tmp_path / "quality.json")
    assert QualityReport.read(tmp_path / "quality.json") == report


def test_reference_of_an_evaluation_is_that_of_the_version() -> None:
    estimates = {n: Estimate(value=v, low=v, high=v) for n, v in (("normalized_entropy", 0.9), ("auc", 0.7))}
    metrics = estimates | {"click_rate_ratio": Estimate(value=1.1, low=1.0, high=1.2)}
    result = EvaluationResult.model_construct(
        test_start=START,
        test_end=START + DAY,
        kind=LogKind.IMPRESSIONS,
        models=(ModelEvaluation(name="dlrm", version="dlrm-1", metrics=metrics),),
    )
    found = reference_of_evaluation(Evaluation(Path("evaluation"), result), "dlrm-1")
    assert (found.normalized_entropy.value, found.calibration_ratio.value, found.auc.value) == (0.9, 1.1, 0.7)
    with pytest.raises(ArtifactError, match="no normalized entropy of dlrm-2"):
        reference_of_evaluation(Evaluation(Path("evaluation"), result), "dlrm-2")
