"""The reader against Feast, value for value, and against stores that are slow, broken, or gone."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import redis
import uvloop
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evergreen.contracts.feature_tables import JOIN_KEYS, FeatureTables
from evergreen.features import redis_reader
from evergreen.features.online_reader import (
    OnlineReader,
    OnlineReadError,
    OnlineUser,
    ReadFailure,
    open_reader,
)
from evergreen.features.store import CONFIG, FeatureStore
from evergreen.serving.users import UserFeatures
from tests.integration.test_feature_store import NOW, RICH, write_tables
from tests.servers import RedisServer, free_port, redis_server

USERS = [*(f"u{n}" for n in range(44)), "", "ü" * 400]
CATEGORIES = [*(f"c{n}" for n in range(5)), "", "né"]
MICROS = pa.timestamp("us", tz="UTC")
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=200)


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> FeatureTables:
    return write_tables(tmp_path_factory.mktemp("features") / "tables", RICH)


@pytest.fixture(scope="module")
def materialized(tables: FeatureTables, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    store = FeatureStore.create(tmp_path_factory.mktemp("features") / "store", tables)
    store.materialize(NOW)
    return store


@pytest.fixture(scope="module", params=["sqlite", "redis"])
def store(
    request: pytest.FixtureRequest, materialized: FeatureStore, tmp_path_factory: pytest.TempPathFactory
) -> FeatureStore:
    if request.param == "sqlite":
        return copied(materialized, tmp_path_factory.mktemp("features") / "copy")
    return on_redis(
        materialized, tmp_path_factory.mktemp("features") / "copy", request.getfixturevalue("server").address
    )


@pytest.fixture(scope="module")
def on_the_server(
    materialized: FeatureStore, server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> FeatureStore:
    """A store with its rows in `server`."""
    return on_redis(materialized, tmp_path_factory.mktemp("features") / "copy", server.address)


def copied(store: FeatureStore, folder: Path, **online_store: Any) -> FeatureStore:
    shutil.copytree(store.path, folder)
    config = yaml.safe_load((folder / CONFIG).read_text())
    config["online_store"] |= online_store
    if "connection_string" in online_store:
        config["online_store"].pop("path", None)
    (folder / CONFIG).write_text(yaml.safe_dump(config))
    return FeatureStore.open(folder)


def on_redis(store: FeatureStore, folder: Path, address: str, **options: Any) -> FeatureStore:
    """A copy of a store with its rows in a Redis."""
    kind = "evergreen.features.redis_online_store.GuardedRedisOnlineStore"
    copy = copied(store, folder, type=kind, connection_string=address, retry_seconds=5, **options)
    copy.materialize(NOW, full=True)
    return copy


def reading(
    store: FeatureStore,
    use: Callable[[OnlineReader], Awaitable[Any]],
    *,
    service: str = "ranker_v1",
    deadline_seconds: float = 5.0,
) -> Any:
    """What is done with a reader in an event loop of its own; the reader is closed after it."""

    async def run() -> Any:
        reader = open_reader(store, service, deadline_seconds=deadline_seconds)
        try:
            return await use(reader)
        finally:
            await reader.close()

    return uvloop.run(run())


def assert_equals_feast(
    store: FeatureStore, users: Sequence[str], categories: Sequence[str], *, service: str = "ranker_v1"
) -> list[OnlineUser]:
    """Every value of some users is what Feast's own client reads."""

    async def read(reader: OnlineReader) -> Any:
        return reader, await reader.read([(user, categories) for user in users])

    reader, found = reading(store, read, service=service)
    online = store.online(service, pa.table({"user_id": list(users)}))
    assert reader.user_features == tuple(online.column_names[1:])
    for name in reader.user_features:
        assert [user.values[name] for user in found] == plain(online[name]), name
    if reader.pair_features and categories:
        keys = {"user_id": [user for user in users for _ in categories], "category": [*categories] * len(users)}
        online = store.online(service, pa.table(keys))
        matrix = np.vstack([user.by_category for user in found])
        for column, name in enumerate(reader.pair_features):
            np.testing.assert_array_equal(matrix[:, column], online[name].cast(pa.float64()).to_numpy(), name)
    return found


