"""Reading a request's user from Redis: Evergreen's reader, Feast's, other ways over the wire, and the least there is.

    python -m benchmarks.online_read [--rounds 9] [--items 100000] [--out benchmarks/online_read.md]

A user of `ranker_v1` and 20 categories, out of 2,000 users with a row of each, on a Redis of its own. Feast's way is
`get_online_features(...).to_dict()`. The other ways send the reader's own commands and decode as it does: redis-py's
asyncio pipeline, its `Connection` through its public methods alone, and a bare asyncio protocol over hiredis. The least
is a GET of the same values packed by hand into one string, for which somebody would have to write a second store. All
are held to the same values first, then take turns; the median of the rounds counts. Then the items, all of them, while
an event loop beside it wants to wake every two milliseconds. Needs redis-server.
"""

from __future__ import annotations

import argparse
import asyncio
import platform
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import hiredis
import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import redis
import uvloop
import yaml

from evergreen.contracts.feature_tables import JOIN_KEYS, FeatureTables, FeatureTablesManifest
from evergreen.contracts.mapping import Mapping
from evergreen.features.online_reader import OnlineReader, open_reader
from evergreen.features.online_user import OnlineUser
from evergreen.features.redis_reader import RedisReader, _Asked
from evergreen.features.schema import feature_table_schemas
from evergreen.features.store import CONFIG, FeatureStore
from tests.servers import RedisServer, redis_server

SERVICE = "ranker_v1"
AT = datetime(2026, 1, 31, tzinfo=UTC)
USERS, CATEGORIES = 2000, 20
READS = 400
LOG = Mapping.model_validate(
    {
        "name": "log",
        "kind": "interactions",
        "timestamp": {"column": "t"},
        "columns": {"user_id": "u", "item_id": "i", "category": "c"},
        "user_features": {"segment": "categorical", "country": "categorical"},
        "item_features": {"price": "numeric", "tags": "multi"},
    }
)


def random_rows(schema: pa.Schema, keys: dict[str, list[str]]) -> pa.Table:
    """A row for each key: counts that are mostly small, rates, names, up to 50 items of a user or 5 tags of an item."""
    rng = np.random.default_rng(0)
    num_rows = len(next(iter(keys.values())))
    columns: list[Any] = []
    for field in schema:
        if field.name in keys:
            column = keys[field.name]
        elif pa.types.is_int64(field.type):
            column = rng.geometric(0.05, num_rows)
        elif pa.types.is_float64(field.type):
            column = rng.random(num_rows)
        elif pa.types.is_timestamp(field.type):
            column = rng.integers(10**15, int(AT.timestamp() * 1e6), num_rows)
        elif pa.types.is_list(field.type):
            longest = 5 if field.name == "tags" else 50
            sizes = rng.integers(0, longest + 1, num_rows)
            column = [[f"item{n}" for n in rng.integers(0, 10**5, size)] for size in sizes]
        else:
            column = [f"name{n}" for n in rng.integers(0, 40, num_rows)]
        columns.append(pa.array(column, field.type))
    return pa.Table.from_arrays(columns, schema=schema)


def filled_store(folder: Path, address: str, num_items: int) -> FeatureStore:
    """A feature store with rows in Redis alone; its tables are empty."""
    (folder / "tables").mkdir()
    schemas = feature_table_schemas(LOG)
    for name, schema in schemas.items():
        pq.write_table(schema.empty_table(), folder / "tables" / f"{name}.parquet")
    rows = dict.fromkeys(schemas, 0)
    manifest = FeatureTablesManifest(snapshot_id="none", mapping=LOG, as_of=AT, first_event=AT, rows=rows)
    manifest.write(folder / "tables" / FeatureTables.MANIFEST)
    store = FeatureStore.create(folder / "store", FeatureTables.load(folder / "tables"))
    config = yaml.safe_load((store.path / CONFIG).read_text())
    kind = "evergreen.features.redis_online_store.GuardedRedisOnlineStore"
    config["online_store"] = {"type": kind, "connection_string": address}
    (store.path / CONFIG).write_text(yaml.safe_dump(config))
    store = FeatureStore.open(store.path)
    keys = {
        ("user_id",): {"user_id": users()},
        ("item_id",): {"item_id": [f"item{n}" for n in range(num_items)]},
        ("user_id", "category"): {
            "user_id": [user for user in users() for _ in categories()],
            "category": categories() * USERS,
        },
    }
    online = store._store._get_provider().online_store
    for name, schema in schemas.items():
        view = store._store.get_feature_view(name)
        online.write_table(store._store.config, view, random_rows(schema, keys[JOIN_KEYS[name]]))
    return store


def users() -> list[str]:
    return [f"user{n:06}" for n in range(USERS)]


def categories() -> list[str]:
    return [f"category_{n:02}" for n in range(CATEGORIES)]


