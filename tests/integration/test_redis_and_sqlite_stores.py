"""Both online stores, Redis and SQLite, behave alike: Feast reads what they write, and the newer row stays."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from feast import FeatureStore, ValueType
from feast.protos.feast.serving.ServingService_pb2 import FieldStatus
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.utils import _convert_arrow_to_proto
from hypothesis import given, settings
from hypothesis import strategies as st

from evergreen.features.online_store import GuardedOnlineStore
from tests.online_stores import CATEGORY, START, USER, Backend, RedisBackend, SqliteBackend, client, feature_view, rows
from tests.servers import RedisServer, redis_server

VIEW = feature_view()
KEYS = {"user_id": ValueType.STRING, "category": ValueType.STRING}
MICROSECOND = timedelta(microseconds=1)


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


@pytest.fixture(params=["sqlite", "redis"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    if request.param == "sqlite":
        return SqliteBackend.create(tmp_path)
    return emptied(request.getfixturevalue("server"))


def emptied(server: RedisServer) -> RedisBackend:
    backend = RedisBackend.create(server.address)
    client(backend.ours).flushall()
    return backend


def as_feast(table: pa.Table) -> list[tuple[Any, ...]]:
    return _convert_arrow_to_proto(table.combine_chunks(), VIEW, KEYS)


def random_rows(num_rows: int) -> pa.Table:
    """Rows of different keys, one value in five null."""
    rng = random.Random(3)

    def maybe(value: Any) -> Any:
        return None if rng.random() < 0.2 else value

    return rows(
        *(
            {
                "user_id": f"{'ü' * (row % 3)}{row}",
                "category": "" if row % 7 == 0 else "c" * (row % 200),
                "event_timestamp": START + timedelta(microseconds=rng.randrange(10**12)),
                "clicks": maybe(rng.randrange(-1000, 10**9)),
                "rate": maybe(rng.random()),
                "city": maybe("x" * rng.randrange(200)),
                "seen": maybe(START + timedelta(microseconds=rng.randrange(10**12))),
                "history": maybe([f"i{item}" for item in range(rng.randrange(60))]),
            }
            for row in range(num_rows)
        )
    )


def clicks(backend: Backend, user: str = "u1") -> int | None:
    """What Feast's own code reads."""
    key = EntityKey(join_keys=["user_id", "category"], entity_values=[Value(string_val=user), Value(string_val="c")])
    ((_, values),) = backend.open().online_read(backend.ours, VIEW, [key], ["clicks"])
    return None if values is None or not values["clicks"].HasField("val") else values["clicks"].int64_val


@pytest.mark.parametrize("through", ["write_table", "online_write_batch", "online_write_batch_async"])
def test_content_is_byte_for_byte_what_feasts_own_writer_leaves(backend: Backend, through: str) -> None:
    table = random_rows(200)
    store = backend.open()
    if through == "write_table":
        assert store.write_table(backend.ours, VIEW, table) == 0
    elif through == "online_write_batch":
        store.online_write_batch(backend.ours, VIEW, as_feast(table), None)
    else:
        asyncio.run(store.online_write_batch_async(backend.ours, VIEW, as_feast(table), None))
    backend.open_feasts().online_write_batch(backend.feasts, VIEW, as_feast(table), None)
    content = backend.content(backend.ours)
    assert content == backend.content(backend.feasts)
    assert len(content) in (200, 200 * len(VIEW.features))


@pytest.mark.parametrize("earlier", [MICROSECOND, timedelta(seconds=1), timedelta(days=365 * 80)])
def test_late_row_never_overwrites_newer(backend: Backend, earlier: timedelta) -> None:
    store = backend.open()
    late = rows({"clicks": 1, "event_timestamp": START - earlier})
    assert store.write_table(backend.ours, VIEW, rows({"clicks": 2})) == 0
    assert store.write_table(backend.ours, VIEW, late) == 1
    store.online_write_batch(backend.ours, VIEW, as_feast(late), None)
    assert clicks(backend) == 2


