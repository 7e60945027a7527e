"""Days of a world that asks for recommendations, and what they leave behind.

    out/
      world.json                    the VisitPlan
      events/2025-01-31.parquet     log.EVENTS: the click log of the day, which the mapping `simulated` reads
      clicks/2025-01-31.parquet     CLICKS that happened on the day, in the order of time, on what the server answered;
                                    of a late one the impression is in the file of the day before
      truth/2025-01-31.parquet      TRUTH of every shown item, logged or not: for evaluation alone
      pages/2025-01-31.parquet      PAGES, a row a request: likewise
      days/2025-01-31.json          DaySummary; it is written last, and a day without it is lived again

A row of the click log has the probability that the shop left the page to the server, or filled it and drew the item.
"""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from evergreen.contracts.artifact import JsonModel
from evergreen.contracts.errors import InputError
from evergreen.contracts.snapshot import TIMESTAMP_TYPE
from evergreen.simulator import log, scenarios
from evergreen.simulator.asking import Recommend, Served, ask_all
from evergreen.simulator.log import EVENTS, Block, Names
from evergreen.simulator.population import PERSON, Bools, Floats
from evergreen.simulator.scenarios import Scenario
from evergreen.simulator.visits import DayOutcomes, DayRequests, VisitPlan, Visits

PLAN = "world.json"
CLICKS = pa.schema(
    [
        *(EVENTS.field(name) for name in ("request_id", "item_id")),
        EVENTS.field("click_timestamp").with_nullable(False),
        *(EVENTS.field(name) for name in ("rating", "dwell_seconds")),
    ]
)
"""Columns of the stream of clicks."""
TRUTH = pa.schema(
    [
        *log.TRUTH,
        pa.field("served", pa.bool_(), nullable=False),  # False: the server does not know the item
        *(EVENTS.field(name) for name in ("clicked", "click_timestamp", "rating", "dwell_seconds")),
    ]
)
"""Columns of the truth."""
PAGES = pa.schema(
    [
        *(EVENTS.field(name) for name in ("request_id", "event_timestamp", "user_id")),
        pa.field("is_bot", pa.bool_(), nullable=False),
        pa.field("model_version", pa.string(), nullable=False),
        pa.field("degraded", pa.bool_(), nullable=False),
        pa.field("explored", pa.bool_(), nullable=False),  # filled by the shop
        pa.field("shown", pa.int32(), nullable=False),  # items
        pa.field("clicks", pa.int32(), nullable=False),
        pa.field("expected_clicks", pa.float64()),  # null: a bot's, or the shop's, as the next two
        pa.field("oracle_clicks", pa.float64()),
        pa.field("random_clicks", pa.float64()),
    ]
)
"""Columns of the pages: what came of a request, and what was to be expected."""

_TABLES = ("events", "clicks", "truth", "pages")
_SUMMARIES = "days"


class DaySummary(JsonModel):
    """One day in figures.

    Rates are clicks for each place of the pages that people asked the server to fill: a server that leaves places empty
    does not look better for it.
    """

    day: int
    """Of the world, from 0."""
    date: date
    requests: int
    measured: int
    """Pages of people that were left to the server; the rates are theirs."""
    click_rate: float
    """What happened; the next three are free of luck."""
    expected_rate: float
    oracle_rate: float
    """Of pages by true relevance, items that a user had before included."""
    random_rate: float
    model_versions: dict[str, int]
    """Requests by the model that answered."""
    degraded: int
    """Requests for which defaults stood for the user's features."""
    empty: int
    """Requests that were answered with nothing."""
    failures: int
    """Failed calls, of those that were tried again until they succeeded."""
    explored: int
    """Pages that the shop filled."""
    unknown_items: int
    """Shown items that the server did not know."""
    late_clicks: int
    """Clicks of the day on pages of the day before."""
    lost_requests: int
    """Requests whose impressions were not logged."""
    lost_clicks: int
    """Clicks that were not logged."""


@dataclass(frozen=True)
class Day:
    """A day as it was lived."""

    asked: DayRequests
    served: list[Served]
    outcomes: DayOutcomes


