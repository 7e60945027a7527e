"""A tiny world under two policies, in process: what the evenings leave behind, and that both see the same people."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from evergreen.contracts.decision import DecisionConfig, RetrainDecision, Verdict
from evergreen.contracts.errors import InputError
from evergreen.contracts.impressions import feature_table, read_impressions
from evergreen.contracts.loop_state import LoopState, name_of
from evergreen.contracts.monitoring_report import MonitoringReport
from evergreen.contracts.release import CanaryReport
from evergreen.contracts.training_set import TrainingSet
from evergreen.features.store import FeatureStore
from evergreen.laboratory.demo import _MARKER, _claim
from evergreen.laboratory.loop import Arm, LoopConfig, Start, prepare
from evergreen.laboratory.policies import Ours, policy_of
from evergreen.laboratory.results import LoopDay
from evergreen.laboratory.shop import InProcess, OverHttp, Shop
from evergreen.models.package import ModelPackage
from evergreen.monitoring.reference import MonitoringReference
from evergreen.simulator.config import SimulatorConfig
from evergreen.simulator.days import live_day
from evergreen.simulator.scenarios import Scenario, find_scenario
from evergreen.simulator.visits import VisitPlan, Visits
from evergreen.training.config import TrainingConfig

DAYS = 3
BROKEN = "item_rate_7d"


def loop_config(scenario: Scenario | None = None, **changes: object) -> LoopConfig:
    log = SimulatorConfig(num_users=300, num_items=60, num_days=4, events_per_day=1_500, click_rate=0.15, seed=2)
    plan = VisitPlan(log=log, scenario=scenario or Scenario(name="stable"), requests_per_day=200, k=6, seed=2)
    training = TrainingConfig(model="logistic_regression", export_program=False)
    settings = {"num_days": DAYS, "training": training, "test_span": timedelta(hours=6), "filter_bots": False}
    return LoopConfig(plan=plan, **{**settings, **changes})


CONFIG = loop_config()


@dataclass
class Lived:
    """An arm whose days are over, and what of its state changes from evening to evening."""

    arm: Arm
    days: list[LoopDay] = field(default_factory=list)
    serves: list[str] = field(default_factory=list)
    """Version that is current when an evening is over."""
    in_service: list[bool] = field(default_factory=list)
    """Whether the first model's reference knows how it is in service."""

    @property
    def state(self) -> LoopState:
        return self.arm.state

    def pages(self, day: LoopDay) -> pa.Table:
        return pq.read_table(self.arm.world / "pages" / f"{day.date}.parquet", partitioning=None)

    def impressions(self, day: LoopDay) -> pa.Table:
        """What is logged of a day."""
        rows = pa.concat_tables(read_impressions(str(self.arm.impressions)))
        return rows.filter(pc.equal(pc.strftime(rows["event_timestamp"], "%Y-%m-%d"), f"{day.date}"))

    def logged(self, day: LoopDay) -> set[str]:
        """Requests of the same."""
        return set(self.impressions(day)["request_id"].to_pylist())

    def shown(self, day: LoopDay) -> pa.Table:
        """Features of all that was shown on a day, as they were served."""
        return feature_table(self.impressions(day))


def live(config: LoopConfig, start: Start, policy: str, out: Path) -> Lived:
    # In so small a shop nothing happens within the hour before midnight, which is what a daily batch knows of an hour:
    # a counter that is nearly always the same may always be so.
    decides = Ours(DecisionConfig(constant_usual=0.5)) if policy == "ours" else policy_of(policy)
    lived = Lived(Arm(config, start, decides, out, InProcess))
    first = lived.state.released()[0].version
    for day in lived.arm.run():
        lived.days.append(day)
        lived.serves.append(ModelPackage.load(lived.state.releases / "current").version)
        lived.in_service.append(MonitoringReference.read(lived.state.reference(first)).in_service is not None)
    return lived


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    return prepare(CONFIG, tmp_path_factory.mktemp("loop") / "start")


@pytest.fixture(scope="module")
def ours(start: Start) -> Lived:
    return live(CONFIG, start, "ours", start.path.parent / "ours")


@pytest.fixture(scope="module")
def daily(start: Start) -> Lived:
    return live(CONFIG, start, "daily", start.path.parent / "daily")