class PipelineReader(RedisReader):
    """As the documentation of redis-py has it."""

    async def _ask(self, keys: _Asked) -> list[Any]:
        client = await self._store._get_client_async(self._online)
        async with client.pipeline(transaction=False) as pipe:
            for hashes, key in keys:
                pipe.hmget(key, hashes.fields)
            return list(await pipe.execute())


class ConnectionReader(RedisReader):
    """One connection of redis-py's, by its public methods."""

    _connection: Any = None

    async def _ask(self, keys: _Asked) -> list[Any]:
        if self._connection is None:
            client = await self._store._get_client_async(self._online)
            self._connection = client.connection_pool.make_connection()
            self._connection.socket_timeout = None
            await self._connection.connect()
        await self._connection.send_packed_command(b"".join([hashes.command(key) for hashes, key in keys]))
        return [await self._connection.read_response(disable_decoding=True) for _ in keys]


class Wire(asyncio.Protocol):
    """The least that talks to Redis: no password, no TLS, no second connection, one question at a time."""

    def __init__(self) -> None:
        self._reader = hiredis.Reader(notEnoughData=Ellipsis)
        self._replies: list[Any] = []

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        while (reply := self._reader.gets(False)) is not Ellipsis:
            self._replies.append(reply)
        if len(self._replies) == self._num_replies:
            self._done.set_result(self._replies)

    async def ask(self, commands: bytes, num_replies: int) -> list[Any]:
        self._replies, self._num_replies = [], num_replies
        self._done: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self._transport.write(commands)
        return await self._done


class WireReader(RedisReader):
    """The reader over `Wire`."""

    _wire: Wire | None = None

    async def _ask(self, keys: _Asked) -> list[Any]:
        if self._wire is None:
            host, port = self._online.connection_string.split(",")[0].split(":")
            _, self._wire = await asyncio.get_running_loop().create_connection(Wire, host, int(port))
        return await self._wire.ask(b"".join([hashes.command(key) for hashes, key in keys]), len(keys))


def packed(address: str, asked: list[OnlineUser], names: list[str]) -> Callable[[str], Awaitable[OnlineUser]]:
    """Users under one key each, and how to read one."""
    client = redis.Redis.from_url(f"redis://{address}")
    for name, user in zip(names, asked, strict=True):
        rest = orjson.dumps([user.values, user.updated_at])
        client.set(f"packed:{name}", user.by_category.tobytes() + rest)
    shape = asked[0].by_category.shape
    size = shape[0] * shape[1]
    wire: Wire | None = None

    async def read(name: str) -> OnlineUser:
        nonlocal wire
        if wire is None:
            host, port = address.split(":")
            _, wire = await asyncio.get_running_loop().create_connection(Wire, host, int(port))
        key = f"packed:{name}".encode()
        (value,) = await wire.ask(b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(key), key), 1)
        values, updated_at = orjson.loads(value[8 * size :])
        return OnlineUser(values, np.frombuffer(value, np.float64, size).reshape(shape), updated_at)

    return read


def by_feast(store: FeatureStore, reader: OnlineReader) -> Callable[[str], dict[str, list[Any]]]:
    """Feast's answer for one user and all categories."""
    views = store._projections(SERVICE)
    wanted = [view for view in views if "item_id" not in JOIN_KEYS.get(view, ("item_id",))]
    references = [f"{view}:{name}" for view in wanted for name in views[view]]

    def read(name: str) -> dict[str, list[Any]]:
        rows = {"user_id": [name] * CATEGORIES, "category": categories()}
        answer: dict[str, list[Any]] = store._store.get_online_features(references, rows).to_dict()
        return answer

    return read


def cpu_micros(server: RedisServer, read: Callable[[], int]) -> tuple[float, float]:
    """Microseconds of CPU a read, of this process and of the server."""
    of_server, started = server.cpu_seconds, time.process_time()
    num_reads = read()
    spent = time.process_time() - started
    return 1e6 * spent / num_reads, 1e6 * (server.cpu_seconds - of_server) / num_reads


