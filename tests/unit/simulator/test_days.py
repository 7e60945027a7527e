"""What a day leaves behind: the same bytes each time, also after a crash; clicks in the file of the day they happen."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from evergreen.cli import cli
from evergreen.contracts.errors import InputError
from evergreen.simulator.config import SimulatorConfig
from evergreen.simulator.days import (
    CLICKS,
    PAGES,
    TRUTH,
    DaySummary,
    finished_days,
    live_day,
    read_summaries,
    run_day,
    write_day,
)
from evergreen.simulator.log import EVENTS, simulate_log
from evergreen.simulator.scenarios import SCENARIOS
from evergreen.simulator.visits import VisitPlan, Visits
from tests.unit.simulator.recommenders import AtRandom

LOG = SimulatorConfig(num_users=300, num_items=120, num_days=6, click_rate=0.2)
PLAN = VisitPlan(log=LOG, requests_per_day=1_500)


def _live(out: Path, days: int, plan: VisitPlan = PLAN, first: int = 0) -> list[DaySummary]:
    visits = Visits(plan, num_days=days)
    return [run_day(visits, day, AtRandom(visits, seed=day), out) for day in range(first, days)]


def _files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def _read(out: Path, kind: str) -> pa.Table:
    return pa.concat_tables(pq.read_table(file, partitioning=None) for file in sorted((out / kind).iterdir()))


@pytest.fixture(scope="module")
def stable(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[DaySummary]]:
    out = tmp_path_factory.mktemp("stable") / "world"
    return out, _live(out, 4)


def test_each_file_is_as_stated(stable):
    out, _ = stable
    days = [f"2025-01-{day:02d}" for day in range(7, 11)]
    for kind, schema in (("events", EVENTS), ("clicks", CLICKS), ("truth", TRUTH), ("pages", PAGES)):
        assert sorted(file.stem for file in (out / kind).iterdir()) == days
        assert _read(out, kind).schema.equals(schema), kind
    assert {entry.name for entry in out.iterdir()} == {"world.json", "events", "clicks", "truth", "pages", "days"}


def test_equal_plans_and_answers_give_equal_bytes_and_a_crash_changes_none(stable, tmp_path):
    """Day 1 was cut short before its summary, half of day 2 was there; another process goes on."""
    out, _ = stable
    again = tmp_path / "world"
    _live(again, 3)
    (again / "days" / "2025-01-08.json").unlink()
    (again / "days" / "2025-01-09.json").unlink()
    (again / "truth" / "2025-01-09.parquet").write_bytes(b"half")
    assert finished_days(PLAN, again) == 1
    _live(again, 4, first=1)
    assert _files(again) == _files(out)


def test_events_are_true_and_the_truth_belongs_to_them(stable):
    out, _ = stable
    events, truth = _read(out, "events"), _read(out, "truth")
    for name in ("request_id", "item_id", "position", "clicked", "click_timestamp"):
        assert events[name].equals(truth[name]), name
    probability, clicked = truth["click_probability"].to_numpy(), truth["clicked"].to_numpy()
    for tenth in np.array_split(np.argsort(probability), 10):
        expected, variance = probability[tenth].sum(), (probability[tenth] * (1 - probability[tenth])).sum()
        assert abs(clicked[tenth].sum() - expected) < 4.5 * np.sqrt(variance) + 1e-9


def test_a_late_click_comes_in_the_file_of_the_day_on_which_it_happens(stable):
    out, summaries = stable
    late = 0
    for file in sorted((out / "clicks").iterdir()):
        times = pq.read_table(file, partitioning=None)["click_timestamp"].to_numpy()
        assert (times.astype("datetime64[D]") == np.datetime64(file.stem)).all()
        assert (np.diff(times) >= np.timedelta64(0)).all()
        events = pq.read_table(out / "events" / file.name, partitioning=None)
        ids = pq.read_table(file, partitioning=None)["request_id"]
        late += pc.sum(pc.invert(pc.is_in(ids, events["request_id"].combine_chunks()))).as_py()
    assert late == sum(day.late_clicks for day in summaries) > 0


def test_every_click_on_what_the_server_answered_is_in_the_stream_once(stable):
    out, summaries = stable
    truth, clicks = _read(out, "truth"), _read(out, "clicks")
    end = pa.scalar(PLAN.date(4), truth.schema.field("click_timestamp").type)
    wanted = truth.filter(pc.field("clicked") & pc.field("served") & (pc.field("click_timestamp") < end))
    pairs = [list(zip(*(table[name].to_pylist() for name in CLICKS.names), strict=True)) for table in (wanted, clicks)]
    assert sorted(pairs[0], key=str) == sorted(pairs[1], key=str) and len(pairs[0]) > 1_000
    assert truth.filter(~pc.field("served")).num_rows == sum(day.unknown_items for day in summaries) > 0


def test_the_summary_is_that_of_peoples_pages(stable):
    out, summaries = stable
    day = summaries[2]
    pages = pq.read_table(out / "pages" / f"{day.date}.parquet", partitioning=None)
    assert pages.num_rows == day.requests == sum(day.model_versions.values())
    people = pages.filter(~pc.field("is_bot") & ~pc.field("explored"))
    assert people.num_rows == day.measured < day.requests
    assert pc.sum(pages["explored"]).as_py() == day.explored > 0
    assert (pages["shown"].to_numpy() == PLAN.k).all()
    places = day.measured * PLAN.k
    assert day.click_rate == pytest.approx(pc.sum(people["clicks"]).as_py() / places)
    for name in ("expected", "oracle", "random"):
        assert getattr(day, f"{name}_rate") == pytest.approx(pc.sum(people[f"{name}_clicks"]).as_py() / places)
    assert day.random_rate == pytest.approx(day.expected_rate, rel=0.1)  # pages were at random
    assert day.oracle_rate > 1.5 * day.random_rate
    assert (day.degraded, day.empty, day.failures, day.lost_requests, day.lost_clicks) == (0, 0, 0, 0, 0)
    assert read_summaries(out) == summaries


def test_lost_impressions_are_not_logged_and_their_clicks_still_come(tmp_path):
    scenario = SCENARIOS["logging-outage"].model_copy(update={"begins": 1, "lasts": 1})
    days = _live(tmp_path / "world", 3, PLAN.model_copy(update={"scenario": scenario}))
    stable_days = _live(tmp_path / "stable", 3)
    out = tmp_path / "world"
    assert [day.lost_requests > 0 for day in days] == [False, True, False]
    assert days[1].lost_requests == pytest.approx(0.6 * days[1].requests, rel=0.1)
    events = pq.read_table(out / "events" / "2025-01-08.parquet", partitioning=None)
    assert len(set(events["request_id"].to_pylist())) == days[1].requests - days[1].lost_requests
    changed = {name for name, data in _files(out).items() if data != _files(tmp_path / "stable")[name]}
    assert changed == {"world.json", "events/2025-01-08.parquet", "days/2025-01-08.json"}
    assert [day.click_rate for day in days] == [day.click_rate for day in stable_days], "what happened is the same"


def test_lost_clicks_are_in_neither_log_and_in_the_truth(tmp_path):
    scenario = SCENARIOS["click-outage"].model_copy(update={"begins": 1, "lasts": 1})
    out = tmp_path / "world"
    days = _live(out, 3, PLAN.model_copy(update={"scenario": scenario}))
    _live(tmp_path / "stable", 3)
    logged, true = (pq.read_table(out / kind / "2025-01-08.parquet", partitioning=None) for kind in ("events", "truth"))
    clicks, all_clicks = (pc.sum(table["clicked"]).as_py() for table in (logged, true))
    assert clicks == pytest.approx(0.4 * all_clicks, rel=0.15)
    unclicked = logged.filter(~pc.field("clicked"))
    for name in ("click_timestamp", "rating", "dwell_seconds"):
        assert unclicked[name].null_count == unclicked.num_rows
    # A click on a page of day 0 that comes on day 1 is lost as well, from both logs.
    stream = _read(out, "clicks")
    in_events = _read(out, "events").filter(pc.field("clicked"))
    keys = [set(zip(t["request_id"].to_pylist(), t["item_id"].to_pylist(), strict=True)) for t in (stream, in_events)]
    assert keys[0] <= keys[1]
    lost = _read(tmp_path / "stable", "clicks").num_rows - stream.num_rows
    assert lost == days[1].lost_clicks == sum(day.lost_clicks for day in days) > 0


def test_days_of_another_world_are_not_mixed_in(stable):
    with pytest.raises(InputError, match=r"holds the days of another world: requests_per_day is 1500 there, 90 here"):
        finished_days(PLAN.model_copy(update={"requests_per_day": 90}), stable[0])
    with pytest.raises(InputError, match=r"scenario is .*stable.* there, .*taste-shift.* here"):
        finished_days(PLAN.model_copy(update={"scenario": SCENARIOS["taste-shift"]}), stable[0])


def test_a_folder_without_a_finished_day_takes_another_plan(tmp_path):
    assert finished_days(PLAN, tmp_path) == 0
    (tmp_path / "events").mkdir()
    (tmp_path / "events" / "2025-01-07.parquet").write_bytes(b"of a day that was cut short")
    other = PLAN.model_copy(update={"requests_per_day": 90})
    assert finished_days(other, tmp_path) == 0
    assert VisitPlan.read(tmp_path / "world.json") == other
    assert [entry.name for entry in tmp_path.iterdir()] == ["world.json"]


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds something else"):
        finished_days(PLAN, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_day_cannot_be_written_before_the_one_before_it(tmp_path):
    visits = Visits(PLAN, num_days=3)
    with pytest.raises(InputError, match="day 1 is missing; live the days in their order"):
        write_day(visits, live_day(visits, 2, AtRandom(visits)), tmp_path / "world")


def test_a_seasonal_log_knows_its_scenario_and_a_plain_one_stays_as_it_was(tmp_path):
    config = SimulatorConfig(num_users=200, num_items=100, num_days=7, events_per_day=500)  # from a Wednesday
    simulate_log(config, tmp_path / "plain")
    simulate_log(config, tmp_path / "seasonal", scenario=SCENARIOS["seasonal"])
    simulate_log(config, tmp_path / "shift", scenario=SCENARIOS["taste-shift"])
    plain, seasonal, shift = (_files(tmp_path / name) for name in ("plain", "seasonal", "shift"))
    assert plain == {name: data for name, data in shift.items() if name != "scenario.json"}
    same = {name for name in plain if name.startswith("truth") and plain[name] == seasonal[name]}
    assert same == {f"truth/2025-01-0{day}.parquet" for day in (1, 2, 3)}, "until the first Saturday"
    simulate_log(config, tmp_path / "seasonal")
    assert _files(tmp_path / "seasonal") == plain, "an earlier simulation is replaced, its scenario too"


def test_the_command_refuses_a_log_whose_weekends_are_others(tmp_path):
    simulate_log(SimulatorConfig(num_users=50, num_items=50, num_days=1, events_per_day=100), tmp_path / "log")
    arguments = ["simulate", "world", "--url", "http://127.0.0.1:1", "--log", str(tmp_path / "log")]
    arguments += ["--out", str(tmp_path / "world"), "--scenario"]
    with pytest.raises(InputError, match="simulate log --scenario seasonal"):
        CliRunner().invoke(cli, [*arguments, "seasonal"], catch_exceptions=False)
    with pytest.raises(InputError, match="scenario 'quake': there is none"):
        CliRunner().invoke(cli, [*arguments, "quake"], catch_exceptions=False)
    assert not (tmp_path / "world").exists()


def test_dates_go_on_where_the_log_ends():
    assert PLAN.date(0) == LOG.start + timedelta(days=6)