@pytest.fixture(scope="module")
def broken(start: Start, daily: Lived) -> Lived:
    """A day for which the pipeline writes zeros, with a canary in its evening, in a folder that was used."""
    scenario = find_scenario("broken-feature").model_copy(update={"begins": 0, "lasts": 1})
    out = start.path.parent / "broken"
    shutil.copytree(daily.arm.path, out, symlinks=True)
    return live(loop_config(scenario, num_days=1, canary_requests=12), start, "daily", out)


def test_days_follow_each_other_and_go_on_where_the_log_ends(ours: Lived, daily: Lived) -> None:
    for lived in (ours, daily):
        assert [day.day for day in lived.days] == list(range(DAYS))
        assert lived.days[0].date == CONFIG.plan.date(0).date()
        assert all(later.date - day.date == timedelta(days=1) for day, later in pairwise(lived.days))
        for day in lived.days:
            assert day.requests == sum(day.model_versions.values()) > 100 and day.failures == 0
            assert 0 < day.random_rate < day.expected_rate < day.oracle_rate


def test_both_policies_see_the_same_people_at_the_same_times(ours: Lived, daily: Lived) -> None:
    for one, other in zip(ours.days, daily.days, strict=True):
        asked = ["request_id", "event_timestamp", "user_id", "explored", "random_clicks", "oracle_clicks"]
        assert ours.pages(one).select(asked).equals(daily.pages(other).select(asked))
    first = ours.pages(ours.days[0])
    assert first.equals(daily.pages(daily.days[0])), "on the first day they are shown the same, and do the same"


def test_daily_policy_releases_every_evening(daily: Lived) -> None:
    config, state = CONFIG, daily.state
    evenings = [config.plan.date(day + 1) for day in range(DAYS)]
    assert [day.verdict for day in daily.days] == [Verdict.RETRAIN] * DAYS
    trained = [day.retraining for day in daily.days if day.retraining is not None]
    assert [one.as_of for one in trained] == evenings
    assert all(one.released and one.gate is None and one.canary is None and one.cpu_seconds > 0 for one in trained)
    releases = state.released()
    assert [release.released_at for release in releases] == [config.plan.date(0), *evenings]
    assert [release.version for release in releases[1:]] == daily.serves == [one.model_version for one in trained]
    assert len(set(daily.serves)) == DAYS, "each evening has another model"
    assert [(run.run_id, run.started_at, run.finished_at) for run in state.runs()] == [
        (name_of(evening), evening, evening) for evening in evenings
    ]
    assert not state.reports() and not state.decisions(), "it looks at nothing"
    for release in releases:
        assert MonitoringReference.read(state.reference(release.version)).model_version == release.version
    for one in trained:
        assert one.package is not None
        assert ModelPackage.load(daily.arm.path.parent / one.package).info.train_rows == one.train_rows


def test_what_was_released_in_the_evening_serves_on_the_next_day(daily: Lived) -> None:
    first = daily.state.released()[0].version
    for day, version in zip(daily.days, [first, *daily.serves], strict=False):
        assert list(day.model_versions) == [version]


def test_each_model_knows_the_days_that_were_lived_before_it(daily: Lived) -> None:
    known = [ModelPackage.load(daily.state.package(version)).info.as_of for version in daily.serves]
    assert known == [CONFIG.plan.date(day + 1) for day in range(DAYS)]
    rows = TrainingSet.load(daily.arm.path / "work" / "training_set")
    served = rows.read("test", ["request_id"])["request_id"].to_pylist()
    last = set(daily.pages(daily.days[-1])["request_id"].to_pylist())
    assert served and set(served) <= last, "the newest hours are the last day's"
    spans = rows.manifest.splits
    assert spans["test"].start == CONFIG.plan.date(DAYS) - CONFIG.test_span


def test_features_are_made_of_as_many_days_as_the_log_had(ours: Lived, daily: Lived, start: Start) -> None:
    for lived in (ours, daily):
        files = sorted(file.stem for file in lived.arm.events.iterdir())
        assert files == [f"{CONFIG.plan.date(day):%Y-%m-%d}" for day in range(DAYS - 4, DAYS)]
    assert len(list(start.events.iterdir())) == 4, "what all arms begin with is as it was"


