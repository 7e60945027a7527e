"""Small logs that are lived through, and the figures of a world whose scores are written by hand."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from evergreen.cli import cli
from evergreen.contracts.decision import RetrainDecision, Verdict, Window
from evergreen.contracts.errors import InputError, TrainingError
from evergreen.contracts.evaluation import Estimate
from evergreen.contracts.evaluation import Verdict as Comparison
from evergreen.contracts.impressions import read_impressions
from evergreen.contracts.loop_state import LoopState
from evergreen.contracts.mapping import Mapping
from evergreen.contracts.outcomes import Outcomes
from evergreen.contracts.training_set import SPLITS
from evergreen.features.point_in_time import join_features
from evergreen.features.tables import build_feature_tables
from evergreen.ingest.log import ingest_log
from evergreen.laboratory.backtest import backtest
from evergreen.laboratory.backtest_results import BacktestConfig, BacktestResults
from evergreen.laboratory.models import Models
from evergreen.laboratory.policies import Choice, policy_of
from evergreen.laboratory.replay import Replay
from evergreen.laboratory.replayed_log import ReplayedLog, prepare_log
from evergreen.laboratory.staleness import compare, find_missed, judge_retrainings, lost_to_staleness
from evergreen.metrics.binary import normalized_entropy
from evergreen.models.package import ModelPackage
from evergreen.monitoring.decision import replay as decide_again
from evergreen.simulator.config import SimulatorConfig
from evergreen.simulator.log import simulate_log

DAY = timedelta(days=1)
WORLD = SimulatorConfig(num_users=120, num_items=60, num_days=9, events_per_day=1_200, seed=2, click_rate=0.1)
CONFIG = BacktestConfig(warm_up=4 * DAY, window=4 * DAY, num_replicates=50)
START = datetime(2025, 1, 5, tzinfo=UTC)
"""The first moment of decision: four days of the log are the first model's."""


@dataclass(frozen=True)
class Lived:
    """A log that was lived through twice."""

    data: Path
    out: Path
    results: BacktestResults
    again: BacktestResults
    told: list[str]
    told_again: list[str]

    def state(self, policy: str) -> LoopState:
        return LoopState(self.out / "policies" / policy / "state")


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Lived:
    root = tmp_path_factory.mktemp("backtest")
    simulate_log(WORLD, root / "data")
    policies = [policy_of(name) for name in ("never", "daily", "every-2-days", "ours")]
    told: tuple[list[str], list[str]] = ([], [])
    results = [
        backtest(
            Mapping.load("simulated"),
            str(root / "data"),
            root / "out",
            policies,
            config=CONFIG,
            on_progress=lines.append,
        )
        for lines in told
    ]
    return Lived(root / "data", root / "out", *results, *told)


def test_steps_are_the_whole_days_after_the_first_model(lived: Lived) -> None:
    steps = lived.results.steps
    assert [step.start for step in steps] == [START + n * DAY for n in range(5)]
    events = pa.concat_tables(pq.read_table(file) for file in sorted((lived.data / "events").iterdir()))
    end = START + 5 * DAY - timedelta(minutes=10)  # labels of the last minutes are not final
    scored = events.filter((pc.field("event_timestamp") >= START) & (pc.field("event_timestamp") < end))
    assert sum(step.rows for step in steps) == scored.num_rows
    assert sum(step.positives for step in steps) == pc.sum(scored["clicked"]).as_py()