def plain(column: pa.ChunkedArray) -> list[Any]:
    """Python's values, of timestamps whole Unix seconds."""
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp("s", tz="UTC")).cast(pa.int64())
    return column.to_pylist()


@pytest.mark.parametrize("service", ["ranker_v1", "retrieval_v1", "recent_v1"])
def test_users_are_as_feast_reads_them(store: FeatureStore, service: str) -> None:
    found = assert_equals_feast(store, USERS, CATEGORIES, service=service)
    unknown = [user for user, name in zip(found, USERS, strict=True) if user.updated_at is None]
    assert 0 < len(unknown) < len(USERS)
    assert all(set(user.values.values()) <= {None} for user in unknown)
    assert any(np.isnan(user.by_category).all(axis=1).any() for user in found) or service != "ranker_v1"


def test_update_time_is_that_of_the_newest_row_of_the_user_views(store: FeatureStore, tables: FeatureTables) -> None:
    newest: dict[str, float] = {}
    for name in ("user_activity", "user_profile"):
        rows = pa.parquet.read_table(tables.table(name), filters=pc.field("event_timestamp") <= NOW)
        for user, at in zip(rows["user_id"].to_pylist(), rows["event_timestamp"].to_pylist(), strict=True):
            newest[user] = max(newest.get(user, 0.0), at.timestamp())

    async def read(reader: OnlineReader) -> list[OnlineUser]:
        return await reader.read([(user, []) for user in USERS])

    found = reading(store, read)
    assert [user.updated_at for user in found] == [newest.get(name) for name in USERS]
    assert all(user.by_category.shape == (0, 12) for user in found)


def test_each_request_of_a_call_gets_its_own_user_and_categories(store: FeatureStore) -> None:
    rng = random.Random(3)
    asked = [(rng.choice(USERS), rng.sample(CATEGORIES, rng.randrange(6))) for _ in range(200)]

    async def read(reader: OnlineReader) -> tuple[list[OnlineUser], list[OnlineUser]]:
        return await reader.read(asked), [(await reader.read([one]))[0] for one in asked]

    together, alone = reading(store, read)
    assert len(together) == 200
    for both, single in zip(together, alone, strict=True):
        assert both.values == single.values
        np.testing.assert_array_equal(both.by_category, single.by_category)


def test_nobody_is_what_an_unknown_user_is(store: FeatureStore) -> None:
    async def read(reader: OnlineReader) -> tuple[OnlineUser, OnlineUser]:
        return reader.nobody(2), (await reader.read([("who?", ["c1", "c2"])]))[0]

    nobody, unknown = reading(store, read)
    assert nobody.values == unknown.values
    assert nobody.updated_at is unknown.updated_at is None
    np.testing.assert_array_equal(nobody.by_category, unknown.by_category)


@pytest.mark.parametrize("service", ["ranker_v1", "retrieval_v1"])
def test_items_are_as_feast_reads_them(store: FeatureStore, service: str) -> None:
    ids = [*(f"i{n}" for n in range(33)), "", "i1"] * 40

    async def read(reader: OnlineReader) -> pa.Table:
        return await asyncio.to_thread(reader.read_items, ids)

    items = reading(store, read, service=service)
    assert items["item_id"].to_pylist() == ids
    assert items.num_columns > 5
    assert items.equals(store.online(service, pa.table({"item_id": ids})).select(items.column_names))


def test_no_items_have_the_columns(store: FeatureStore) -> None:
    async def read(reader: OnlineReader) -> pa.Table:
        return reader.read_items([])

    items = reading(store, read)
    assert items.num_rows == 0
    assert {"item_id", "item_events_1h", "item_first_seen", "price", "tags"} <= set(items.column_names)


