"""Feast's Redis online store with bulk writes, a guard against late rows, ttl, and retries with a deadline.

A row lies as Feast lays it: one hash for each entity key, with a field for each feature and one for the event time of
each view. Feast reads the stored times first and writes afterwards; a stream that writes in between is overwritten.
Here a script compares and writes within Redis, which runs scripts one after the other, and a batch is one round trip.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import redis
from feast import Entity
from feast.feature_view import FeatureView
from feast.infra.online_stores.helpers import _mmh3, compute_versioned_name
from feast.infra.online_stores.redis import RedisOnlineStore, RedisOnlineStoreConfig, RedisType
from feast.repo_config import RepoConfig
from numpy.typing import NDArray
from redis.backoff import NoBackoff
from redis.retry import Retry

from evergreen.features.online_store import GuardedOnlineStore, OnlineRows, OnlineStoreError
from evergreen.features.value_encoding import as_list, encode_instants

_KEYS_A_SCRIPT = 64  # Redis does nothing else meanwhile: about a millisecond
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 2.0

# The event time is a serialized google.protobuf.Timestamp. A number of Lua holds 53 bits, a varint up to 64: hence two
# halves, and a negative number (ten bytes) is brought back from its two's complement in the upper one.
_INSTANT = """
local function varint(text, first)
    local low, high, count, byte = 0, 0, 0, 0
    repeat
        byte = text:byte(first + count)
        if count < 4 then low = low + byte % 128 * 128 ^ count else high = high + byte % 128 * 128 ^ (count - 4) end
        count = count + 1
    until byte < 128
    if count == 10 then high = high % 2 ^ 36 - 2 ^ 36 end
    return low + high * 2 ^ 28, first + count
end
local function instant(text)
    local seconds, nanos, place, tag, number = 0, 0, 1, 0, 0
    while place <= #text do
        tag = text:byte(place)
        number, place = varint(text, place + 1)
        if tag == 8 then seconds = number else nanos = number end
    end
    return seconds, nanos
end
"""

# KEYS: entity keys. ARGV: seconds until a key expires (0: never), number of fields, their names (the first is the
# event time's), then for each key the values of its fields. Returns how many keys hold newer rows.
_WRITE = (
    _INSTANT
    + """
local width, late, row, place = tonumber(ARGV[2]), 0, {}, 0
for field = 1, width do row[2 * field - 1] = ARGV[2 + field] end
for number, key in ipairs(KEYS) do
    place = 2 + number * width
    local stored, newer = redis.call('HGET', key, row[1]), false
    if stored and stored ~= ARGV[place + 1] then
        local old_seconds, old_nanos = instant(stored)
        local seconds, nanos = instant(ARGV[place + 1])
        newer = old_seconds > seconds or (old_seconds == seconds and old_nanos > nanos)
    end
    if newer then
        late = late + 1
    else
        for field = 1, width do row[2 * field] = ARGV[place + field] end
        redis.call('HSET', key, unpack(row))
        if ARGV[1] ~= '0' then redis.call('EXPIRE', key, ARGV[1]) end
    end
end
return late
"""
)

# KEYS: entity keys. ARGV: number of fields, their names (the first is the event time's), then for each key the event
# time of the row to remove. Returns how many were removed.
_WITHDRAW = """
local width, removed, fields = tonumber(ARGV[1]), 0, {}
for field = 1, width do fields[field] = ARGV[1 + field] end
for number, key in ipairs(KEYS) do
    if redis.call('HGET', key, fields[1]) == ARGV[1 + width + number] then
        redis.call('HDEL', key, unpack(fields))
        removed = removed + 1
    end
