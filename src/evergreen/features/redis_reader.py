"""`OnlineReader` for Redis: all rows of a call are asked for by one write of HMGET commands, and read by one wait.

redis-py's pipeline builds every command anew, and its replies pass through many hands: together four times the CPU. So
commands are put together here from parts that are made once, and hiredis reads the replies where they arrive. redis-py
connects: TLS, password, database, Sentinel are its. A Redis cluster is read through redis-py's cluster pipeline, which
finds the node of each key.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import hiredis
import redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from evergreen.features.deadline import store_deadline
from evergreen.features.online_reader import (
    ITEM_KEYS,
    PAIR_KEYS,
    USER_KEYS,
    OnlineReader,
    OnlineReadError,
    ReadFailure,
    View,
    entity_value,
    key_head,
)
from evergreen.features.online_user import OnlineUser
from evergreen.features.redis_online_store import GuardedRedisOnlineStore, _fields
from evergreen.features.value_decoding import Row, decode_instant

if TYPE_CHECKING:
    from evergreen.features.store import FeatureStore

_CONNECTIONS = 4
_NOTHING_YET = object()
_CONNECT_SECONDS = 2.0  # goes on behind a request that has given up, so that a later one finds the connection
_ITEMS_SECONDS = 5.0
_SECONDS_A_KEY = 20e-6  # a Redis takes half of this for a row of a dozen features
_REMEMBERED_CATEGORIES = 65_536
# uvloop says RuntimeError of a transport that is closed; a cluster none of whose nodes answers is no RedisError.
_BROKEN = (redis.RedisError, redis.exceptions.RedisClusterException, OSError, RuntimeError)
_REFUSALS = (
    redis.ResponseError,
    redis.AuthenticationError,
    redis.exceptions.AuthorizationError,
    redis.exceptions.BusyLoadingError,
)


class _Hashes:
    """The hashes of one kind of entity, with the rows of all views of the same keys, and the command that reads them.

    Attributes:
        head, tail: how the key of a hash begins and ends.
        fields: what a service reads of it: of each view its event time, then its features.
    """

    def __init__(self, config: Any, keys: Sequence[str], views: Sequence[View]) -> None:
        self.head, self.tail = key_head(keys), config.project.encode()
        self.fields: list[bytes] = []
        self._parts: list[slice] = []
        for view in views:
            first = len(self.fields)
            self.fields += _fields(config, view.definition, view.features)
            self._parts.append(slice(first, len(self.fields)))
        self._begin = b"*%d\r\n$5\r\nHMGET\r\n$" % (2 + len(self.fields))
        self._end = b"\r\n" + b"".join(b"$%d\r\n%b\r\n" % (len(field), field) for field in self.fields)

    def command(self, key: bytes) -> bytes:
        """What goes over the wire to read a hash."""
        return b"%b%d\r\n%b%b" % (self._begin, len(key), key, self._end)

    def by_view(self, replies: Sequence[Sequence[Any]]) -> list[Sequence[Row]]:
        """The rows of each view, from the replies of some hashes."""
        if len(self._parts) == 1:
            return [replies]
        return [[reply[part] for reply in replies] for part in self._parts]


_Asked = list[tuple[_Hashes, bytes]]
"""What to read: keys, and which hashes these are of."""


class RedisReader(OnlineReader):
    """Reads users through a few connections, and items through one more."""

    def __init__(self, store: FeatureStore, service: str, *, deadline_seconds: float) -> None:
        super().__init__(store, service, deadline_seconds=deadline_seconds)
        self._users = _Hashes(self._config, USER_KEYS, self._user_views)
        self._pairs = _Hashes(self._config, PAIR_KEYS, self._pair_views)
        self._items = _Hashes(self._config, ITEM_KEYS, self._item_views)
        self._category = functools.lru_cache(_REMEMBERED_CATEGORIES)(lambda name: self._pairs.head + entity_value(name))
        online = self._config.online_store
        self._where = "Redis at " + ",".join(part for part in online.connection_string.split(",") if "=" not in part)
        self._is_cluster = online.redis_type == "redis_cluster"
        # The store parses its own options; of one that is given twice the last counts.
        limits = f",socket_connect_timeout={_CONNECT_SECONDS},socket_timeout={_ITEMS_SECONDS}"
        self._online = online.model_copy(update={"connection_string": online.connection_string + limits})
        self._store = GuardedRedisOnlineStore()
        self._channels: _Channels | None = None
        self._cluster_reads: set[asyncio.Task[list[Any]]] = set()
        self._items_connection: Any = None
        self._one_at_a_time = threading.Lock()

    async def read(self, asked: Sequence[tuple[str, Sequence[str]]]) -> list[OnlineUser]:
        """See `OnlineReader.read`."""
        keys: _Asked = []
        for user_id, categories in asked:
            user = entity_value(user_id) + self._users.tail
            if self._user_views:
                keys.append((self._users, self._users.head + user))
            if self._pair_views:
                keys += [(self._pairs, self._category(category) + user) for category in categories]
        deadline_seconds = self._deadline_seconds + _SECONDS_A_KEY * len(keys)
        try:
            async with store_deadline(deadline_seconds):
                replies = iter(await (self._ask_cluster(keys) if self._is_cluster else self._ask(keys)))
        except TimeoutError as error:
            raise OnlineReadError(
                f"{self._where} did not answer within {1000 * deadline_seconds:.0f} ms", ReadFailure.TIMEOUT
            ) from error
        except _BROKEN as error:
            raise self._failed(error) from error
        users = []
        for _, categories in asked:
            user_rows = self._users.by_view([next(replies)]) if self._user_views else []
            pairs = self._pairs.by_view([*itertools.islice(replies, len(categories))]) if self._pair_views else []
            users.append(self._user([row for (row,) in user_rows], pairs, len(categories)))
        return users

    async def close(self) -> None:
        """See `OnlineReader.close`."""
        if self._channels is not None:
            await self._channels.close()
        await _ended(self._cluster_reads)
        if self._store._client_async is not None:
            await self._store._client_async.aclose()
        await asyncio.to_thread(self._close_items)

    @staticmethod
    def _seconds(event_time: bytes) -> float:
        return decode_instant(event_time)

    async def _ask(self, keys: _Asked) -> list[Any]:
        """The replies, in one round trip; once more where the connection broke, as after a restart of Redis."""
        if not keys:
            return []
        if self._channels is None:
            client = await self._store._get_client_async(self._online)
            self._channels = _Channels(client.connection_pool)
        commands = b"".join([hashes.command(key) for hashes, key in keys])
        try:
            replies = await self._channels.ask(commands, len(keys))
        except (redis.ConnectionError, OSError, RuntimeError):
            replies = await self._channels.ask(commands, len(keys))
        return _checked(replies)

    async def _ask_cluster(self, keys: _Asked) -> list[Any]:
        client = await self._store._get_client_async(self._online)

        async def read() -> list[Any]:
            pipe = client.pipeline()
            for hashes, key in keys:
                pipe.execute_command("HMGET", key, *hashes.fields)
            return list(await pipe.execute())

        # A pipeline that is cancelled would leave its connections behind: it goes on until its socket's timeout.
        task = asyncio.ensure_future(read())
        self._cluster_reads.add(task)
        task.add_done_callback(self._cluster_reads.discard)
        task.add_done_callback(_heard)
        return await asyncio.shield(task)

    def _item_rows(self, item_ids: Sequence[str]) -> list[Sequence[Row]]:
        hashes = self._items
        keys = [hashes.head + entity_value(item_id) + hashes.tail for item_id in item_ids]
        try:
            with self._one_at_a_time:
                if self._is_cluster:
                    pipe = self._store._get_client(self._online).pipeline()
                    for key in keys:
                        pipe.execute_command("HMGET", key, *hashes.fields)
                    replies = list(pipe.execute())
                else:
                    replies = self._ask_for_items(b"".join([hashes.command(key) for key in keys]), len(keys))
        except _BROKEN as error:
            raise self._failed(error) from error
        return hashes.by_view(replies)

    def _close_items(self) -> None:
        with self._one_at_a_time:
            if self._items_connection is not None:
                self._items_connection.disconnect()
            if self._store._client is not None:
                self._store._client.close()

    def _ask_for_items(self, commands: bytes, num_replies: int) -> list[Any]:
        if self._items_connection is None:
            self._items_connection = self._store._get_client(self._online).connection_pool.make_connection()
        connection = self._items_connection
        try:
            return _exchange(connection, commands, num_replies)
        except (redis.ConnectionError, OSError):  # it may have been idle for longer than Redis allows
            return _exchange(connection, commands, num_replies)

    def _failed(self, error: Exception) -> OnlineReadError:
        if isinstance(error, redis.TimeoutError | TimeoutError):
            return OnlineReadError(f"{self._where} did not answer in time: {error}", ReadFailure.TIMEOUT)
        if isinstance(error, _REFUSALS):
            reason = str(error).partition(", with args")[0]  # they hold the user's id
            return OnlineReadError(f"{self._where} refuses: {reason}", ReadFailure.REFUSED)
        return OnlineReadError(f"{self._where} is away: {error}", ReadFailure.CONNECTION)


def _checked(replies: list[Any]) -> list[Any]:
    for reply in replies:
        if isinstance(reply, hiredis.ReplyError):
            raise redis.ResponseError(str(reply))
    return replies


def _exchange(connection: Any, commands: bytes, num_replies: int) -> list[Any]:
    """Commands and their replies; a connection that fails is closed, and opens itself again when it is next used."""
    try:
        connection.connect()  # where it is not; a connection through Sentinel must be told
        connection.send_packed_command([commands], check_health=False)
        return [connection.read_response(disable_decoding=True) for _ in range(num_replies)]
    except BaseException:
        connection.disconnect()  # replies that are still to come are nobody's
        raise


class _Channel(asyncio.Protocol):
    """A connection that many ask at once: the replies come in the order of the questions, whoever still waits."""

    def __init__(self, connection: Any) -> None:
        """Take over a connection of redis-py's, whose own way of reading costs half as much again."""
        self.waiting: deque[tuple[int, asyncio.Future[list[Any]]]] = deque()
        self.is_open = True
        self._connection = connection
        self._transport = connection._writer.transport
        self._transport.set_protocol(self)
        self._reader = hiredis.Reader(notEnoughData=_NOTHING_YET)
        self._replies: list[Any] = []
        self._loop = asyncio.get_running_loop()
        self._last_reply = self._loop.time()

    async def ask(self, commands: bytes, num_replies: int, *, began: float) -> list[Any]:
        """Send commands and wait for as many replies; an error that Redis answers with is among them.

        Args:
            commands: all of them.
            num_replies: how many there are.
            began: time of the loop since when the request waits, for a connection to begin with.
        """
        answer: asyncio.Future[list[Any]] = self._loop.create_future()
        self.waiting.append((num_replies, answer))
        self._transport.write(commands)
        try:
            return await answer
        except asyncio.CancelledError:
            if self._last_reply < began:  # not a word since: it may be a connection to nobody
                self.close("silent for longer than a request waits")
            raise

    def data_received(self, data: bytes) -> None:
        """Hand complete answers to who asked for them; an answer that nobody waits for any more is dropped."""
        self._reader.feed(data)
        try:
            while (reply := self._reader.gets(False)) is not _NOTHING_YET:
                self._replies.append(reply)
                if len(self._replies) == self.waiting[0][0]:
                    _, answer = self.waiting.popleft()
                    self._last_reply = self._loop.time()
                    if not answer.done():
                        answer.set_result(self._replies)
                    self._replies = []
        except (hiredis.ProtocolError, IndexError) as error:  # IndexError: a reply that nobody has asked for
            self.close(f"no reply of Redis: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell who waits."""
        self.close(str(exc or "by Redis"))

    def close(self, why: str) -> None:
        """Close the connection; who still waits for it gets a ConnectionError."""
        self.is_open = False
        while self.waiting:
            _, answer = self.waiting.popleft()
            if not answer.done():
                answer.set_exception(redis.ConnectionError(f"the connection was closed: {why}"))
        self._transport.abort()
        self._connection._close()


class _Channels:
    """A few connections of one event loop, opened when they are needed.

    Connecting goes on when who began it has given up: a deadline that is shorter than it takes to connect must not keep
    a reader away for ever.
    """

    def __init__(self, pool: Any) -> None:
        self._pool = pool  # redis-py's: it knows how to make a connection
        self._channels: list[_Channel] = []
        self._opening: asyncio.Task[None] | None = None

    async def ask(self, commands: bytes, num_replies: int) -> list[Any]:
        """See `_Channel.ask`."""
        began = asyncio.get_running_loop().time()
        while not (channels := [channel for channel in self._channels if channel.is_open]):
            await asyncio.shield(self._open())  # another's deadline may close it before this call's turn comes
        self._channels = channels
        # A call of thousands of keys holds up who asks after it; they have other connections.
        channel = min(channels, key=lambda one: len(one.waiting))
        if channel.waiting and len(channels) < _CONNECTIONS:
            self._open()
        return await channel.ask(commands, num_replies, began=began)

    async def close(self) -> None:
        """Close all; reads that are under way fail."""
        if self._opening is not None:
            await _ended([self._opening])
        for channel in self._channels:
            channel.close("the reader is closed")

    def _open(self) -> asyncio.Task[None]:
        if self._opening is None or self._opening.done():
            self._opening = asyncio.ensure_future(self._connect())
            self._opening.add_done_callback(_heard)
        return self._opening

    async def _connect(self) -> None:
        connection = self._pool.make_connection()
        connection.retry = Retry(NoBackoff(), 0)  # by default it sleeps for seconds
        connection.socket_timeout = None  # there is a deadline, and a timer for each command is dear
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                await connection.connect()
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        self._channels.append(_Channel(connection))


async def _ended(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until they are done."""
    cancelled = [task for task in tasks if task.cancel()]
    await asyncio.gather(*cancelled, return_exceptions=True)


def _heard(task: asyncio.Future[Any]) -> None:
    """Take note of a task's error, so that asyncio does not complain that nobody has."""
    if not task.cancelled():
        task.exception()