def test_service_without_items_reads_only_their_names(store: FeatureStore) -> None:
    async def read(reader: OnlineReader) -> pa.Table:
        return reader.read_items(["i1", "i2"])

    assert reading(store, read, service="recent_v1").to_pydict() == {"item_id": ["i1", "i2"]}


def values_of(dtype: pa.DataType) -> st.SearchStrategy[Any]:
    if pa.types.is_int64(dtype):
        return st.integers(-(2**53), 2**53)
    if pa.types.is_float64(dtype):
        return st.floats(allow_nan=False)
    if pa.types.is_timestamp(dtype):
        moments = st.datetimes(datetime(1970, 1, 2), datetime(2200, 1, 1))
        return moments.map(lambda at: at.replace(tzinfo=UTC))
    return st.lists(TEXT, max_size=5) if pa.types.is_list(dtype) else TEXT


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_a_table_holds_is_read_as_feast_reads_it(store: FeatureStore, data: st.DataObject) -> None:
    user, category = data.draw(TEXT.filter(bool)), data.draw(TEXT.filter(bool))
    keys = {"user_id": "generated " + user, "category": category, "item_id": "generated " + user}
    for name in JOIN_KEYS:
        row = {field.name: data.draw(st.none() | values_of(field.type)) for field in store.tables.schema(name)} | {
            key: keys[key] for key in JOIN_KEYS[name]
        }
        row["event_timestamp"] = datetime(2300, 1, 1, tzinfo=UTC)  # no example is late
        rows = pa.Table.from_pylist([row], schema=store.tables.schema(name))
        online, config = store._store._get_provider().online_store, store._store.config
        online.write_table(config, store._store.get_feature_view(name), rows)
    for service in ("ranker_v1", "recent_v1"):
        assert_equals_feast(store, [keys["user_id"]], [category, "c1"], service=service)

    async def read(reader: OnlineReader) -> pa.Table:
        return reader.read_items([keys["item_id"]])

    items = reading(store, read)
    assert items.equals(store.online("ranker_v1", items.select(["item_id"])).select(items.column_names))


def test_rows_older_than_their_views_ttl_are_null(store: FeatureStore, tmp_path: Path) -> None:
    shutil.copytree(store.path, tmp_path / "copy")
    aging = FeatureStore.open(tmp_path / "copy")
    for name in ("user_activity", "user_category_activity", "item_profile"):
        view = aging._store.get_feature_view(name)
        view.ttl = timedelta(hours=1)
        aging._store.apply(view)
    now = datetime.now(UTC)
    online, config = aging._store._get_provider().online_store, aging._store.config
    for name in JOIN_KEYS:
        rows = [
            {"user_id": user, "item_id": user, "category": "c1", "event_timestamp": now - timedelta(minutes=age)}
            | {"user_events_1h": 3, "segment": "a", "user_category_rate_1d": 0.5, "price": 2.0, "item_events_1h": 4}
            for user, age in (("fresh", 50), ("stale", 70))
        ]
        names = aging.tables.schema(name).names
        some = [{key: value for key, value in row.items() if key in names} for row in rows]
        online.write_table(
            config, aging._store.get_feature_view(name), pa.Table.from_pylist(some, schema=aging.tables.schema(name))
        )
    fresh, stale = assert_equals_feast(aging, ["fresh", "stale"], ["c1"])
    assert [user.values["user_events_1h"] for user in (fresh, stale)] == [3, None]
    assert [user.values["segment"] for user in (fresh, stale)] == ["a", "a"]  # its view has no ttl
    assert fresh.by_category[0].tolist().count(0.5) == 1
    assert np.isnan(stale.by_category).all()

    async def read(reader: OnlineReader) -> pa.Table:
        return reader.read_items(["fresh", "stale"])

    items = reading(aging, read)
    assert items["price"].to_pylist() == [2.0, None]
    assert items["item_events_1h"].to_pylist() == [4, 4]


