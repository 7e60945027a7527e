"""What may befall a world, by name.

    stable          tastes drift as slowly as they did in the log
    taste-shift     overnight, tastes go round: every segment likes what another one liked
    slow-fade       tastes change six times as fast as before
    new-catalogue   overnight, 40 % as many items as the log had are published, and 30 % as many people come anew
    seasonal        at weekends people like other things; so they did in the log
    bot-attack      crawlers, a click farm and mimics come for some days
    broken-feature  the world is stable; for some days a feature pipeline writes zeros
    logging-outage  the world is stable; for some days most impressions are not logged
    click-outage    the world is stable; for some days most clicks are not logged

Days are those of the world, from 0: its first day is the one after the log's last. What breaks on our own side of the
wire, `break_features` and `lost`, are pure functions: the world itself knows nothing of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from pydantic import Field

from evergreen.contracts.errors import InputError
from evergreen.simulator.config import ExplainedModel
from evergreen.simulator.population import Bools


class Scenario(ExplainedModel):
    """What happens, from when on and for how long. The default: nothing does."""

    name: str
    begins: int = Field(default=5, ge=0)
    """Day on which it begins."""
    lasts: int | None = Field(default=None, ge=1)
    """For how many days; None: for good. A taste shift and a new catalogue happen once, seasons know neither."""

    arrivals: float = Field(default=1.0, ge=0)
    """New items and users a day, in units of how many came on a day of the log; 0: none come."""
    taste_shift: float = Field(default=0.0, ge=0, le=1)
    """Share of the variance of the segments' tastes that is another segment's from `begins` on; the seed says whose."""
    taste_half_life_days: float | None = Field(default=None, gt=0)
    """From `begins` on; None: as in the log."""
    weekend_taste: float = Field(default=0.0, ge=0, le=1)
    """Share of the variance of the segments' tastes that on Saturdays and Sundays is another, the same every week."""
    new_items: float = Field(default=0.0, ge=0)
    """Items that are published within the first hour of `begins`, in units of the log's items."""
    new_users: float = Field(default=0.0, ge=0)
    """People who come for the first time on `begins`, in units of the log's users."""
    attackers: float = Field(default=0.0, ge=0)
    """Bots, in units of the log's users."""
    broken_features: tuple[str, ...] = ()
    """Features that are written as zeros."""
    lost_impressions: float = Field(default=0.0, ge=0, le=1)
    """Share of the requests that are not logged."""
    lost_clicks: float = Field(default=0.0, ge=0, le=1)
    """Share of the clicks that are not logged."""

    def is_on(self, day: int) -> bool:
        """Whether it is happening on a day."""
        return day >= self.begins and (self.lasts is None or day < self.begins + self.lasts)

    def check_goes_on(self, later: Scenario) -> None:
        """Raise InputError unless a log with this scenario may go on with another: its weekends must be the same."""
        if self.weekend_taste != later.weekend_taste:
            raise InputError(
                f"scenario {later.name}: its weekends are not those of a log with scenario {self.name}; "
                f"make the log with `evergreen simulate log --scenario {later.name}`"
            )


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario(name="stable"),
        Scenario(name="taste-shift", taste_shift=1.0),
        Scenario(name="slow-fade", begins=0, taste_half_life_days=5.0),
        Scenario(name="new-catalogue", new_items=0.4, new_users=0.3),
        Scenario(name="seasonal", weekend_taste=0.8),
        Scenario(name="bot-attack", lasts=4, attackers=0.05),
        # What a job over the day's clicks would leave behind that reads no clicks.
        Scenario(
            name="broken-feature",
            lasts=3,
            broken_features=("item_positives_7d", "item_rate_7d", "item_positives_30d", "item_rate_30d"),
        ),
        Scenario(name="logging-outage", lasts=2, lost_impressions=0.6),
        Scenario(name="click-outage", lasts=2, lost_clicks=0.6),
    )
}


def find_scenario(name: str) -> Scenario:
    """The scenario of a name.

    Raises:
        InputError: there is none; lists those that there are.
    """
    if name not in SCENARIOS:
        raise InputError(f"scenario {name!r}: there is none; choose among {', '.join(SCENARIOS)}")
    return SCENARIOS[name]


def break_features(scenario: Scenario, table: pa.Table, day: int) -> pa.Table:
    """A feature table as the broken pipeline writes it on a day: its broken features are zero, unknown values included.

    Args:
        scenario: says which features, and on which days.
        table: (num_rows) of any view; features of other views are not looked for.
        day: of the world.

    Raises:
        InputError: a broken feature is no number.
    """
    if not scenario.is_on(day):
        return table
    for name in set(scenario.broken_features) & set(table.column_names):
        field = table.schema.field(name)
        if not (pa.types.is_integer(field.type) or pa.types.is_floating(field.type)):
            raise InputError(f"scenario {scenario.name}: feature {name} is {field.type}: only numbers can become zeros")
        zeros = pa.nulls(table.num_rows, field.type).fill_null(0)
        table = table.set_column(table.column_names.index(name), field, zeros)
    return table


def lost_requests(scenario: Scenario, day: int, request_ids: Sequence[str] | pa.ChunkedArray) -> Bools:
    """(n,) whether the impressions of these requests are lost. It depends on the id alone, so every log agrees."""
    return _lost(scenario, day, scenario.lost_impressions, "impressions", request_ids)


def lost_clicks(scenario: Scenario, day: int, request_ids: pa.Array, item_ids: pa.Array) -> Bools:
    """(n,) whether clicks on these shown items are lost."""
    keys = pc.binary_join_element_wise(request_ids, item_ids, " ")
    return _lost(scenario, day, scenario.lost_clicks, "clicks", keys)


def _lost(
    scenario: Scenario, day: int, share: float, what: str, keys: Sequence[str] | pa.Array | pa.ChunkedArray
) -> Bools:
    if not (share and scenario.is_on(day)):
        return np.zeros(len(keys), dtype=np.bool_)
    texts = keys.to_pylist() if isinstance(keys, (pa.Array, pa.ChunkedArray)) else keys
    hashes = np.array([xxhash.xxh3_64_intdigest(f"{what} {text}".encode()) for text in texts], dtype=np.uint64)
    lost: Bools = hashes < share * 2.0**64
    return lost
