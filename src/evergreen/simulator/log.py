"""The simulated log: one Parquet file a day of what the log knows, and beside it what is true.

    out/
      config.json                  the SimulatorConfig: the same one gives the same bytes
      events/2025-01-01.parquet    EVENTS: what the mapping `simulated` reads
      truth/2025-01-01.parquet     TRUTH: for evaluation alone; row n belongs to row n of the day's events
      scenario.json                the Scenario, if one was given

All rows of a slate have one request_id and one timestamp; rows are in the order (timestamp, position).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from evergreen.contracts.artifact import atomic_directory
from evergreen.contracts.errors import EvergreenError, InputError
from evergreen.contracts.snapshot import TIMESTAMP_TYPE
from evergreen.simulator.changing_world import ChangingWorld
from evergreen.simulator.clicks import click_delays
from evergreen.simulator.config import SimulatorConfig
from evergreen.simulator.policy import LoggingPolicy, Slates
from evergreen.simulator.population import COUNTRIES, DEVICES, KINDS, PERSON, Floats, Ints
from evergreen.simulator.scenarios import SCENARIOS, Scenario
from evergreen.simulator.streams import stream
from evergreen.simulator.traffic import Requests, draw_requests, together
from evergreen.simulator.world import Outcomes, World

logger = logging.getLogger(__name__)

CONFIG = "config.json"
SCENARIO = "scenario.json"
EVENTS = pa.schema(
    [
        pa.field("event_timestamp", TIMESTAMP_TYPE, nullable=False),
        pa.field("request_id", pa.string(), nullable=False),
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("category", pa.string(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("clicked", pa.bool_(), nullable=False),
        pa.field("click_timestamp", TIMESTAMP_TYPE),  # null: not clicked
        pa.field("rating", pa.float32()),  # null: not rated
        pa.field("dwell_seconds", pa.float32()),  # null: not clicked
        pa.field("propensity", pa.float32(), nullable=False),
        pa.field("device", pa.string(), nullable=False),
        pa.field("user_segment", pa.string()),  # null: unknown, as are the next three
        pa.field("user_country", pa.string()),
        pa.field("price", pa.float64()),
        pa.field("publisher", pa.string()),
    ]
)
"""Columns of the log."""
TRUTH = pa.schema(
    [
        pa.field("request_id", pa.string(), nullable=False),
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("click_probability", pa.float64(), nullable=False),
        pa.field("relevance", pa.float64(), nullable=False),  # click probability of an item that is examined
        pa.field("is_bot", pa.bool_(), nullable=False),
        pa.field("user_kind", pa.string(), nullable=False),  # one of population.KINDS
    ]
)
"""Columns of the truth."""

_ROWS_PER_GROUP = 262_144
_REQUESTS_PER_BLOCK = 8_192  # bounds memory: a block holds requests x draws x categories


def simulate_log(config: SimulatorConfig, out: Path, *, scenario: Scenario | None = None) -> None:
    """Simulate a log and write it. An earlier simulation in `out` is replaced; the write is whole or absent.

    Args:
        config: of the world.
        out: folder to write.
        scenario: of the world that is to go on from this log; of all that it holds, only a weekend's taste was there
            before.

    Raises:
        InputError: `out` holds something other than an earlier simulation.
    """
    out = Path(out).resolve()
    _check_replaceable(out)
    with atomic_directory(out) as scratch:
        config.write(scratch / CONFIG)
        (scratch / "events").mkdir()
        (scratch / "truth").mkdir()
        world = World(config)
        if scenario is not None:
            scenario.write(scratch / SCENARIO)
            world = ChangingWorld(config, scenario, config.seed, config.num_days, 0)
        policy = LoggingPolicy(config, world.items)
        names = Names(world)
        rows = clicks = 0
        for day in range(config.num_days):
            if day:
                world.advance()
            day_rows, day_clicks = _write_day(world, policy, names, scratch)
            rows, clicks = rows + day_rows, clicks + day_clicks
            if (day + 1) % max(config.num_days // 10, 1) == 0 or day + 1 == config.num_days:
                logger.info("simulated day %d of %d: %d events, %d clicks", day + 1, config.num_days, rows, clicks)


def log_scenario(path: Path) -> Scenario:
    """The scenario that a log was simulated with; `stable` if none was given."""
    file = Path(path) / SCENARIO
    return Scenario.read(file) if file.exists() else SCENARIOS["stable"]


@dataclass(frozen=True)
class Block:
    """A stretch of impressions: the requests, what they were shown and what came of it."""

    requests: Requests
    request_ids: list[str]
    slates: Slates
    outcomes: Outcomes
    click_delays: Floats
    """(n,) seconds; NaN: not clicked."""


def _write_day(world: World, policy: LoggingPolicy, names: Names, out: Path) -> tuple[int, int]:
    """Write the world's current day, and let the policy learn from it; returns rows and clicks."""
    file = f"{world.config.start + timedelta(days=world.day):%Y-%m-%d}.parquet"
    users, items, clicked = [], [], []
    with (
        pq.ParquetWriter(out / "events" / file, EVENTS, compression="zstd") as events,
        pq.ParquetWriter(out / "truth" / file, TRUTH, compression="zstd") as truth,
    ):
        waiting: list[tuple[pa.Table, pa.Table]] = []
        for block in _blocks(world, policy):
            waiting.append((names.events(block), names.truth(block)))
            users.append(block.requests.users[block.slates.requests])
            items.append(block.slates.items)
            clicked.append(block.outcomes.clicked)
            if sum(table.num_rows for table, _ in waiting) >= _ROWS_PER_GROUP:
                _flush(waiting, events, truth)
        _flush(waiting, events, truth)
    all_clicked = np.concatenate(clicked)
    policy.observe(np.concatenate(users), np.concatenate(items), all_clicked)
    return len(all_clicked), int(all_clicked.sum())