def fails(store: FeatureStore, reason: ReadFailure, message: str, *, deadline_seconds: float = 5.0) -> None:
    """Reading a user and an item fails for this reason."""

    async def read(reader: OnlineReader) -> None:
        with pytest.raises(OnlineReadError, match=message) as user:
            await reader.read([("u1", ["c1", "c2"])])
        assert user.value.reason is reason
        users, degraded = await UserFeatures(reader).get([("u1", ["c1", "c2"])])
        assert degraded
        assert users[0].updated_at is None
        with pytest.raises(OnlineReadError) as items:
            await asyncio.to_thread(reader.read_items, ["i1"])
        assert items.value.reason is reason

    reading(store, read, deadline_seconds=deadline_seconds)


def test_wrong_password_is_a_refusal_and_never_told(on_the_server: FeatureStore, tmp_path: Path) -> None:
    with redis_server("--requirepass", "open sesame") as guarded:
        store = on_redis(on_the_server, tmp_path / "right", f"{guarded.address},password=open sesame,db=3")
        assert_equals_feast(store, USERS[:3], CATEGORIES)
        closed = copied(store, tmp_path / "wrong", connection_string=f"{guarded.address},password=sesame")
        fails(closed, ReadFailure.REFUSED, rf"^Redis at {guarded.address} refuses: [^=]*password[^=]*$")


def test_redis_that_refuses_a_command_is_told_from_one_that_is_away(
    on_the_server: FeatureStore, tmp_path: Path
) -> None:
    with redis_server("--rename-command", "HMGET", "''") as crippled:
        store = copied(on_the_server, tmp_path / "copy", connection_string=crippled.address)
        fails(store, ReadFailure.REFUSED, "refuses: .*unknown command 'HMGET'$")


def test_redis_that_is_not_there_is_away(on_the_server: FeatureStore, tmp_path: Path) -> None:
    store = copied(on_the_server, tmp_path / "copy", connection_string=f"127.0.0.1:{free_port()}")
    fails(store, ReadFailure.CONNECTION, "is away: .*[Cc]onnect")