def test_policies_serve_the_models_that_they_trained(lived: Lived) -> None:
    trained = {
        policy.policy: [(step.trained_as_of - START) // DAY for step in policy.steps]
        for policy in lived.results.policies
    }
    assert trained["never"] == [0] * 5
    assert trained["daily"] == [0, 1, 2, 3, 4]
    assert trained["every-2-days"] == [0, 0, 2, 2, 4]
    assert [(r.as_of - START) // DAY for r in lived.results.policy("every-2-days").retrainings] == [2, 4]


def test_a_model_that_is_trained_before_every_step_loses_nothing(lived: Lived) -> None:
    daily = lived.results.policy("daily")
    assert (daily.lost.value, daily.lost.low, daily.lost.high) == (0.0, 0.0, 0.0) and not daily.missed
    assert [step.value for step in daily.steps] == [step.fresh for step in lived.results.steps]
    assert (
        daily.training_cpu_seconds == pytest.approx(lived.results.fresh_cpu_seconds) and daily.training_cpu_seconds > 0
    )
    assert lived.results.policy("never").training_cpu_seconds == 0


def test_a_model_has_seen_nothing_of_the_step_that_it_is_scored_on(lived: Lived) -> None:
    versions = {step.model_version for step in lived.results.policy("daily").steps}
    packages = [ModelPackage.load(path) for path in (lived.out / "models").glob("*/package")]
    assert {package.version for package in packages} == versions
    for policy in lived.results.policies:
        for step, own in zip(lived.results.steps, policy.steps, strict=True):
            assert own.trained_as_of <= step.start


def test_values_are_those_of_the_rows_as_they_were_shown(lived: Lived, tmp_path: Path) -> None:
    """Ingested, joined and scored once more, by hand."""
    snapshot = ingest_log(Mapping.load("simulated"), str(lived.data), tmp_path / "snapshot")
    tables = build_feature_tables(snapshot, tmp_path / "tables")
    events = pa.concat_tables(pq.read_table(file, partitioning=None) for file in snapshot.files)
    day = events.filter((pc.field("event_timestamp") >= START + DAY) & (pc.field("event_timestamp") < START + 2 * DAY))
    rows = join_features(day.drop_columns(["user_segment", "user_country", "price", "publisher"]), tables)
    never = lived.results.policy("never").steps[1]
    package = LoopState(lived.out / "policies" / "never" / "state").package(never.model_version)
    model = ModelPackage.load(package)
    shown = model.predict_encoded(model.encoder.transform(rows), rows["position"].to_numpy())
    labels = day["clicked"].to_numpy(zero_copy_only=False).astype(float)
    assert never.value == pytest.approx(normalized_entropy(labels, shown), rel=1e-9)


def test_reports_are_of_what_the_policys_model_would_have_served(lived: Lived) -> None:
    state = lived.state("ours")
    moments = [START + n * DAY for n in range(1, 5)]
    reports = state.reports(START + 9 * DAY)
    assert [report.as_of for report in reports] == moments
    assert [report.rows for report in reports] == [
        sum(t.num_rows for t in read_impressions(str(lived.out / "policies/ours/impressions"), start=m - DAY, end=m))
        for m in moments
    ]
    assert [report.model_version for report in reports] == [
        step.model_version for step in lived.results.policy("ours").steps[:4]
    ]
    assert all(report.quality is not None and report.quality.matured_rows > 1_000 for report in reports)


def test_outcomes_are_the_labels_of_the_log(lived: Lived) -> None:
    rows = pa.concat_tables(Outcomes.load(lived.state("ours").outcomes).rows(mature=True))
    events = pa.concat_tables(pq.read_table(file) for file in sorted((lived.data / "events").iterdir()))
    key = ("request_id", "item_id")
    clicked = {tuple(row.values()) for row in events.filter(events["clicked"]).select(key).to_pylist()}
    found = rows.select([*key, "clicked"]).to_pylist()
    assert len(found) > 4_000
    assert all(((row["request_id"], row["item_id"]) in clicked) == row["clicked"] for row in found)


def test_decisions_can_be_made_again(lived: Lived) -> None:
    state = lived.state("ours")
    for step, own in zip(lived.results.steps[1:], lived.results.policy("ours").steps[1:], strict=True):
        decision = RetrainDecision.read(state.decision(step.start))
        assert decide_again(state.decision(step.start)) == decision
        assert (own.verdict, own.reason) == (decision.verdict, decision.reason)


def test_a_second_run_trains_nothing_and_says_the_same(lived: Lived) -> None:
    assert any("trained as of" in line for line in lived.told)
    assert not any("trained as of" in line for line in lived.told_again)

    def without_clocks(results: BacktestResults) -> Any:
        found = results.model_dump(mode="json", exclude={"wall_seconds": True})
        for policy in found["policies"]:
            del policy["wall_seconds"]
        return found

    assert without_clocks(lived.again) == without_clocks(lived.results)
    assert BacktestResults.read(lived.out / "results.json") == lived.again


@pytest.fixture(scope="module")
def log(lived: Lived) -> ReplayedLog:
    return prepare_log(Mapping.load("simulated"), str(lived.data), lived.out / "log")


def test_training_set_knows_its_window_and_nothing_of_broken_times(log: ReplayedLog, tmp_path: Path) -> None:
    broken = (START - 3 * DAY, START - 2.5 * DAY)
    made = log.training_set(
        tmp_path / "set", start=START - 4 * DAY, as_of=START, validation=DAY, test=DAY, leave_out=[broken]
    )
    rows = pa.concat_tables(made.read(split, ["event_timestamp"]) for split in SPLITS)
    moments = rows["event_timestamp"].to_pylist()
    assert min(moments) >= START - 4 * DAY and max(moments) < START - timedelta(minutes=10)
    assert not any(broken[0] <= moment < broken[1] for moment in moments)
    splits = made.manifest.splits
    assert (splits["test"].start, splits["validation"].start) == (START - DAY, START - 2 * DAY)
    whole = log.read(START - 4 * DAY, START)
    assert rows.num_rows + sum(made.manifest.left_out.values()) == whole.num_rows


def models_of(lived: Lived, log: ReplayedLog, scratch: Path, told: list[str]) -> Models:
    first = datetime(2025, 1, 1, tzinfo=UTC)
    return Models(log, CONFIG, lived.out / "models", first=first, scratch=scratch, on_progress=told.append)


def test_models_without_broken_times_are_others(lived: Lived, log: ReplayedLog, tmp_path: Path) -> None:
    models, as_of = models_of(lived, log, tmp_path, []), START + 2 * DAY
    same = models.at(as_of, [Window(start=START - 5 * DAY, end=START - 4 * DAY)])  # before the window
    other = models.at(as_of, [Window(start=START - DAY, end=START)])
    assert same is models.at(as_of) and other.version != same.version
    assert other.package.info.train_rows < same.package.info.train_rows


@dataclass
class Scripted:
    """A policy that says what it is told to."""

    verdicts: dict[int, Choice]
    name: str = "scripted"
    reads_reports: bool = False
    seen: list[int] = field(default_factory=list)

    def decide(self, report: Any, history: Any, *, as_of: datetime) -> Choice:
        self.seen.append(len(history))
        return self.verdicts.get((as_of - START) // DAY, Choice(Verdict.KEEP, "so be it"))


def test_rollback_and_failed_training_are_lived_through(lived: Lived, log: ReplayedLog, tmp_path: Path) -> None:
    told: list[str] = []
    decision = RetrainDecision.read(lived.state("ours").decision(START + DAY))
    nothing_left = decision.model_copy(
        update={"broken_windows": (Window(start=START - 9 * DAY, end=START + 9 * DAY),), "history": ()}
    )
    policy = Scripted(
        {
            1: Choice(Verdict.RETRAIN, "better"),
            2: Choice(Verdict.ROLLBACK, "it was not"),
            3: Choice(Verdict.RETRAIN, "on nothing", nothing_left),
        }
    )
    replay = Replay(
        log, models_of(lived, log, tmp_path / "sets", told), policy, tmp_path / "p", on_progress=told.append
    )
    steps = replay.run([START + n * DAY for n in range(6)])
    assert [(step.model.record.as_of - START) // DAY for step in steps] == [0, 1, 0, 0, 0]
    assert [step.retrained for step in steps] == [False, True, False, False, False]
    assert [step.failed for step in steps] == [False, False, False, True, False]
    assert steps[3].choice is not None and "The training failed" in steps[3].choice.reason
    assert any("rollback" in line for line in told)
    # The first release; then run and release; the rollback; and a run that came to nothing.
    assert policy.seen == [1, 3, 4, 6]


class Matrix:
    """Scores of four steps by models that are a number: how much of the truth they know."""

    def __init__(self, num_steps: int = 6, rows: int = 4_000) -> None:
        self.rng = np.random.default_rng(0)
        self.truth = [self.rng.uniform(0.02, 0.4, rows) for _ in range(num_steps)]
        self.clicks = [(self.rng.random(rows) < truth).astype(float) for truth in self.truth]

    def __len__(self) -> int:
        return len(self.truth)

    def value(self, model: Any, step: int) -> float:
        mean = self.truth[step].mean()
        return normalized_entropy(self.clicks[step], mean + model.knows * (self.truth[step] - mean))

    def change(self, new: list[Any], old: list[Any], steps: Any, config: BacktestConfig) -> Estimate:
        ratios = np.array([self.value(n, s) / self.value(o, s) - 1 for n, o, s in zip(new, old, steps, strict=True)])
        spread = 2 * ratios.std() / np.sqrt(len(ratios)) + 1e-3
        return Estimate(value=ratios.mean(), low=ratios.mean() - spread, high=ratios.mean() + spread)


def model(knows: float, day: int) -> Any:
    record = SimpleNamespace(as_of=START + day * DAY)
    return SimpleNamespace(knows=knows, version=f"m-{knows}-{day}", record=record, cpu_seconds=2.0)


def served(models: list[Any]) -> list[Any]:
    return [
        SimpleNamespace(model=m, retrained=number > 0 and m is not models[number - 1])
        for number, m in enumerate(models)
    ]


def test_retraining_is_false_when_the_model_before_would_have_done() -> None:
    poor, good, same = model(0.2, 0), model(1.0, 2), model(1.0, 4)
    steps = served([poor, poor, good, good, same, same])
    first, second = judge_retrainings(steps, Matrix(), CONFIG)  # type: ignore[arg-type]
    assert (first.comparison, first.is_false) == (Comparison.BETTER, False)
    assert (second.comparison, second.is_false) == (Comparison.TIED, True)
    assert (first.replaced, second.replaced) == (poor.version, good.version)
    # Whatever the policy did later, each is judged over the same time, as far as the log goes.
    assert first.until == START + 6 * DAY and second.until == START + 6 * DAY


def test_stretches_without_a_better_model_are_missed_retrainings() -> None:
    poor, good, moments = model(0.2, 0), model(1.0, 4), [START + n * DAY for n in range(7)]
    fresh = [model(1.0, n) for n in range(6)]
    matrix: Any = Matrix()
    (missed,) = find_missed(served([poor, poor, poor, poor, good, good]), fresh, matrix, moments, CONFIG)
    assert (missed.start, missed.end) == (START, START + 4 * DAY)
    assert missed.loss.low is not None and missed.loss.low > 0.02
    assert not find_missed(served([poor, good, good, good, good, good]), fresh, matrix, moments, CONFIG), "it acted"
    assert not find_missed(served([good] * 6), fresh, matrix, moments, CONFIG)


def test_lost_quality_is_the_mean_over_steps_that_have_a_figure() -> None:
    lost = lost_to_staleness([0.9, 0.95, None, 0.99], [0.9, 0.9, 0.9, None], CONFIG)
    assert lost.value == pytest.approx((0 + 0.05 / 0.9) / 2)
    assert lost.low == 0 and lost.high == pytest.approx(0.05 / 0.9)
    assert lost_to_staleness([None], [0.9], CONFIG).value is None


def test_intervals_decide_what_is_better() -> None:
    assert compare(Estimate(value=-0.1, low=-0.2, high=-0.01)) is Comparison.BETTER
    assert compare(Estimate(value=-0.1, low=-0.2, high=0.01)) is Comparison.TIED
    assert compare(Estimate(value=0.1, low=0.01, high=0.2)) is Comparison.WORSE
    assert compare(Estimate(value=None, reason="no rows")) is None


def interactions(path: Path) -> Path:
    rng = np.random.default_rng(5)
    rows = []
    for day in range(40):
        for number in range(60):
            moment = int(datetime(2024, 3, 4, tzinfo=UTC).timestamp()) + day * 86_400 + number * 1_200
            user = int(rng.integers(40))
            rows.append((moment, f"u{user}", f"i{user % 4 + 4 * int(rng.integers(30))}", f"s{day}-{user}"))
    path.mkdir()
    with (path / "users_interactions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["timestamp", "personId", "contentId", "sessionId", "userRegion", "userCountry"])
        writer.writerows([*row, "", ""] for row in rows)
    return path


def test_log_of_interactions_is_lived_through_week_by_week(tmp_path: Path) -> None:
    """By the command line."""
    data = interactions(tmp_path / "data")
    arguments = ["policy", "backtest", "--mapping", "deskdrop", "--data", str(data), "--out", str(tmp_path / "out")]
    arguments += ["--step", "7d", "--start-days", "21", "--policies", "never,ours"]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = BacktestResults.read(tmp_path / "out" / "results.json")
    assert len(found.steps) == 2 and found.kind == "interactions"
    for policy in ("never", "ours"):
        assert f"\n{policy} " in result.output
    assert "negatives are drawn" in result.output and "left out: interaction with an item" in result.output
    (report,) = LoopState(tmp_path / "out/policies/ours/state").reports(START + 9 * DAY)
    assert report.quality is not None and report.quality.models[0].figures.clicks > 0
    assert "drawn" in report.label_drift.reason


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warm_up": 30 * DAY}, "at least 2 are needed"),
        ({"step": timedelta(hours=36)}, "whole days"),
        ({"validation": 2 * DAY, "test": 2 * DAY}, "nothing is left to learn from"),
    ],
)
def test_configuration_that_cannot_be_is_refused(
    lived: Lived, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    config = CONFIG.model_copy(update=changes)
    with pytest.raises(InputError, match=message):
        backtest(Mapping.load("simulated"), str(lived.data), tmp_path / "out", [policy_of("never")], config=config)


def test_folder_of_something_else_is_not_touched(lived: Lived, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds something else"):
        backtest(Mapping.load("simulated"), str(lived.data), tmp_path, [policy_of("never")], config=CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_policies_must_have_names_of_their_own(lived: Lived, tmp_path: Path) -> None:
    for policies in ([], [policy_of("daily"), policy_of("daily")]):
        with pytest.raises(InputError, match="each once"):
            backtest(Mapping.load("simulated"), str(lived.data), tmp_path, policies, config=CONFIG)


def test_too_little_to_learn_from_names_the_moment_and_the_way_out(tmp_path: Path) -> None:
    quiet = WORLD.model_copy(update={"events_per_day": 40, "click_rate": 0.002, "num_days": 6})
    simulate_log(quiet, tmp_path / "data")
    config = CONFIG.model_copy(update={"warm_up": 3 * DAY, "window": 3 * DAY})
    with pytest.raises(TrainingError, match=r"as of 2025-01-04: .*--start-days"):
        backtest(
            Mapping.load("simulated"), str(tmp_path / "data"), tmp_path / "out", [policy_of("never")], config=config
        )


def test_results_are_plain_json(lived: Lived) -> None:
    found = json.loads((lived.out / "results.json").read_text())
    assert found["metric"] == "normalized_entropy" and len(found["policies"]) == 4
