"""A Redis that is away, comes back, restarts empty, is full, or is a cluster."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import pyarrow as pa
import pytest

from evergreen.features.online_store import OnlineStoreError
from evergreen.features.redis_online_store import GuardedRedisOnlineStoreConfig
from tests.online_stores import START, RedisBackend, client, feature_view, rows
from tests.servers import RedisServer, redis_server

VIEW = feature_view()


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


def users(num_users: int) -> pa.Table:
    return rows(*({"user_id": f"u{user}", "clicks": user} for user in range(num_users)))


def test_redis_that_stays_away_is_named_after_the_deadline(server: RedisServer) -> None:
    backend = RedisBackend.create(f"{server.address},password=secret")
    backend.ours.online_store.retry_seconds = 0.5
    server.stop()
    with pytest.raises(OnlineStoreError, match=rf"{server.address}.*is away since 0\.5 s.*connection_string") as caught:
        backend.open().write_table(backend.ours, VIEW, users(1))
    assert "secret" not in str(caught.value)


def test_redis_that_comes_back_in_time_gets_the_rows(server: RedisServer) -> None:
    backend = RedisBackend.create(server.address)
    store = backend.open()
    store.write_table(backend.ours, VIEW, users(1))
    server.stop()
    back = threading.Timer(0.7, server.start)
    back.start()
    assert store.write_table(backend.ours, VIEW, users(5)) == 0
    back.join()
    assert len(backend.content(backend.ours)) == 5


def test_redis_that_restarts_within_a_write_loses_no_row_of_it(server: RedisServer) -> None:
    """Kept on disk, as a Redis in production is: what Redis had answered for is there, the rest is sent again."""
    with redis_server("--appendonly", "yes", "--appendfsync", "always") as durable:
        backend = RedisBackend.create(durable.address)
        store = backend.open()
        done = threading.Event()

        def restart_often() -> None:
            while not done.is_set():
                time.sleep(0.1)
                durable.stop()
                durable.start()

        restarts = threading.Thread(target=restart_often)
        restarts.start()
        try:
            store.write_table(backend.ours, VIEW, users(300))
        finally:
            done.set()
            restarts.join()
        assert len(backend.content(backend.ours)) == 300


def test_redis_that_restarts_empty_has_no_marker(server: RedisServer) -> None:
    backend = RedisBackend.create(server.address)
    store = backend.open()
    store.set_marker(backend.ours, VIEW, "one")
    server.stop()
    server.start()
    assert store.marker(backend.ours, VIEW) is None


def test_full_redis_is_named_with_its_reason(server: RedisServer) -> None:
    backend = RedisBackend.create(server.address)
    client(backend.ours).config_set("maxmemory", "1mb")
    with pytest.raises(OnlineStoreError, match=rf"{server.address} refuses: .*maxmemory.*materialize again"):
        backend.open().write_table(backend.ours, VIEW, users(5000))


def test_wrong_password_is_not_tried_again() -> None:
    with redis_server("--requirepass", "right") as server:
        backend = RedisBackend.create(f"{server.address},password=right")
        backend.ours.online_store.connection_string = f"{server.address},password=wrong"
        backend.ours.online_store.retry_seconds = 3600
        with pytest.raises(OnlineStoreError, match=rf"{server.address} refuses"):
            backend.open().write_table(backend.ours, VIEW, users(1))


def test_keys_expire_where_asked_for(server: RedisServer) -> None:
    backend = RedisBackend.create(server.address)
    backend.ours.online_store.key_ttl_seconds = 1000
    backend.open().write_table(backend.ours, VIEW, users(2))
    server_client = client(backend.ours)
    assert all(0 < server_client.ttl(key) <= 1000 for key in backend.content(backend.ours))


def test_skipping_the_guard_is_refused() -> None:
    with pytest.raises(ValueError, match="skip_dedup"):
        GuardedRedisOnlineStoreConfig(skip_dedup=True)


def test_cluster_is_written_and_guarded_too() -> None:
    with redis_server("--cluster-enabled", "yes") as server:
        backend = RedisBackend.create(server.address)
        alone = client(backend.ours)
        alone.execute_command("CLUSTER", "ADDSLOTS", *range(16384))
        while b"cluster_state:ok" not in alone.execute_command("CLUSTER", "INFO"):
            time.sleep(0.05)
        backend.ours.online_store.redis_type = "redis_cluster"
        store = backend.open()
        assert store.write_table(backend.ours, VIEW, users(100)) == 0
        late = rows({"user_id": "u7", "clicks": 0, "event_timestamp": START - timedelta(seconds=1)})
        assert store.write_table(backend.ours, VIEW, late) == 1
        store.set_marker(backend.ours, VIEW, "one")
        assert store.marker(backend.ours, VIEW) == "one"
        assert store.withdraw(backend.ours, VIEW, users(1)) == 1
        assert len(backend.content(backend.ours)) == 99