def test_encrypted_connections_are_read_through(on_the_server: FeatureStore, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on this machine")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=redis"
    make += f" -addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {certificate}"
    subprocess.run(make.split(), check=True, capture_output=True)
    port = str(free_port())
    tls = ["--tls-port", port, "--tls-cert-file", str(certificate), "--tls-key-file", str(key)]
    with redis_server(*tls, "--tls-ca-cert-file", str(certificate), "--tls-auth-clients", "no"):
        address = f"127.0.0.1:{port},ssl=true,ssl_ca_certs={certificate}"
        store = on_redis(on_the_server, tmp_path / "copy", address)
        assert_equals_feast(store, USERS[:3], CATEGORIES)
        fails(copied(store, tmp_path / "plain", connection_string=f"127.0.0.1:{port}"), ReadFailure.CONNECTION, "away")


def test_cluster_is_read_too(on_the_server: FeatureStore, tmp_path: Path) -> None:
    with redis_server("--cluster-enabled", "yes") as node:
        alone = redis.Redis(port=node.port)
        alone.execute_command("CLUSTER", "ADDSLOTS", *range(16384))
        while b"cluster_state:ok" not in alone.execute_command("CLUSTER", "INFO"):
            time.sleep(0.05)
        store = on_redis(on_the_server, tmp_path / "copy", node.address, redis_type="redis_cluster")
        assert_equals_feast(store, USERS[:5], CATEGORIES)

        async def read(reader: OnlineReader) -> pa.Table:
            items = await asyncio.to_thread(reader.read_items, ["i1", "i2"])
            users = UserFeatures(reader, probe_seconds=0.05)
            assert not (await users.get([("u1", ["c1"])]))[1]
            node.stop()
            assert (await users.get([("u1", ["c1"])]))[1]
            await asyncio.to_thread(node.start)
            for _ in range(100):
                await asyncio.sleep(0.05)
                if not (await users.get([("u1", ["c1"])]))[1]:
                    return items
            raise AssertionError("the cluster is back and not found again")

        assert reading(store, read, deadline_seconds=0.2)["item_first_seen"].null_count == 0


def test_bytes_that_are_no_value_are_named_and_other_users_read(
    on_the_server: FeatureStore, server: RedisServer
) -> None:
    async def read(reader: Any) -> None:
        users = UserFeatures(reader)
        key = reader._users.head + b"\x02\x00\x00\x00\x06\x00\x00\x00broken" + reader._users.tail
        activity = dict(zip(["_ts", *reader._user_views[0].features], reader._users.fields, strict=False))
        client = redis.Redis(port=server.port)
        client.hset(key, mapping={activity["_ts"]: b"\x08\x01", activity["user_events_1d"]: b"\x20\xff"})
        with pytest.raises(
            OnlineReadError, match=r"view 'user_activity', feature 'user_events_1d'.*b' \\xff'"
        ) as error:
            await reader.read([("broken", [])])
        client.delete(key)
        assert error.value.reason is ReadFailure.DECODING
        found, degraded = await users.get([("u1", ["c1"])])
        assert not degraded
        assert found[0].updated_at is not None

    reading(on_the_server, read)


def test_deadline_is_kept_and_the_busy_loops_own_time_is_not_counted(
    on_the_server: FeatureStore, server: RedisServer
) -> None:
    async def read(reader: OnlineReader) -> None:
        await reader.read([("u1", ["c1"])])
        for _ in range(5):
            under_way = asyncio.ensure_future(reader.read([("u1", ["c1"])]))
            await asyncio.sleep(0)  # it asks …
            time.sleep(0.15)  # … and the loop is busy with something else for far longer than the deadline
            (user,) = await under_way
            assert user.updated_at is not None
        os.kill(server._process.pid, signal.SIGSTOP)  # type: ignore[union-attr]
        try:
            started = time.monotonic()
            with pytest.raises(OnlineReadError, match=r"did not answer within \d+ ms") as error:
                await reader.read([("u1", ["c1"])])
            assert error.value.reason is ReadFailure.TIMEOUT
            assert 0.05 <= time.monotonic() - started < 2
        finally:
            os.kill(server._process.pid, signal.SIGCONT)  # type: ignore[union-attr]

    reading(on_the_server, read, deadline_seconds=0.05)


@asynccontextmanager
async def slow_road(port: int, seconds: Callable[[], float]) -> AsyncIterator[int]:
    """A port that leads to another, on which every piece of an answer is held up for so long."""
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())  # type: ignore[arg-type]
        there, here = await asyncio.open_connection("127.0.0.1", port)

        async def carry(source: asyncio.StreamReader, target: asyncio.StreamWriter, *, held_up: bool) -> None:
            while data := await source.read(65536):
                if held_up:
                    await asyncio.sleep(seconds())
                target.write(data)
            target.close()

        await asyncio.gather(
            carry(reader, here, held_up=False), carry(there, writer, held_up=True), return_exceptions=True
        )

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield listening.sockets[0].getsockname()[1]
    finally:
        listening.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def test_late_reply_is_never_taken_for_another_users(
    on_the_server: FeatureStore, server: RedisServer, tmp_path: Path
) -> None:
    """Half of the answers come after the deadline; every user that is read is the one that was asked for."""
    rng = random.Random(1)

    async def run() -> tuple[int, int]:
        async with slow_road(server.port, lambda: rng.choice([0.0, 0.0, 0.0, 0.03, 0.06])) as port:
            store = copied(on_the_server, tmp_path / "copy", connection_string=f"127.0.0.1:{port}")
            direct = open_reader(on_the_server, "ranker_v1", deadline_seconds=5.0)
            own = dict(zip(USERS, await direct.read([(user, CATEGORIES) for user in USERS]), strict=True))
            await direct.close()
            users = UserFeatures(open_reader(store, "ranker_v1", deadline_seconds=0.025), failures=10**6)
            outcomes = []

            async def ask(seed: int) -> None:
                choose = random.Random(seed)
                for _ in range(60):
                    name = choose.choice(USERS)
                    categories = choose.sample(CATEGORIES, choose.randrange(len(CATEGORIES)))
                    (user,), degraded = await users.get([(name, categories)])
                    outcomes.append(degraded)
                    if not degraded:
                        assert user.values == own[name].values
                        places = [CATEGORIES.index(category) for category in categories]
                        np.testing.assert_array_equal(user.by_category, own[name].by_category[places])

            await asyncio.gather(*(ask(seed) for seed in range(8)))
            await users.close()
            return outcomes.count(True), outcomes.count(False)

    degraded, fresh = asyncio.run(run())
    assert degraded > 20
    assert fresh > 20