def test_our_loop_leaves_a_report_and_a_decision_every_evening(ours: Lived) -> None:
    root = ours.arm.path.parent
    for day in ours.days:
        as_of = CONFIG.plan.date(day.day + 1)
        assert day.report is not None and day.decision is not None and day.page is None
        report = MonitoringReport.read(root / day.report)
        assert (report.start, report.end) == (as_of - timedelta(days=1), as_of) and report.requests == day.requests
        decision = RetrainDecision.read(root / day.decision)
        assert (decision.as_of, decision.verdict, decision.reason) == (as_of, day.verdict, day.reason)
        assert decision.report == report
        assert set(day.drift) == {"features", "predictions", "labels"}
    assert [decision.as_of for decision in ours.state.decisions()] == [CONFIG.plan.date(day + 1) for day in range(DAYS)]
    retrained = [day for day in ours.days if day.verdict is Verdict.RETRAIN]
    assert len(ours.state.runs()) == len(retrained)
    assert len(ours.state.released()) == 1 + sum(day.retraining.released for day in retrained if day.retraining)


def test_first_day_in_service_becomes_a_reference_when_it_is_over(ours: Lived, daily: Lived) -> None:
    assert ours.in_service == [False, True, True], "the first evening's window is that day itself"
    assert daily.in_service == [False] * DAYS, "nobody watches"
    first = ours.state.released()[0].version
    reference = MonitoringReference.read(ours.state.reference(first)).in_service
    assert reference is not None and reference.labels is not None
    shown = ours.shown(ours.days[0])
    assert reference.features.rows == reference.predictions.rows == shown.num_rows
    assert 0 < reference.labels.rows <= shown.num_rows
    against = MonitoringReport.read(ours.state.report(CONFIG.plan.date(1))).feature_drift.details[BROKEN].against
    later = MonitoringReport.read(ours.state.report(CONFIG.plan.date(2))).feature_drift.details[BROKEN].against
    assert "in_service" not in against and "in_service" in later


def test_rows_are_learned_from_with_the_features_that_were_served(daily: Lived) -> None:
    """As of the last midnight, but for the day that is forgotten since: what is about shorter times is the same."""
    keys = ["request_id", "item_id"]
    served = pa.concat_tables(read_impressions(str(daily.arm.impressions)))
    learned = TrainingSet.load(daily.arm.path / "work" / "training_set").read("test")
    row = learned.select(keys).append_column("learned", pa.array(range(learned.num_rows)))
    row = row.join(
        served.select(keys).append_column("served", pa.array(range(served.num_rows))), keys, join_type="inner"
    )
    assert row.num_rows > 100
    shown, rows = feature_table(served).take(row["served"]), learned.take(row["learned"])
    for name in (
        "user_events_1d",
        "item_events_1d",
        "item_positives_1d",
        "user_recency_seconds",
        "item_recency_seconds",
    ):
        one, other = shown[name].to_numpy(), rows[name].cast("float64").to_numpy()
        known = ~np.isnan(other)
        assert known.mean() > 0.5 and not np.isnan(one[known]).any(), name
        np.testing.assert_array_equal(one[known], other[known], err_msg=name)
    counts = [shown["item_events_7d"].to_numpy(), rows["item_events_7d"].cast("float64").to_numpy()]
    assert np.nanmax(counts[1] - counts[0]) <= 0, "nothing is learned from that was not served"


def test_broken_features_are_served_but_not_learned_from(ours: Lived, broken: Lived) -> None:
    whole, zeros = ours.shown(ours.days[0]), broken.shown(broken.days[0])
    assert pc.max(whole[BROKEN]).as_py() > 0
    assert pc.min(zeros[BROKEN]).as_py() == pc.max(zeros[BROKEN]).as_py() == 0
    assert pc.max(zeros["item_events_7d"]).as_py() > 0, "only what the scenario names is broken"
    newest = TrainingSet.load(broken.arm.path / "work" / "training_set").read("test")
    assert pc.max(newest[BROKEN]).as_py() > 0, "rows of the broken day have what should have been served"
    items = FeatureStore.open(broken.state.feature_store).tables.path / "item_activity.parquet"
    assert pc.max(pq.read_table(items)[BROKEN]).as_py() > 0, "it is over in the evening"