def test_rows_from_before_1970_are_compared_too(backend: Backend) -> None:
    store = backend.open()
    for year, late in ((1930, 0), (1920, 1), (1960, 0), (1959, 1), (1975, 0), (1965, 1)):
        at = datetime(year, 1, 1, tzinfo=UTC)
        assert store.write_table(backend.ours, VIEW, rows({"clicks": year, "event_timestamp": at})) == late
    assert clicks(backend) == 1975


def test_row_of_the_same_time_corrects(backend: Backend) -> None:
    store = backend.open()
    store.write_table(backend.ours, VIEW, rows({"clicks": 1}))
    assert store.write_table(backend.ours, VIEW, rows({"clicks": 2})) == 0
    assert clicks(backend) == 2
    store.online_write_batch(backend.ours, VIEW, as_feast(rows({"clicks": 3})), None)
    assert clicks(backend) == 3


def test_null_overwrites_a_value(backend: Backend) -> None:
    store = backend.open()
    store.write_table(backend.ours, VIEW, rows({"clicks": 1}))
    store.write_table(backend.ours, VIEW, rows({"clicks": None, "event_timestamp": START + MICROSECOND}))
    assert clicks(backend) is None


def test_no_rows_are_no_work(backend: Backend) -> None:
    store = backend.open()
    assert store.write_table(backend.ours, VIEW, rows()) == 0
    assert store.withdraw(backend.ours, VIEW, rows()) == 0
    store.online_write_batch(backend.ours, VIEW, [], None)
    assert backend.content(backend.ours) == {}


WRITES = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 4), st.booleans(), st.integers(1, 4)), min_size=1, max_size=30
)


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
@settings(max_examples=40, deadline=None)
@given(writes=WRITES)
def test_any_order_of_writes_ends_with_the_newest(
    kind: str, writes: list[tuple[int, int, bool, int]], request: pytest.FixtureRequest, tmp_path_factory: Any
) -> None:
    if kind == "sqlite":
        backend: Backend = SqliteBackend.create(tmp_path_factory.mktemp("store"))
    else:
        backend = emptied(request.getfixturevalue("server"))
    store = backend.open()
    newest: dict[str, tuple[int, int]] = {}
    batch: list[dict[str, Any]] = []
    for order, (user, micros, bulk, size) in enumerate(writes):
        at = START + timedelta(microseconds=micros * 500_000)
        batch.append({"user_id": f"u{user}", "event_timestamp": at, "clicks": order})
        newest[f"u{user}"] = max(newest.get(f"u{user}", (0, 0)), (micros, order))
        if len(batch) >= size or order == len(writes) - 1:
            write(store, backend, rows(*batch), bulk=bulk)
            batch = []
    assert {user: clicks(backend, user) for user in newest} == {user: order for user, (_, order) in newest.items()}


def write(store: GuardedOnlineStore, backend: Backend, table: pa.Table, *, bulk: bool) -> None:
    if bulk:
        store.write_table(backend.ours, VIEW, table)
    else:
        store.online_write_batch(backend.ours, VIEW, as_feast(table), None)