def test_connecting_that_takes_longer_than_the_deadline_succeeds_behind_it(
    on_the_server: FeatureStore, server: RedisServer, tmp_path: Path
) -> None:
    async def run() -> list[bool]:
        pauses = iter([0.1] * 4)
        async with slow_road(server.port, lambda: next(pauses, 0.0)) as port:
            store = copied(
                on_the_server, tmp_path / "copy", connection_string=f"127.0.0.1:{port},db=0,client_name=slow"
            )
            users = UserFeatures(open_reader(store, "ranker_v1", deadline_seconds=0.02))
            degraded = [(await users.get([("u1", ["c1"])]))[1]]
            for _ in range(100):
                await asyncio.sleep(0.05)
                degraded.append((await users.get([("u1", ["c1"])]))[1])
                if not degraded[-1]:
                    break
            await users.close()
            return degraded

    degraded = asyncio.run(run())
    assert degraded[0]
    assert not degraded[-1]


def test_connection_that_is_closed_before_it_was_used_is_opened_again(
    on_the_server: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = redis_reader._Channels._connect
    opened: list[redis_reader._Channel] = []

    async def closed_twice(channels: redis_reader._Channels) -> None:
        await connect(channels)
        opened.append(channels._channels[-1])
        if len(opened) < 3:
            opened[-1].close("another's deadline")

    monkeypatch.setattr(redis_reader._Channels, "_connect", closed_twice)

    assert_equals_feast(on_the_server, ["u1"], ["c1"])
    assert len(opened) == 3


def outage(
    store: FeatureStore, begin: Callable[[], None], end: Callable[[], None], *, seconds: float = 1.0
) -> tuple[int, int, float]:
    """Eight readers before, while and after a store is away.

    Returns:
        Users that were read and degraded while it was away, and after how many seconds none was any more.
    """

    async def run() -> tuple[int, int, float]:
        users = UserFeatures(open_reader(store, "ranker_v1", deadline_seconds=0.02))
        outcomes: list[tuple[float, bool]] = []
        done = asyncio.Event()

        async def ask(number: int) -> None:
            while not done.is_set():
                started = time.monotonic()
                (user,), degraded = await users.get([(f"u{number}", ["c1"])])
                assert degraded is (user.updated_at is None)
                outcomes.append((started, degraded))
                await asyncio.sleep(0.002)

        await users.get([("u1", [])])
        tasks = [asyncio.ensure_future(ask(number)) for number in range(1, 9)]
        await asyncio.sleep(0.3)
        assert not any(degraded for _, degraded in outcomes[-50:])
        await asyncio.to_thread(begin)
        gone = time.monotonic()
        await asyncio.sleep(seconds)
        await asyncio.to_thread(end)
        back = time.monotonic()
        while time.monotonic() - back < 10 and outcomes[-1][1]:
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.3)
        done.set()
        await asyncio.gather(*tasks)
        await users.close()
        away = [degraded for at, degraded in outcomes if gone <= at < back]
        last = max((at for at, degraded in outcomes if degraded), default=back)
        return away.count(False), away.count(True), last - back

    return uvloop.run(run())