def test_impressions_that_an_outage_loses_were_served_and_are_in_no_log(start: Start, ours: Lived) -> None:
    scenario = find_scenario("logging-outage").model_copy(update={"begins": 1, "lasts": 1})
    outage = live(loop_config(scenario, num_days=2), start, "daily", start.path.parent / "outage")
    assert [day.requests for day in outage.days] == [day.requests for day in ours.days[:2]], "people ask as before"
    before, during = (outage.logged(day) for day in outage.days)
    assert len(before) == outage.days[0].requests
    assert 0.3 < len(during) / outage.days[1].requests < 0.5, "0.6 of the requests are lost"
    events = pq.read_table(outage.arm.events / f"{outage.days[1].date}.parquet")
    assert during <= set(events["request_id"].to_pylist()), "both logs lose the same"


def test_arm_begins_anew_in_a_folder_that_was_used(broken: Lived, daily: Lived) -> None:
    assert [run.run_id for run in broken.state.runs()] == [name_of(CONFIG.plan.date(1))]
    assert len(broken.state.released()) <= 2 < len(daily.state.released())
    assert len(list((broken.arm.world / "pages").iterdir())) == 1


def test_challenger_is_released_if_its_canary_passes(broken: Lived) -> None:
    for day in broken.days:
        found = day.retraining
        assert found is not None and found.canary is not None
        assert found.canary == CanaryReport.read(broken.state.canary(found.as_of))
        assert found.released is found.canary.passed, found.canary
        assert (found.model_version in [release.version for release in broken.state.released()]) is found.released
    logged = pa.concat_tables(read_impressions(str(broken.arm.impressions)))
    assert logged.group_by("request_id").aggregate([]).num_rows == sum(day.requests for day in broken.days), (
        "what canaries are asked nobody saw"
    )


@pytest.fixture(scope="module")
def answers(ours: Lived, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[list, pa.Table]]]:
    """A day asked of both kinds of shop: what was answered, and what was logged."""
    found = {}
    for make in (InProcess, OverHttp):
        log = tmp_path_factory.mktemp("shop") / make.__name__
        shop: Shop = make(ours.state, log)
        with shop.open() as recommend:
            served = live_day(Visits(CONFIG.plan, num_days=DAYS + 1), DAYS, recommend).served
        rows = pa.concat_tables(read_impressions(str(log))).sort_by(
            [("request_id", "ascending"), ("position", "ascending")]
        )
        found[make.__name__] = (served, rows)
    yield found


def test_asked_in_process_and_over_http_the_day_is_the_same(answers: dict[str, tuple[list, pa.Table]]) -> None:
    (served, rows), (over_http, rows_over_http) = answers.values()
    assert served == over_http and len(served) > 100
    assert not any(answer.degraded for answer in served)
    columns = [name for name in rows.column_names if name != "served_at"]
    assert rows.num_rows > 500
    assert rows.select(columns).equals(rows_over_http.select(columns))


def test_shop_that_was_closed_has_logged_everything(answers: dict[str, tuple[list, pa.Table]]) -> None:
    for served, rows in answers.values():
        assert rows.num_rows == sum(len(answer.item_ids) for answer in served)


def test_demonstration_takes_a_new_an_empty_or_its_own_folder(tmp_path: Path) -> None:
    out = tmp_path / "a" / "demo"
    _claim(out)
    assert [entry.name for entry in out.iterdir()] == [_MARKER]
    (out / "loop.json").touch()
    (out / "daily" / "state").mkdir(parents=True)
    (out / "latest").symlink_to(out / "daily")
    _claim(out)
    assert [entry.name for entry in out.iterdir()] == [_MARKER], "results of before are removed"
    (tmp_path / "empty").mkdir()
    _claim(tmp_path / "empty")


def test_demonstration_refuses_what_is_not_its_own(tmp_path: Path) -> None:
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("years of work")
    for out in (tmp_path, thesis):
        with pytest.raises(InputError, match="holds something else than a demonstration"):
            _claim(out)
    assert thesis.read_text() == "years of work" and [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]
