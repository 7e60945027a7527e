"""Alarms on click-rate series: what is found, how often they are false, and that they never look ahead."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from evergreen.contracts.errors import InputError
from evergreen.contracts.mapping import Mapping
from evergreen.ingest.log import ingest_log
from evergreen.monitoring.alarms import AlarmConfig, click_rates, find_alarms
from evergreen.simulator.config import SimulatorConfig
from evergreen.simulator.log import simulate_log

HOUR = 3_600
NAB = Path(__file__).resolve().parents[4] / "shared" / "data" / "nab"
Series = tuple[np.ndarray, np.ndarray]


def quiet(seed: int = 0, weeks: int = 10) -> Series:
    """Hourly click rates with a day, a weekend, drift and noise that depends on the hour before."""
    rng = np.random.default_rng(seed)
    hours = np.arange(weeks * 168)
    noise = 0.1 * rng.standard_t(5, len(hours))
    for i in range(1, len(noise)):
        noise[i] += 0.5 * noise[i - 1]
    season = 0.4 * np.sin(2 * np.pi * hours / 24) + 0.15 * (hours // 24 % 7 >= 5)
    return hours * HOUR, 0.02 * np.exp(season + np.cumsum(rng.normal(0, 0.004, len(hours))) + noise)


def test_false_alarms_are_no_more_than_promised_on_series_in_which_nothing_happens() -> None:
    alarms = weeks = 0.0
    for seed in range(4):
        judgement = find_alarms(*quiet(seed, weeks=16), AlarmConfig(max_false_alarms_per_week=1))
        alarms += len(judgement.alarms)
        weeks += np.isfinite(judgement.thresholds).sum() / 168
    assert 0.4 * weeks < alarms < 1.1 * weeks


@pytest.mark.parametrize("factor", [0.25, 3.0], ids=["drop", "jump"])
def test_a_sudden_change_is_found_at_once(factor: float) -> None:
    seconds, rates = quiet()
    rates[1_400:1_404] *= factor
    judgement = find_alarms(seconds, rates)
    assert judgement.above[1_400]
    found = [alarm for alarm in judgement.alarms if alarm.start == datetime.fromtimestamp(1_400 * HOUR, tz=UTC)]
    assert len(found) == 1 and found[0].score > found[0].threshold
    assert found[0].value / found[0].expected == pytest.approx(factor, rel=0.5)


def test_high_noon_is_no_alarm_but_the_same_rate_at_night_is() -> None:
    seconds, rates = quiet()
    noon, night = 1_398, 1_410  # crest and trough of the day
    assert rates[noon] > 1.6 * rates[night]
    assert not find_alarms(seconds, rates).above[noon]
    rates[night] = 1.2 * rates[noon]
    assert find_alarms(seconds, rates).above[night]


def test_nothing_looks_ahead() -> None:
    seconds, rates = quiet()
    whole, part = find_alarms(seconds, rates), find_alarms(seconds[:1_000], rates[:1_000])
    for name in ("expected", "scores", "thresholds"):
        assert np.array_equal(getattr(whole, name)[:1_000], getattr(part, name), equal_nan=True)


def test_scores_close_together_are_one_alarm() -> None:
    seconds, rates = quiet()
    rates[[1_400, 1_403, 1_410]] *= 5
    alarms = [alarm for alarm in find_alarms(seconds, rates).alarms if alarm.end.timestamp() >= 1_400 * HOUR]
    assert (alarms[0].start.timestamp(), alarms[0].end.timestamp()) == (1_400 * HOUR, 1_410 * HOUR)


def test_gaps_in_a_series_are_bridged() -> None:
    seconds, rates = quiet()
    there = np.ones(len(rates), dtype=bool)
    there[900:950] = there[1_200:1_203] = False
    rates[1_500] *= 5
    judgement = find_alarms(seconds[there], rates[there])
    assert judgement.above[np.flatnonzero(seconds[there] == 1_500 * HOUR)[0]]


def test_a_young_series_raises_no_alarm() -> None:
    seconds, rates = quiet(weeks=1)
    rates[-1] *= 100
    assert find_alarms(seconds, rates).alarms == ()
    assert find_alarms(seconds[:0], rates[:0]).alarms == ()


def test_a_series_that_stands_still_raises_no_alarm() -> None:
    seconds, _ = quiet()
    assert find_alarms(seconds, np.full(len(seconds), 0.02)).alarms == ()


def test_value_or_time_that_cannot_be_is_named() -> None:
    seconds, rates = quiet()
    with pytest.raises(InputError, match=r"value 0\.0 at 1970-01-01 05:00:00\+00:00: must be positive"):
        find_alarms(seconds, np.where(np.arange(len(rates)) == 5, 0.0, rates))
    with pytest.raises(InputError, match=r"1970-03-11 22:00:00\+00:00 comes after 1970-03-11 23:00:00\+00:00: sort"):
        find_alarms(seconds[::-1], rates)


def test_click_rates_count_every_impression_of_a_log(tmp_path: Path) -> None:
    simulate_log(SimulatorConfig(num_users=200, num_days=3, events_per_day=2_000), tmp_path / "log")
    snapshot = ingest_log(Mapping.load("simulated"), str(tmp_path / "log"), tmp_path / "snapshot")
    rates = click_rates(snapshot)
    assert rates.impressions.sum() == 6_000 and rates.clicks.sum() == snapshot.manifest.num_positives
    assert (np.diff(rates.seconds) >= HOUR).all() and (rates.seconds % HOUR == 0).all()
    assert rates.seconds[0] == snapshot.manifest.first_event.timestamp() // HOUR * HOUR
    assert ((rates.rates > 0) & (rates.rates < 1)).all()


def test_log_without_impressions_has_no_click_rate(tmp_path: Path) -> None:
    mapping = """
