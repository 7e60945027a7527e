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
from numpy.typing import NDArray

from evergreen.contracts.decision import DecisionConfig, TriggerName
from evergreen.contracts.evaluation import Estimate
from evergreen.contracts.impressions import read_impressions
from evergreen.contracts.loop_state import LoopState
from evergreen.contracts.mapping import Mapping
from evergreen.contracts.outcomes import Outcomes
from evergreen.models.calibration import PlattCalibration
from evergreen.models.package import ModelPackage, write_package
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


def _scores(package: ModelPackage, probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """What a calibration made these of."""
    calibration = package.calibration
    assert isinstance(calibration, PlattCalibration)
    return (np.log(probabilities / (1 - probabilities)) - calibration.intercept) / calibration.slope


def test_model_that_is_asked_again_says_what_it_said(served: Served) -> None:
    """Scores of the log, features of the log, and the positions: all are put together as they were."""
    change = served.change(served.package)
    assert change.value == pytest.approx(0.0, abs=1e-5) and change.low == pytest.approx(0.0, abs=1e-5)


def test_older_model_that_knows_less_is_worse(served: Served) -> None:
    change = served.change(promising(served.package, 2.0))
    assert change.low is not None and change.low > 0.05


def test_older_model_that_knows_more_is_better(served: Served) -> None:
    """The release promises seven times the clicks: its scores are in the log."""
    spoilt = promising(served.package, 2.0)
    log = [
        table.set_column(
            table.column_names.index("score"),
            table.schema.field("score"),
            [spoilt.calibrate(_scores(served.package, table["score"].to_numpy()))],
        )
        for table in read_impressions(served.impressions)
    ]
    end = served.world.snapshot.as_of
    change = replayed_change(
        log,
        served.outcomes,
        newer=spoilt,
        older=served.package,
        as_of=end,
        start=end - timedelta(days=3),
        end=end,
    )
    assert change.high is not None and change.high < -0.05


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


def spoilt(package: ModelPackage, out: Path) -> ModelPackage:
    """The package on disk with a calibration that is off."""
    return write_package(
        out,
        info=package.info,
        encoder=package.encoder,
        model=package.model,
        calibration=promising(package, 2.0).calibration,
        position=package.position,
        outcome=package.outcome,
        metrics=package.metrics,
        card="Promises too much.",
        export_program=False,
    )


@pytest.mark.parametrize("release", ["sound", "spoilt"])
def test_fewer_clicks_take_a_release_back_only_if_the_older_model_is_better(
    small_world: SmallWorld, tmp_path: Path, release: str
) -> None:
    """Overnight people click a third of what they did, whatever they are shown."""
    older, newer = small_world.package("logistic_regression"), small_world.package("popularity")
    if release == "spoilt":
        newer = spoilt(newer, tmp_path / "spoilt")
    ask_again(small_world, older, tmp_path, days_before=2)
    impressions = ask_again(small_world, newer, tmp_path)
    before, after = (newest_events(small_world, days_before=days) for days in (2, 0))
    clicks = pa.concat_tables([before, after.filter(pa.array(np.arange(after.num_rows) % 3 == 0))])
    clicks = clicks.filter(pc.is_valid(clicks["click_timestamp"]))
    (tmp_path / "clicks").mkdir()
    pq.write_table(clicks.select(["request_id", "item_id", "click_timestamp"]), tmp_path / "clicks" / "days.parquet")
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
    assert worse.raised == (release == "spoilt"), worse.reason
    assert "asked the same" in worse.reason
    assert any(worse.reason in note for note in decision.investigate) == (release == "sound")