def live_day(visits: Visits, day: int, recommend: Recommend, *, connections: int = 1) -> Day:
    """Ask for every page of a day, and see what happens. Nothing is written.

    Args:
        visits: the world; it goes to that day.
        day: of the world.
        recommend: answers.
        connections: calls at once; above 1, `recommend` is called by several threads.

    Raises:
        InputError: what was answered cannot be shown, see `Visits.respond`; or the world does not last so long.
        EvergreenError: there is no answer.
    """
    asked = visits.day(day)
    served = ask_all(asked.asks, recommend, connections=connections)
    return Day(asked, served, visits.respond(asked, [answer.item_ids for answer in served]))


def summarize(
    plan: VisitPlan, lived: Day, *, late_clicks: int = 0, lost_requests: int = 0, lost_clicks: int = 0
) -> DaySummary:
    """A day in figures; those that are of what was written are given."""
    outcomes, served, number = lived.outcomes, lived.served, lived.asked.day
    measured = outcomes.measured
    places = max(int(measured.sum()) * plan.k, 1)

    def rate(clicks: Any) -> float:
        return float(clicks[measured].sum() / places)

    return DaySummary(
        day=number,
        date=plan.date(number).date(),
        requests=len(served),
        measured=int(measured.sum()),
        click_rate=rate(outcomes.clicks()),
        expected_rate=rate(outcomes.expected_clicks),
        oracle_rate=rate(outcomes.oracle_clicks),
        random_rate=rate(outcomes.random_clicks),
        model_versions=dict(Counter(answer.model_version for answer in served)),
        degraded=sum(answer.degraded for answer in served),
        empty=sum(not answer.item_ids for answer in served),
        failures=sum(answer.failures for answer in served),
        explored=int(lived.asked.explored.sum()),
        unknown_items=int((~outcomes.served).sum()),
        late_clicks=late_clicks,
        lost_requests=lost_requests,
        lost_clicks=lost_clicks,
    )


def run_day(visits: Visits, day: int, recommend: Recommend, out: Path, *, connections: int = 1) -> DaySummary:
    """Live a day and write what it leaves behind; arguments and errors as for `live_day` and `write_day`."""
    return write_day(visits, live_day(visits, day, recommend, connections=connections), out)


def finished_days(plan: VisitPlan, out: Path) -> int:
    """How many days a folder holds, from the first on; it becomes the plan's if it holds none.

    Raises:
        InputError: it holds something else, or the days of another plan.
    """
    out = Path(out)
    file = out / PLAN
    if not file.exists() and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: holds something else than a world's days; name another folder")
    there = VisitPlan.read(file) if file.exists() else None
    number = _days_of(there, out) if there is not None else 0
    if number == 0:
        for kind in (*_TABLES, _SUMMARIES):  # what a day that was cut short has left
            shutil.rmtree(out / kind, ignore_errors=True)
        out.mkdir(parents=True, exist_ok=True)
        plan.write(file)
    elif there != plan:
        name = next(name for name in VisitPlan.model_fields if getattr(there, name) != getattr(plan, name))
        raise InputError(
            f"{out}: holds the days of another world: {name} is {_shown(getattr(there, name))} there, "
            f"{_shown(getattr(plan, name))} here; name another folder"
        )
    return number


def read_summaries(out: Path) -> list[DaySummary]:
    """The finished days of a world, from the first on."""
    plan = VisitPlan.read(Path(out) / PLAN)
    return [DaySummary.read(_file(Path(out), _SUMMARIES, plan, number)) for number in range(_days_of(plan, Path(out)))]