name = "reads"
kind = "interactions"
[timestamp]
column = "at"
unit = "s"
[columns]
user_id = "user"
item_id = "item"
"""
    (tmp_path / "log.csv").write_text("at,user,item\n1700000000,u,i\n1700000001,v,i\n")
    snapshot = ingest_log(Mapping.load(mapping), str(tmp_path / "log.csv"), tmp_path / "snapshot")
    with pytest.raises(InputError, match="a log of interactions has no click rate"):
        click_rates(snapshot)


@pytest.fixture(scope="module")
def compare_with_labels() -> Callable[[Path, str, AlarmConfig], tuple[int, int, int, float]]:
    """The comparison of the benchmark: found, judged, false alarms, weeks."""
    import importlib.util
    import json
    import sys

    path = Path(__file__).resolve().parents[3] / "benchmarks" / "alarms.py"
    spec = importlib.util.spec_from_file_location("benchmarks_alarms", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)

    def compare(folder: Path, name: str, config: AlarmConfig) -> tuple[int, int, int, float]:
        labels = {
            kind: json.loads((folder / "labels" / f"combined_{kind}.json").read_text())[name]
            for kind in ("windows", "labels")
        }
        times, values = module.read_series(folder / "data" / name)
        result = module.compare(times, find_alarms(times, values, config), labels["windows"], labels["labels"])
        return result.found, result.judged, result.false_alarms, result.weeks

    return compare


@pytest.mark.skipif(not NAB.is_dir(), reason=f"{NAB} is not here")
def test_labelled_anomalies_of_the_ad_exchange_are_found_within_the_promise(compare_with_labels) -> None:
    names = [f"realAdExchange/{file.name}" for file in sorted((NAB / "data" / "realAdExchange").glob("*.csv"))]
    results = [compare_with_labels(NAB, name, AlarmConfig()) for name in names]
    found, judged, false_alarms, weeks = (sum(column) for column in zip(*results, strict=True))
    assert found >= 0.7 * judged
    assert false_alarms <= AlarmConfig().max_false_alarms_per_week * weeks