def _flush(waiting: list[tuple[pa.Table, pa.Table]], events: pq.ParquetWriter, truth: pq.ParquetWriter) -> None:
    """Write the waiting tables as one row group each, and forget them."""
    if waiting:
        for writer, tables in zip((events, truth), zip(*waiting, strict=True), strict=True):
            table = pa.concat_tables(tables).combine_chunks()
            writer.write_table(table, row_group_size=table.num_rows)
        waiting.clear()


def _blocks(world: World, policy: LoggingPolicy) -> Iterator[Block]:
    """Live through the current day, hour by hour: the policy learns of newly published items on the hour."""
    config, day = world.config, world.day
    day_requests = together(draw_requests(config, world.users, day), world.bots.requests(day))
    rng = stream(config.seed, "slates", day)
    outcome_rng = stream(config.seed, "outcomes", day)
    delay_rng = stream(config.seed, "click delays", day)
    hour, number = np.timedelta64(1, "h"), 0
    for start in world.midnight + np.arange(24) * hour:
        in_hour = day_requests.between(start, start + hour)
        for first in range(0, len(in_hour), _REQUESTS_PER_BLOCK):
            requests = in_hour.rows(slice(first, first + _REQUESTS_PER_BLOCK))
            slates = policy.slates(rng, requests.users, requests.slate_sizes, start, requests.asked_for)
            outcomes = world.respond(
                outcome_rng,
                requests.users[slates.requests],
                slates.items,
                slates.positions,
                requests.times[slates.requests],
                requests.devices[slates.requests],
            )
            request_ids = [f"r{day:04d}-{number + index:07d}" for index in range(len(requests))]
            number += len(requests)
            kinds = world.users.kind[requests.users[slates.requests]]
            yield Block(requests, request_ids, slates, outcomes, click_delays(delay_rng, kinds, outcomes.clicked))