def write_day(visits: Visits, lived: Day, out: Path) -> DaySummary:
    """Write what a day leaves behind, its summary last. What a killed run left of that day is replaced.

    Args:
        visits: the world, still on that day.
        lived: the day; those before are in `out`.
        out: folder of the world.

    Raises:
        InputError: the folder holds something else, or lacks the day before.
    """
    out, plan, number = Path(out), visits.plan, lived.asked.day
    if finished_days(plan, out) < number:
        raise InputError(f"{out}: day {number - 1} is missing; live the days in their order")
    block = Block(
        lived.asked.requests,
        [ask.request_id for ask in lived.asked.asks],
        lived.outcomes.slates,
        lived.outcomes.outcomes,
        lived.outcomes.click_delays,
    )
    names = Names(visits.world)
    events = names.events(block)
    truth = names.truth(block).append_column(TRUTH.field("served"), pa.array(lived.outcomes.served))
    for field in list(TRUTH)[len(truth.column_names) :]:
        truth = truth.append_column(field, events[field.name])

    start, end = plan.date(number), plan.date(number + 1)
    clicks = _clicks(truth, start, end)
    late = CLICKS.empty_table()
    if number:
        late = _clicks(pq.read_table(_file(out, "truth", plan, number - 1)), start, end)
    clicks = pa.concat_tables([late, clicks]).sort_by("click_timestamp")
    is_lost = scenarios.lost_clicks(plan.scenario, number, clicks["request_id"], clicks["item_id"])
    logged = _logged(plan.scenario, number, events, end)

    pages = _pages(lived, visits.world.users.kind[block.requests.users] != PERSON)
    for kind, table in zip(_TABLES, (logged, clicks.filter(pa.array(~is_lost)), truth, pages), strict=True):
        file = _file(out, kind, plan, number)
        file.parent.mkdir(exist_ok=True)
        pq.write_table(table, _partial(file), compression="zstd")
        _partial(file).replace(file)
    summary = summarize(
        plan,
        lived,
        late_clicks=late.num_rows,
        lost_requests=int(scenarios.lost_requests(plan.scenario, number, block.request_ids).sum()),
        lost_clicks=int(is_lost.sum()),
    )
    file = _file(out, _SUMMARIES, plan, number)
    file.parent.mkdir(exist_ok=True)
    summary.write(_partial(file))
    _partial(file).replace(file)
    return summary


def _clicks(truth: pa.Table, start: datetime, end: datetime) -> pa.Table:
    """Clicks of a time on what the server answered."""
    moments = [pa.scalar(moment, TIMESTAMP_TYPE) for moment in (start, end)]
    happened = (pc.field("click_timestamp") >= moments[0]) & (pc.field("click_timestamp") < moments[1])
    return truth.filter(happened & pc.field("served")).select(CLICKS.names).cast(CLICKS)


def _logged(scenario: Scenario, day: int, events: pa.Table, end: datetime) -> pa.Table:
    """What is logged of a day's events."""
    lost: Bools = scenarios.lost_clicks(scenario, day, events["request_id"], events["item_id"])
    lost_later: Bools = scenarios.lost_clicks(scenario, day + 1, events["request_id"], events["item_id"])
    if lost.any() or lost_later.any():
        comes_later = pc.greater_equal(events["click_timestamp"], pa.scalar(end, TIMESTAMP_TYPE)).fill_null(False)
        is_lost = pa.array(np.where(comes_later.to_numpy(), lost_later, lost))
        for name in ("click_timestamp", "rating", "dwell_seconds"):
            events = _with(events, name, pc.if_else(is_lost, None, events[name]))
        events = _with(events, "clicked", pc.and_not(events["clicked"], is_lost))
    return events.filter(pa.array(~scenarios.lost_requests(scenario, day, events["request_id"])))


def _with(table: pa.Table, name: str, column: Any) -> pa.Table:
    return table.set_column(table.column_names.index(name), table.schema.field(name), column)


def _pages(lived: Day, is_bot: Bools) -> pa.Table:
    served, outcomes = lived.served, lived.outcomes
    asks = lived.asked.asks
    columns = {
        "request_id": [ask.request_id for ask in asks],
        "event_timestamp": [ask.event_timestamp for ask in asks],
        "user_id": [ask.user_id for ask in asks],
        "is_bot": is_bot,
        "model_version": [answer.model_version for answer in served],
        "degraded": [answer.degraded for answer in served],
        "explored": lived.asked.explored,
        "shown": np.bincount(outcomes.slates.requests, minlength=len(asks)),
        "clicks": outcomes.clicks(),
        **{name: _known(getattr(outcomes, name)) for name in ("expected_clicks", "oracle_clicks", "random_clicks")},
    }
    return pa.table([pa.array(columns[field.name], field.type) for field in PAGES], schema=PAGES)


def _known(values: Floats) -> pa.Array:
    return pa.array(values, from_pandas=True)  # NaN as null


def _days_of(plan: VisitPlan, out: Path) -> int:
    number = 0
    while _file(out, _SUMMARIES, plan, number).exists():
        number += 1
    return number


def _file(out: Path, kind: str, plan: VisitPlan, number: int) -> Path:
    return out / kind / f"{plan.date(number):%Y-%m-%d}.{'json' if kind == _SUMMARIES else 'parquet'}"


def _partial(file: Path) -> Path:
    return file.with_name(f".{file.name}.partial")


def _shown(value: Any) -> Any:
    """A value for people: of a whole model its JSON."""
    return value.model_dump_json(exclude_defaults=True) if isinstance(value, JsonModel) else value
