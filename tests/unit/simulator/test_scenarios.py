"""Scenarios by name, and what breaks on our own side of the wire."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from evergreen.contracts.errors import InputError
from evergreen.contracts.feature_tables import WINDOWS_HOURS
from evergreen.simulator.scenarios import (
    SCENARIOS,
    Scenario,
    break_features,
    find_scenario,
    lost_clicks,
    lost_requests,
)

BROKEN = SCENARIOS["broken-feature"]


def test_every_scenario_of_the_stage_is_there():
    asked_for = "stable taste-shift slow-fade new-catalogue seasonal bot-attack broken-feature logging-outage"
    assert set(asked_for.split()) <= set(SCENARIOS)
    assert all(find_scenario(name).name == name for name in SCENARIOS)


def test_unknown_scenario_is_named_and_all_are_listed():
    with pytest.raises(InputError, match=r"scenario 'earthquake': there is none; choose among stable, taste-shift, "):
        find_scenario("earthquake")


def test_a_scenario_is_on_for_as_long_as_it_lasts():
    scenario = Scenario(name="some", begins=3, lasts=2)
    assert [day for day in range(8) if scenario.is_on(day)] == [3, 4]
    assert [day for day in range(8) if Scenario(name="some", begins=6).is_on(day)] == [6, 7]


@pytest.mark.parametrize("values", [{"begins": -1}, {"lost_clicks": 1.5}, {"taste_half_life_days": 0}, {"lasts": 0}])
def test_value_out_of_range_is_named(values: dict):
    with pytest.raises(InputError, match=next(iter(values))):
        Scenario(name="bad", **values)


def test_broken_features_exist_and_become_zeros_on_their_days_and_no_other_does():
    assert {name.rsplit("_", 1)[1] for name in BROKEN.broken_features} <= set(WINDOWS_HOURS)
    table = pa.table(
        {
            "item_id": ["a", "b"],
            "item_rate_7d": pa.array([0.5, None]),
            "item_positives_7d": pa.array([3, 4]),
            "item_rate_1d": pa.array([0.25, 0.5]),
        }
    )
    for day, is_broken in ((BROKEN.begins - 1, False), (BROKEN.begins, True), (BROKEN.begins + BROKEN.lasts, False)):
        written = break_features(BROKEN, table, day)
        assert written.schema == table.schema
        assert written["item_rate_1d"] == table["item_rate_1d"] and written["item_id"] == table["item_id"]
        if is_broken:
            assert written["item_rate_7d"].to_pylist() == [0.0, 0.0]
            assert written["item_positives_7d"].to_pylist() == [0, 0]
        else:
            assert written.equals(table)


def test_a_feature_that_is_no_number_cannot_become_zeros():
    scenario = Scenario(name="bad", begins=0, broken_features=("publisher",))
    with pytest.raises(InputError, match="feature publisher is string: only numbers"):
        break_features(scenario, pa.table({"publisher": ["p"]}), 0)


def test_lost_requests_are_the_stated_share_and_the_same_in_every_log():
    scenario = SCENARIOS["logging-outage"]
    ids = [f"w0-d35-{number}" for number in range(10_000)]
    lost = lost_requests(scenario, scenario.begins, ids)
    assert lost.mean() == pytest.approx(scenario.lost_impressions, abs=0.02)
    backwards = lost_requests(scenario, scenario.begins, pa.chunked_array([pa.array(ids[::-1])]))
    assert np.array_equal(lost, backwards[::-1])
    assert not lost_requests(scenario, scenario.begins - 1, ids).any()


def test_clicks_are_lost_one_by_one():
    scenario = SCENARIOS["click-outage"]
    requests, items = pa.array(["w0-d35-1"] * 5_000), pa.array([f"i{number}" for number in range(5_000)])
    lost = lost_clicks(scenario, scenario.begins, requests, items)
    assert lost.mean() == pytest.approx(scenario.lost_clicks, abs=0.03)
    assert not lost_requests(scenario, scenario.begins, requests).any()


def test_a_log_goes_on_only_with_the_weekends_it_had():
    SCENARIOS["stable"].check_goes_on(SCENARIOS["taste-shift"])
    with pytest.raises(InputError, match="make the log with `evergreen simulate log --scenario seasonal`"):
        SCENARIOS["stable"].check_goes_on(SCENARIOS["seasonal"])