class Names:
    """Turns indexes into the log's columns: every string is made once and taken by index."""

    def __init__(self, world: World) -> None:
        config, users, items = world.config, world.users, world.items
        categories = pa.array([f"category_{index:02d}" for index in range(config.num_categories)])
        publishers = pa.array([f"publisher_{index:02d}" for index in range(config.num_publishers)])
        segments = pa.array([f"segment_{index}" for index in range(config.num_segments)])
        self._devices = pa.array(DEVICES)
        self._by_user = {
            "user_id": pa.array(users.ids.tolist()),
            "user_segment": segments.take(pa.array(users.segment, mask=~users.segment_known)),
            "user_country": pa.array(COUNTRIES).take(pa.array(users.country, mask=~users.country_known)),
        }
        self._by_item = {
            "item_id": pa.array(items.ids.tolist()),
            "category": categories.take(pa.array(items.category)),
            "price": pa.array(items.price, from_pandas=True),
            "publisher": publishers.take(pa.array(items.publisher)),
        }
        self._is_bot = users.kind != PERSON
        self._kind = pa.array(KINDS).take(pa.array(users.kind))

    def events(self, block: Block) -> pa.Table:
        """The block's rows of the log."""
        requests, slates, outcomes = block.requests, block.slates, block.outcomes
        users, times = requests.users[slates.requests], requests.times[slates.requests]
        delays = np.floor(block.click_delays * 1e6)
        click_times = times + np.nan_to_num(delays).astype(np.int64).astype("timedelta64[us]")
        columns: dict[str, Any] = {
            "event_timestamp": pa.array(times).cast(TIMESTAMP_TYPE),
            "request_id": _take(pa.array(block.request_ids), slates.requests),
            "position": _int32(slates.positions),
            "clicked": pa.array(outcomes.clicked),
            "click_timestamp": pa.array(click_times, mask=~outcomes.clicked).cast(TIMESTAMP_TYPE),
            "rating": _float32(outcomes.rating),
            "dwell_seconds": _float32(outcomes.dwell_seconds),
            "propensity": _float32(slates.propensity),
            "device": _take(self._devices, requests.devices[slates.requests]),
            **{name: _take(values, users) for name, values in self._by_user.items()},
            **{name: _take(values, slates.items) for name, values in self._by_item.items()},
        }
        return pa.table([columns[name] for name in EVENTS.names], schema=EVENTS)

    def truth(self, block: Block) -> pa.Table:
        """The block's rows of the truth."""
        slates, outcomes = block.slates, block.outcomes
        users = block.requests.users[slates.requests]
        columns = [
            _take(pa.array(block.request_ids), slates.requests),
            _take(self._by_item["item_id"], slates.items),
            _int32(slates.positions),
            pa.array(outcomes.click_probability),
            pa.array(outcomes.relevance),
            pa.array(self._is_bot[users]),
            _take(self._kind, users),
        ]
        return pa.table(columns, schema=TRUTH)


def _take(values: Any, indexes: Ints) -> Any:
    return values.take(pa.array(indexes))


def _int32(values: Ints) -> Any:
    return pa.array(values.astype(np.int32))


def _float32(values: NDArray[np.float64]) -> Any:
    """Arrow float32, NaN as null."""
    return pa.array(values.astype(np.float32), from_pandas=True)


def _check_replaceable(out: Path) -> None:
    """Raise unless `out` is free, empty, or holds an earlier simulation and nothing else."""
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"{out}: is a file; name a folder to write the simulated log to")
    content = {entry.name for entry in out.iterdir()}
    if not content:
        return
    foreign = sorted(content - {CONFIG, SCENARIO, "events", "truth"})
    if foreign or CONFIG not in content:
        raise InputError(
            f"{out}: not empty, and not an earlier simulated log ({foreign[0] if foreign else CONFIG + ' is missing'}"
            f"{' is not ours' if foreign else ''}); name another folder, or empty this one"
        )
    try:
        SimulatorConfig.read(out / CONFIG)
    except EvergreenError as error:
        raise InputError(
            f"{out}: not empty, and its {CONFIG} is not that of a simulated log ({error}); "
            "name another folder, or empty this one"
        ) from error