end
return removed
"""

logger = logging.getLogger(__name__)


class GuardedRedisOnlineStoreConfig(RedisOnlineStoreConfig):  # type: ignore[misc]
    """Configuration in feature_store.yaml: the parent's, under this store's own name."""

    type: str = "evergreen.features.redis_online_store.GuardedRedisOnlineStore"

    skip_dedup: Literal[False] = False
    """Not to be had: the guard takes no round trip of its own here."""

    retry_seconds: float = 30.0
    """How long to go on writing to a Redis that is away before giving up. A read is tried twice, without waiting."""


class GuardedRedisOnlineStore(GuardedOnlineStore, RedisOnlineStore):  # type: ignore[misc]
    """RedisOnlineStore that writes by column and compares event times within Redis.

    A Redis that is away is tried again for `retry_seconds`; then, as when it refuses (out of memory, wrong password,
    a read-only replica), `OnlineStoreError` names its address. A batch may have been written in part: writing it again
    is safe. A Redis that restarted empty, or from an older dump, has lost its markers or has older ones:
    `FeatureStore.materialize` then writes every key again.
    """

    def marker(self, config: RepoConfig, view: FeatureView) -> str | None:
        """What `set_marker` left in this Redis for the view."""
        (found,) = self._execute(config, [("HGET", _markers(config), _view_name(config, view))])
        return None if found is None else found.decode()

    def set_marker(self, config: RepoConfig, view: FeatureView, marker: str) -> None:
        """Leave a marker in this Redis."""
        self._execute(config, [("HSET", _markers(config), _view_name(config, view), marker)])

    def delete_table(self, config: RepoConfig, table: FeatureView) -> None:
        """Delete a view's rows, its marker first."""
        self._execute(config, [("HDEL", _markers(config), _view_name(config, table))])
        super().delete_table(config, table)

    def teardown(self, config: RepoConfig, tables: Sequence[FeatureView], entities: Sequence[Entity]) -> None:
        """Delete all rows, the markers first."""
        self._execute(config, [("DEL", _markers(config))])
        super().teardown(config, tables, entities)

    def _write(self, config: RepoConfig, view: FeatureView, rows: OnlineRows) -> int:
        fields = _fields(config, view, list(rows.values))
        cells = zip(as_list(encode_instants(rows.micros)), *rows.values.values(), strict=True)
        head = [str(config.online_store.key_ttl_seconds or 0), str(len(fields)), *fields]
        return sum(self._execute(config, self._scripts(config, _WRITE, rows.keys, head, cells)))

    def _withdraw(self, config: RepoConfig, view: FeatureView, keys: list[bytes], micros: NDArray[np.int64]) -> int:
        fields = _fields(config, view, [feature.name for feature in view.features])
        cells = zip(as_list(encode_instants(micros)), strict=True)
        return sum(self._execute(config, self._scripts(config, _WITHDRAW, keys, [str(len(fields)), *fields], cells)))

    def _scripts(
        self,
        config: RepoConfig,
        script: str,
        keys: list[bytes],
        head: list[Any],
        cells: Iterator[tuple[bytes, ...]],
    ) -> list[tuple[Any, ...]]:
        """Calls of a script, for some entity keys each: all have the same head, and then the cells of their keys."""
        # A script on a cluster may only touch keys of one slot.
        size = 1 if config.online_store.redis_type == RedisType.redis_cluster else _KEYS_A_SCRIPT
        project = config.project.encode()
        calls: list[tuple[Any, ...]] = []
        for first in range(0, len(keys), size):
            some = [key + project for key in keys[first : first + size]]
            rows = itertools.islice(cells, len(some))
            calls.append(("EVAL", script, len(some), *some, *head, *itertools.chain.from_iterable(rows)))
        return calls

    def _execute(self, config: RepoConfig, commands: list[tuple[Any, ...]]) -> list[Any]:
        """Run commands in one round trip; again from the first when the connection breaks.

        Raises:
            OnlineStoreError: Redis is away for longer than `retry_seconds`, or refuses a command.
        """
        parts = config.online_store.connection_string.split(",")
        where = ",".join(part for part in parts if "=" not in part)  # without a password
        deadline = time.monotonic() + config.online_store.retry_seconds
        pause = _FIRST_PAUSE_SECONDS
        while True:
            try:
                with self._get_client(config.online_store).pipeline(transaction=False) as pipe:
                    for command in commands:
                        pipe.execute_command(*command)
                    return list(pipe.execute())
            except (redis.AuthenticationError, redis.exceptions.AuthorizationError) as error:
                raise _refused(where, error) from error
            except (redis.ConnectionError, redis.TimeoutError) as error:
                if time.monotonic() + pause > deadline:
                    raise OnlineStoreError(
                        f"Redis at {where} is away since {config.online_store.retry_seconds:g} s ({error}): start it, "
                        "or correct online_store.connection_string in feature_store.yaml, and materialize again; rows "
                        "that are there already do no harm"
                    ) from error
                logger.warning("Redis at %s is away (%s), trying again in %.1f s", where, error, pause)
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            except redis.RedisError as error:
                raise _refused(where, error) from error

    def _get_client(self, online_store_config: GuardedRedisOnlineStoreConfig) -> Any:
        if self._client is None and online_store_config.redis_type == RedisType.redis:
            # A pooled connection may be dead since Redis restarted: once more, at once. Redis's client would by default
            # wait for seconds within a request; writes have `retry_seconds`.
            super()._get_client(online_store_config).set_retry(Retry(NoBackoff(), 1))
        return super()._get_client(online_store_config)


def _refused(where: str, error: redis.RedisError) -> OnlineStoreError:
    reason = str(error).rpartition("of pipeline caused error: ")[2]  # not the whole command
    return OnlineStoreError(
        f"Redis at {where} refuses: {reason}. Mend that (memory, password, role) and materialize again; rows that are "
        "there already do no harm"
    )


def _markers(config: RepoConfig) -> str:
    return f"evergreen:markers:{config.project}"


def _view_name(config: RepoConfig, view: FeatureView) -> str:
    name: str = compute_versioned_name(view, config.registry.enable_online_feature_view_versioning)
    return name


def _fields(config: RepoConfig, view: FeatureView, features: Sequence[str]) -> list[bytes]:
    """Names of the hash's fields: the view's event time, then each feature."""
    name = _view_name(config, view)
    return [f"_ts:{name}".encode(), *(_mmh3(f"{name}:{feature}") for feature in features)]