def measure_reads(store: FeatureStore, server: RedisServer, rounds: int) -> list[str]:
    """Lines of the first table."""
    kinds = {
        "redis-py's pipeline": PipelineReader,
        "redis-py's `Connection`, public methods": ConnectionReader,
        "an asyncio protocol of our own": WireReader,
    }
    readers: dict[str, OnlineReader] = {"Evergreen": open_reader(store, SERVICE, deadline_seconds=10.0)}
    readers |= {name: kind(store, SERVICE, deadline_seconds=10.0) for name, kind in kinds.items()}
    names = users()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        ask = [(name, categories()) for name in names]
        found = {name: runner.run(reader.read(ask[:READS])) for name, reader in readers.items()}
        expected = found["Evergreen"]
        read_packed = packed(server.address, expected, names[:READS])
        feast_read = by_feast(store, readers["Evergreen"])
        answers = [feast_read(name) for name in names[:20]]
        check(found, [runner.run(read_packed(name)) for name in names[:READS]], answers, readers["Evergreen"])

        def one_by_one(read: Callable[[str], Awaitable[Any]]) -> Callable[[], int]:
            async def run() -> int:
                for name in names[:READS]:
                    await read(name)
                return READS

            return lambda: runner.run(run())

        def reading(reader: OnlineReader) -> Callable[[], int]:
            return one_by_one(lambda name: reader.read([(name, categories())]))

        def feast() -> int:
            for name in names[:20]:
                feast_read(name)
            return 20

        ways = {name: reading(reader) for name, reader in readers.items()}
        ways |= {"packed by hand, one GET": one_by_one(read_packed), "Feast": feast}
        spent: dict[str, list[tuple[float, float]]] = {}
        for _ in range(rounds):
            for name, way in ways.items():
                spent.setdefault(name, []).append(cpu_micros(server, way))
        for reader in readers.values():
            runner.run(reader.close())
    own = {name: statistics.median(of_process for of_process, _ in all_rounds) for name, all_rounds in spent.items()}
    served = {name: statistics.median(of_server for _, of_server in all_rounds) for name, all_rounds in spent.items()}
    least = own["packed by hand, one GET"]
    return [
        f"| {name} | {micros:,.0f} | {micros / least:.1f} | {own['Feast'] / micros:.1f} | {served[name]:,.0f} |"
        for name, micros in sorted(own.items(), key=lambda one: one[1])
    ]


def check(
    found: dict[str, list[OnlineUser]],
    of_packed: list[OnlineUser],
    of_feast: list[dict[str, list[Any]]],
    reader: OnlineReader,
) -> None:
    """All ways give the same values.

    Raises:
        AssertionError: one does not.
    """
    expected = found["Evergreen"]
    for other in (*found.values(), of_packed):
        for one, two in zip(expected, other, strict=True):
            assert one.values == two.values
            assert one.updated_at == two.updated_at
            np.testing.assert_array_equal(one.by_category, two.by_category)
    for user, answer in zip(expected, of_feast, strict=False):
        for name in reader.user_features:
            value = answer[name][0]
            assert user.values[name] == (int(value.timestamp()) if isinstance(value, datetime) else value), name
        matrix = np.array([answer[name] for name in reader.pair_features], dtype=np.float64).T
        np.testing.assert_array_equal(user.by_category, matrix)


async def wakes(until: asyncio.Future[Any]) -> list[float]:
    """How many seconds late a loop that wants to wake every two milliseconds does."""
    late = []
    while not until.done():
        due = time.perf_counter() + 0.002
        await asyncio.sleep(0.002)
        late.append(time.perf_counter() - due)
    return late


def measure_items(store: FeatureStore, num_items: int) -> list[str]:
    """Lines of the second table."""
    reader = open_reader(store, SERVICE, deadline_seconds=10.0)
    ids = [f"item{n}" for n in range(num_items)]
    some = pa.table({"item_id": ids[:2000]})
    started = time.process_time()
    expected = store.online(SERVICE, some)
    of_feast = (time.process_time() - started) / some.num_rows
    started = time.process_time()
    items = reader.read_items(ids)
    alone = time.process_time() - started
    assert items.slice(0, some.num_rows).equals(expected.select(items.column_names))

    async def beside(work: Callable[[], object]) -> list[float]:
        return await wakes(asyncio.ensure_future(asyncio.to_thread(work)))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        quiet = runner.run(beside(lambda: time.sleep(2)))
        late = runner.run(beside(lambda: reader.read_items(ids)))
        runner.run(reader.close())
    return [
        f"{num_items:,} items of {items.num_columns - 1} features: {alone:.1f} CPU s; Feast would take "
        f"{of_feast * num_items:,.0f} ({of_feast * num_items / alone:.0f} times as many, from 2,000 items).",
        "",
        "| an event loop that wants to wake every 2 ms is late by, ms | p50 | p99 | most |",
        "|---|---:|---:|---:|",
        *(
            f"| {name} | {1e3 * np.quantile(seconds, 0.5):.2f} | {1e3 * np.quantile(seconds, 0.99):.2f} "
            f"| {1e3 * max(seconds):.1f} |"
            for name, seconds in (("alone", quiet), ("while another thread reads the items", late))
        ),
    ]


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    with redis_server() as server, tempfile.TemporaryDirectory() as folder:
        store = filled_store(Path(folder), server.address, options.items)
        reads = measure_reads(store, server, options.rounds)
        items = measure_items(store, options.items)
    lines = [
        f"# Reading from Redis, {platform.machine()}, Python {platform.python_version()}, one thread, uvloop",
        "",
        f"A user and {CATEGORIES} categories; all ways give the same values.",
        "",
        "| | CPU µs a read | to the least | Feast to it | Redis's own CPU µs |",
        "|---|---:|---:|---:|---:|",
        *reads,
        "",
        *items,
    ]
    options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
