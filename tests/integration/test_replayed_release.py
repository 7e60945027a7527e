"""What the older model says of what the newer one has shown: the real log, the real outcomes, real packages."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from evergreen.contracts.decision import DecisionConfig, TriggerName
from evergreen.contracts.evaluation import Estimate
from evergreen.contracts.impressions import read_impressions
from evergreen.contracts.loop_state import LoopState
from evergreen.contracts.mapping import Mapping
from evergreen.contracts.outcomes import Outcomes
from evergreen.models.calibration import PlattCalibration
from evergreen.models.package import ModelPackage
from evergreen.monitoring.decision import decide
from evergreen.monitoring.outcomes import join_outcomes
from evergreen.monitoring.quality import QualityConfig
from evergreen.monitoring.replay import replayed_change
from evergreen.monitoring.watch import WatchConfig, keep_reference, loop_history, watch
from evergreen.release.store import ReleaseStore
from tests.pages import ask_again, newest_events
from tests.small_world import SmallWorld


@dataclass(frozen=True)
class Served:
    """A release that served on the newest day."""

    world: SmallWorld
    package: ModelPackage
    impressions: str
    outcomes: Outcomes

    def change(self, older: ModelPackage, **config: int) -> Estimate:
        end = self.world.snapshot.as_of
        return replayed_change(
            read_impressions(self.impressions),
            self.outcomes,
            newer=self.package,
            older=older,
            as_of=end,
            start=self.world.training_set.manifest.splits["test"].start,
            end=end,
            config=QualityConfig(**config),
        )


@pytest.fixture(scope="module")
def served(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Served:
    root = tmp_path_factory.mktemp("served")
    package = small_world.package("popularity")
    impressions = ask_again(small_world, package, root)
    clicks = newest_events(small_world)
    clicks = clicks.filter(pc.is_valid(clicks["click_timestamp"]))
    (root / "clicks").mkdir()
    pq.write_table(clicks.select(["request_id", "item_id", "click_timestamp"]), root / "clicks" / "day.parquet")
    join_outcomes(
        impressions,
        str(root / "clicks"),
        root / "outcomes",
        window=timedelta(minutes=10),
        as_of=small_world.snapshot.as_of,
        mapping=Mapping.load("simulated"),
    )
    return Served(small_world, package, impressions, Outcomes.load(root / "outcomes"))


def promising(package: ModelPackage, log_odds: float) -> ModelPackage:
    """The package with a calibration that is off."""
    calibration = package.calibration
    assert isinstance(calibration, PlattCalibration)
    moved = calibration.model_copy(update={"intercept": calibration.intercept + log_odds})
    return replace(package, calibration=moved)


def test_model_that_is_asked_again_says_what_it_said(served: Served) -> None:
    """Scores of the log, features of the log, and the positions: all are put together as they were."""
    change = served.change(served.package)
    assert change.value == pytest.approx(0.0, abs=1e-5) and change.low == pytest.approx(0.0, abs=1e-5)


def test_what_a_model_promises_does_not_matter(served: Served) -> None:
    """People click less for all models; then the one that promised less would win."""
    change = served.change(promising(served.package, 2.0))
    assert change.value == pytest.approx(0.0, abs=1e-5)


def test_too_little_says_nothing(served: Served) -> None:
    change = served.change(served.package, min_clicks=10_000)
    assert change.value is None and change.reason is not None and "10000 are needed" in change.reason
    before = replayed_change(
        read_impressions(served.impressions),
        served.outcomes,
        newer=served.world.package("logistic_regression"),  # it never served
        older=served.package,
        as_of=served.world.snapshot.as_of,
        start=served.world.snapshot.as_of - timedelta(days=3),
        end=served.world.snapshot.as_of,
    )
    assert before.value is None and before.reason is not None and before.reason.startswith("0 rows of logistic_")


@pytest.mark.parametrize("at_fault", ["world", "release"])
def test_fewer_clicks_take_a_release_back_only_if_the_older_model_is_better(
    small_world: SmallWorld, tmp_path: Path, at_fault: str
) -> None:
    """On the day of the release people click far less: on anything, or on what the older model ranks first."""
    older, newer = small_world.package("popularity"), small_world.package("logistic_regression")
    ask_again(small_world, older, tmp_path, days_before=2)
    impressions = ask_again(small_world, newer, tmp_path)
    before, after = (newest_events(small_world, days_before=days) for days in (2, 0))
    clicks = [before.filter(pc.is_valid(before["click_timestamp"]))]
    if at_fault == "world":
        chosen = np.arange(after.num_rows) % 31 == 0
    else:
        shown = pa.concat_tables(read_impressions(impressions))
        shown = shown.filter(pc.equal(shown["model_version"], newer.version))
        served = pa.Table.from_struct_array(shown["features"].combine_chunks())
        rates = served.append_column("user_id", shown["user_id"]).append_column("item_id", shown["item_id"])
        best = np.argsort(-older.predict(rates))[::2][:25]
        pairs = pc.binary_join_element_wise(shown["request_id"], shown["item_id"], " ").take(pa.array(best))
        ours = pc.binary_join_element_wise(after["request_id"], after["item_id"], " ")
        chosen = pc.is_in(ours, value_set=pairs).to_numpy()
    newest = after.filter(pa.array(chosen))
    column = newest.column_names.index("click_timestamp")
    clicks.append(newest.set_column(column, newest.schema.field(column), newest["event_timestamp"]))
    (tmp_path / "clicks").mkdir()
    columns = ["request_id", "item_id", "click_timestamp"]
    pq.write_table(pa.concat_tables([t.select(columns) for t in clicks]), tmp_path / "clicks" / "days.parquet")
    as_of = small_world.snapshot.as_of
    state = LoopState(tmp_path / "state")
    join_outcomes(
        impressions,
        str(tmp_path / "clicks"),
        state.outcomes,
        window=timedelta(minutes=10),
        as_of=as_of,
        mapping=Mapping.load("simulated"),
    )
    start = small_world.training_set.manifest.splits["test"].start
    releases = ReleaseStore(state.releases)
    for package, moment in ((older, start - timedelta(days=2)), (newer, start)):
        keep_reference(state, small_world.training_set, package)
        releases.release(package.path, package.version, as_of=moment, reason="better")
    config = WatchConfig(quality=QualityConfig(min_rows=50))
    report = watch(state, impressions, newer, as_of=as_of, window=as_of - start, page=False, config=config)
    decision = decide(report, loop_history(state), as_of=as_of, config=DecisionConfig(min_rows=100))
    worse = decision.trigger(TriggerName.WORSE_RELEASE)
    assert worse is not None and worse.value is not None and worse.value < -0.4
    assert worse.raised == (at_fault == "release"), worse.reason
    assert "asked the same" in worse.reason
    assert any(worse.reason in note for note in decision.investigate) == (at_fault == "world")