def test_stream_and_batch_at_the_same_time_leave_the_newest_of_each_key(backend: Backend) -> None:
    users, versions = 10, 150

    def write_all(seed: int, *, bulk: bool) -> None:
        rng = random.Random(seed)
        store = backend.open()
        writes = [(user, version) for user in range(users) for version in range(seed % 2, versions, 2)]
        rng.shuffle(writes)
        for first in range(0, len(writes), 25):
            some = [
                {"user_id": f"u{user}", "event_timestamp": START + version * MICROSECOND, "clicks": version}
                for user, version in writes[first : first + 25]
            ]
            write(store, backend, rows(*some), bulk=bulk)

    threads = [threading.Thread(target=write_all, args=(seed,), kwargs={"bulk": seed < 2}) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {clicks(backend, f"u{user}") for user in range(users)} == {versions - 1}


def test_withdrawn_row_goes_and_a_newer_one_stays(backend: Backend) -> None:
    store = backend.open()
    table = rows({"clicks": 1}, {"user_id": "u2", "clicks": 2})
    store.write_table(backend.ours, VIEW, table)
    store.write_table(backend.ours, VIEW, rows({"clicks": 3, "event_timestamp": START + MICROSECOND}))
    assert store.withdraw(backend.ours, VIEW, table) == 1
    assert clicks(backend) == 3
    assert clicks(backend, "u2") is None
    assert store.withdraw(backend.ours, VIEW, table) == 0


def test_marker_stays_until_the_view_is_dropped(backend: Backend) -> None:
    store = backend.open()
    assert store.marker(backend.ours, VIEW) is None
    store.set_marker(backend.ours, VIEW, "one")
    store.set_marker(backend.ours, VIEW, "two")
    assert backend.open().marker(backend.ours, VIEW) == "two"
    store.update(backend.ours, [VIEW], [], [], [], partial=False)
    assert backend.open().marker(backend.ours, VIEW) is None


def test_teardown_takes_rows_and_marker(backend: Backend) -> None:
    store = backend.open()
    store.write_table(backend.ours, VIEW, rows({"clicks": 1}))
    store.set_marker(backend.ours, VIEW, "one")
    store.teardown(backend.ours, [VIEW], [])
    assert backend.open().marker(backend.ours, VIEW) is None
    assert backend.content(backend.ours) == {}


def test_row_older_than_the_ttl_reads_as_null(backend: Backend, tmp_path: Path) -> None:
    """Through a whole Feast store, beside a view without a ttl."""
    config = backend.ours.model_copy(update={"registry_config": str(tmp_path / "registry.db")})
    feast = FeatureStore(config=config)
    views = [feature_view(ttl=timedelta(hours=1)), feature_view(name="forever")]
    feast.apply([USER, CATEGORY, *views])
    now = datetime.now(UTC)
    table = rows(
        {"user_id": "fresh", "clicks": 1, "event_timestamp": now - timedelta(minutes=58)},
        {"user_id": "stale", "clicks": 2, "event_timestamp": now - timedelta(minutes=62)},
    )
    for view in views:
        feast.write_to_online_store(view.name, table.to_pandas())
    users = ["fresh", "stale", "unknown"]
    references = ["taste:clicks", "forever:clicks", "taste:city"]
    keys = {"user_id": users, "category": ["c"] * 3}
    response = feast.get_online_features(references, keys, full_feature_names=True)
    answer = response.to_dict()
    assert answer["taste__clicks"] == [1, None, None]
    assert answer["taste__city"] == [None, None, None]
    assert answer["forever__clicks"] == [1, 2, None]
    assert answer["user_id"] == users
    statuses = {
        name: list(result.statuses)
        for name, result in zip(response.proto.metadata.feature_names.val, response.proto.results, strict=True)
    }
    assert statuses["taste__clicks"][1] == statuses["taste__city"][1] == FieldStatus.OUTSIDE_MAX_AGE
    assert statuses["taste__clicks"][0] == FieldStatus.PRESENT
    assert FieldStatus.OUTSIDE_MAX_AGE not in statuses["forever__clicks"]
    if feast._get_provider().online_store.async_supported.read:
        answer = asyncio.run(feast.get_online_features_async(references, keys, full_feature_names=True)).to_dict()
        assert answer["taste__clicks"] == [1, None, None]
        assert answer["forever__clicks"] == [1, 2, None]


def test_pushed_row_that_is_late_is_refused(backend: Backend, tmp_path: Path) -> None:
    feast = FeatureStore(config=backend.ours.model_copy(update={"registry_config": str(tmp_path / "registry.db")}))
    feast.apply([USER, CATEGORY, VIEW])
    newer: pd.DataFrame = rows({"clicks": 5, "event_timestamp": START + timedelta(hours=1)}).to_pandas()
    feast.write_to_online_store("taste", newer)
    feast.write_to_online_store("taste", rows({"clicks": 4}).to_pandas())
    assert clicks(backend) == 5
