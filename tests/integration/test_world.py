"""The world asks a really served model: what is logged on both sides of the wire agrees, and can be learned from."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from evergreen.cli import cli
from evergreen.contracts.impressions import read_impressions
from evergreen.contracts.mapping import Mapping
from evergreen.ingest.log import ingest_log
from evergreen.monitoring.outcomes import join_outcomes
from evergreen.serving.impression_sinks import open_sink
from evergreen.serving.impressions import ImpressionLog
from evergreen.serving.recommender import Recommender
from evergreen.serving.schema import RankingRequest
from evergreen.serving.server import opener, serving_in_background
from evergreen.serving.settings import ServeSettings
from evergreen.simulator.asking import Ask, Served
from evergreen.simulator.days import live_day, read_summaries
from evergreen.simulator.visits import VisitPlan, Visits
from tests.small_world import CONFIG, SmallWorld

MAPPING = Mapping.load("simulated")


@dataclass(frozen=True)
class Lived:
    """Three days of a world, lived by the command line in two calls, and what the server logged of them."""

    log: Path
    model: Path
    feature_store: Path
    world: Path
    impressions: str
    output: tuple[str, str]


@pytest.fixture(scope="module")
def lived(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lived]:
    root = tmp_path_factory.mktemp("world")
    log, model = small_world.log, small_world.package("logistic_regression").path
    settings = ServeSettings.of(
        model=model, feature_store=small_world.feature_store, host="127.0.0.1", port=0, deadline_ms=20_000
    )
    with (
        ImpressionLog(open_sink(str(root / "impressions"))) as impressions,
        serving_in_background(settings, opener(settings, None, impressions)) as server,
    ):
        arguments = ["simulate", "world", "--url", server.url, "--log", str(log), "--out", str(root / "world")]
        arguments += ["--requests-per-day", "150", "--k", "6", "--days"]
        results = [CliRunner().invoke(cli, [*arguments, days], catch_exceptions=False) for days in ("2", "3")]
    output = (results[0].output, results[1].output)
    yield Lived(log, model, small_world.feature_store, root / "world", str(root / "impressions"), output)


def _read(lived: Lived, kind: str) -> pa.Table:
    return pa.concat_tables(pq.read_table(file, partitioning=None) for file in sorted((lived.world / kind).iterdir()))


def _pairs(table: pa.Table, *names: str) -> set[tuple[object, ...]]:
    return set(zip(*(table[name].to_pylist() for name in names), strict=True))


def test_the_command_tells_of_each_day_and_goes_on_where_it_stopped(lived: Lived) -> None:
    first, second = lived.output
    version = read_summaries(lived.world)[0].model_versions
    assert len(version) == 1
    assert first.count(" requests  clicked ") == 2 and next(iter(version)) in first
    assert "3 days" not in first and "2 days are there" in second
    assert second.count(" requests  clicked ") == 1 and "day   2  Sat 2025-01-11" in second
    assert [day.day for day in read_summaries(lived.world)] == [0, 1, 2]
    assert all(day.failures == day.empty == day.degraded == 0 for day in read_summaries(lived.world))


def test_the_server_logged_what_the_world_saw(lived: Lived) -> None:
    shown = pa.concat_tables(read_impressions(lived.impressions))
    truth = _read(lived, "truth")
    chosen = truth.filter(truth["served"])
    assert chosen.num_rows < truth.num_rows, "the server did not know what the shop added"
    columns = ("request_id", "item_id", "position")
    assert _pairs(shown, *columns) == _pairs(chosen, *columns) and shown.num_rows == chosen.num_rows > 2_000
    moments = _pairs(shown, "request_id", "event_timestamp", "user_id")
    assert moments == _pairs(_read(lived, "pages"), "request_id", "event_timestamp", "user_id")


def test_every_click_finds_its_impression(lived: Lived, tmp_path: Path) -> None:
    plan = VisitPlan.read(lived.world / "world.json")
    manifest = join_outcomes(
        lived.impressions,
        str(lived.world / "clicks"),
        tmp_path / "outcomes",
        window=MAPPING.split.attribution_window,
        as_of=plan.date(3),
        mapping=MAPPING,
    )
    [join] = manifest.joins
    assert join.quarantined == {} and join.clicks_left_out == {}
    assert join.attributed == join.clicks == _read(lived, "clicks").num_rows > 30


def test_the_click_log_goes_on_from_its_history(lived: Lived, tmp_path: Path) -> None:
    """One log of eleven days: nothing in quarantine, new people in it, and of the new items those that were shown."""
    (tmp_path / "events").mkdir()
    for folder in (lived.log, lived.world):
        for file in (folder / "events").iterdir():
            shutil.copyfile(file, tmp_path / "events" / file.name)
    snapshot = ingest_log(MAPPING, str(tmp_path), tmp_path / "snapshot")
    assert snapshot.manifest.quarantined == {}
    events = _read(lived, "events")
    assert snapshot.manifest.rows == CONFIG.num_days * CONFIG.events_per_day + events.num_rows
    assert (events["propensity"].to_numpy() > 0).all()
    assert set(events["item_id"].to_pylist()) - set(_shown_in_history(lived))


def _shown_in_history(lived: Lived) -> list[str]:
    parts = [pq.read_table(file, columns=["item_id"]) for file in (lived.log / "events").iterdir()]
    ids: list[str] = pa.concat_tables(parts)["item_id"].unique().to_pylist()
    return ids


def test_the_same_model_in_process_gives_the_same_days(lived: Lived) -> None:
    """Loops over many seeds may do without HTTP."""
    recommender = Recommender.load(lived.model, lived.feature_store, deadline_seconds=20)

    with asyncio.Runner() as runner:

        def recommend(asks: Sequence[Ask], /) -> list[Served]:
            requests = [RankingRequest.model_validate(ask.instance()) for ask in asks]
            answers = runner.run(recommender.answer(requests))
            return [
                Served(answer.request_id, tuple(answer.item_ids or ()), answer.model_version, answer.degraded)
                for answer in answers
            ]

        visits = Visits(VisitPlan.read(lived.world / "world.json"), num_days=3)
        days = [live_day(visits, day, recommend) for day in range(3)]
        runner.run(recommender.close())
    pages = _read(lived, "pages")
    clicks = np.concatenate([day.outcomes.clicks() for day in days])
    assert np.array_equal(clicks, pages["clicks"].to_numpy())
    expected = np.concatenate([day.outcomes.expected_clicks for day in days])
    assert np.array_equal(expected, pages["expected_clicks"].to_numpy(), equal_nan=True)
