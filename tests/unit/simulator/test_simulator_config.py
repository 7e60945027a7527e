from __future__ import annotations

from datetime import UTC, datetime

import pytest
from pydantic import ValidationError

from evergreen.contracts.errors import InputError
from evergreen.simulator.config import SimulatorConfig


def test_defaults_are_those_of_the_default_run():
    config = SimulatorConfig()
    assert (config.num_users, config.num_items, config.num_days, config.events_per_day) == (2_000, 500, 30, 10_000)
    assert config.seed == 0 and config.start == datetime(2025, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"num_users": 3}, "num_users=3: input should be greater than or equal to 20"),
        ({"num_days": 0}, "num_days=0: input should be greater than or equal to 1"),
        ({"events_per_day": "many"}, "events_per_day='many'"),
        ({"seed": -1}, "seed=-1"),
        ({"num_user": 100}, "num_user: no such setting; there are num_users"),
        ({"click_rate": float("nan")}, "click_rate=nan"),
        ({"slate_size_min": 9, "slate_size_max": 4}, "slate_size_min=9: must not be above slate_size_max=4"),
        ({"personalised_fraction": 0.9, "exploration_fraction": 0.2}, "together they must be at most 1"),
        ({"start": "2025-01-01T06:00:00Z"}, "must be a midnight in UTC"),
        ({"start": "2025-01-01T00:00:00+02:00"}, "must be a midnight in UTC"),
        ({"start": "9999-12-31T00:00:00Z"}, "must be in the years 1970 to 2200"),
        ({"start": "2025-01-01T00:00:00"}, "timezone"),
    ],
)
def test_value_out_of_range_is_an_error_for_people(values, told):
    with pytest.raises(InputError) as error:
        SimulatorConfig(**values)
    assert told in str(error.value)


def test_all_problems_are_told_at_once():
    with pytest.raises(InputError, match=r"(?s)num_users=3.*num_days=0"):
        SimulatorConfig(num_users=3, num_days=0)


def test_config_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        SimulatorConfig().seed = 1


def test_config_reads_back_as_written(tmp_path):
    config = SimulatorConfig(seed=4, click_rate=0.05)
    config.write(tmp_path / "config.json")
    assert SimulatorConfig.read(tmp_path / "config.json") == config