def test_redis_that_hangs_degrades_reads_until_it_is_back(on_the_server: FeatureStore, server: RedisServer) -> None:
    process = server._process
    assert process is not None
    fresh, degraded, recovery = outage(
        on_the_server,
        lambda: os.kill(process.pid, signal.SIGSTOP),
        lambda: os.kill(process.pid, signal.SIGCONT),
    )
    assert fresh == 0
    assert degraded > 100  # they do not wait for the deadline any more
    assert recovery < 5


def test_redis_that_is_killed_and_filled_again_is_found_again(materialized: FeatureStore, tmp_path: Path) -> None:
    with redis_server() as server:
        store = on_redis(materialized, tmp_path / "copy", server.address)

        # Until it is filled its users are unknown, and so their reads are not degraded: begin with a full one.
        client = redis.Redis(port=server.port)
        rows = {key: client.dump(key) for key in client.scan_iter()}

        def restart_full() -> None:
            server.start()
            with redis.Redis(port=server.port).pipeline() as pipe:
                for key, value in rows.items():
                    pipe.restore(key, 0, value)
                pipe.execute()

        fresh, degraded, recovery = outage(store, server.stop, restart_full)
        assert fresh == 0
        assert degraded > 100
        assert recovery < 5


def test_sqlite_file_that_another_holds_is_late(materialized: FeatureStore, tmp_path: Path) -> None:
    store = copied(materialized, tmp_path / "copy")
    assert_equals_feast(store, USERS[:3], CATEGORIES)

    async def read(reader: OnlineReader) -> None:
        users = UserFeatures(reader)
        assert not (await users.get([("u1", ["c1"])]))[1]
        with sqlite3.connect(store.path / "data/online.db", isolation_level=None) as writer:
            writer.execute("BEGIN EXCLUSIVE")
            with pytest.raises(OnlineReadError, match=r"online\.db") as error:
                await reader.read([("u1", ["c1"])])
            assert error.value.reason is ReadFailure.TIMEOUT
            assert (await users.get([("u1", ["c1"])]))[1]
            writer.execute("ROLLBACK")
        for _ in range(100):
            if not (await users.get([("u1", ["c1"])]))[1]:
                return
            await asyncio.sleep(0.05)
        raise AssertionError("the file is free and not read again")

    reading(store, read, deadline_seconds=0.05)


def test_sqlite_file_that_is_replaced_is_opened_anew(materialized: FeatureStore, tmp_path: Path) -> None:
    store = copied(materialized, tmp_path / "copy")
    file = store.path / "data/online.db"

    async def read(reader: OnlineReader) -> None:
        assert (await reader.read([("u1", ["c1"])]))[0].updated_at is not None
        shutil.copyfile(file, tmp_path / "emptied.db")
        with sqlite3.connect(tmp_path / "emptied.db") as other:
            other.execute("DELETE FROM evergreen_user_activity")
            other.execute("DELETE FROM evergreen_user_profile")
        other.close()
        (tmp_path / "emptied.db").replace(file)
        assert (await reader.read([("u1", ["c1"])]))[0].updated_at is None

    reading(store, read)


def test_sqlite_file_that_is_missing_is_away_and_a_table_that_is_missing_a_refusal(
    materialized: FeatureStore, tmp_path: Path
) -> None:
    store = copied(materialized, tmp_path / "copy")
    with sqlite3.connect(store.path / "data/online.db") as connection:
        connection.execute("DROP TABLE evergreen_user_activity")
        connection.execute("DROP TABLE evergreen_item_activity")
    connection.close()
    fails(store, ReadFailure.REFUSED, r"online\.db: no such table")
    (store.path / "data/online.db").unlink()
    fails(store, ReadFailure.CONNECTION, r"online\.db")
