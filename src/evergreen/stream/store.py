"""Where the stream keeps its state: by partition, with the place in the partition that it is the state of.

A save is one transaction that happens only if nobody else has saved since: it compares the partition's mark. So a
consumer that was taken for dead and wakes up cannot write over the work of the one that took its partition.

`due` says when a user's row must be written again. In the transaction that changes a user's state it is set to now, and
only after the row has been written to its next change: what a crash between the two left undone is then still due.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import orjson


@dataclass(frozen=True, slots=True)
class Mark:
    """How far a partition has been read."""

    offset: int
    """The next message."""
    clock: int
    """The partition's time, in microseconds since 1970."""
    number: int
    """How many times the partition was saved: no two marks of a partition are alike."""

    def to_bytes(self) -> bytes:
        """As JSON."""
        return orjson.dumps([self.offset, self.clock, self.number])

    @classmethod
    def from_bytes(cls, data: bytes) -> Mark:
        """Read back."""
        return cls(*orjson.loads(data))


class PartitionMovedError(Exception):
    """Somebody else has saved the partition, or the store has lost it."""


class StateStore(Protocol):
    """State of the users of a topic's partitions."""

    def mark(self, partition: int) -> Mark | None:
        """How far a partition has been read; None: not at all."""

    def load(self, partition: int, users: Sequence[str]) -> list[bytes | None]:
        """(num_users) their states; None: unknown."""

    def due(self, partition: int, now: int, limit: int) -> list[str]:
        """Users whose row must be written at `now`, those first that have waited longest."""

    def save(
        self,
        partition: int,
        before: Mark | None,
        after: Mark,
        states: Mapping[str, bytes],
        due: Mapping[str, int | None],
    ) -> None:
        """Save all or nothing.

        Args:
            partition: of the topic.
            before: the mark that the state was computed from.
            after: the mark that it is the state of.
            states: of the users that changed.
            due: when their rows must be written again; None: never.

        Raises:
            PartitionMovedError: the mark is not `before`; nothing was saved.
        """


_SAVE = """
local mark = redis.call('GET', KEYS[1]) or ''
if mark ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
local last_state = 3 + 2 * tonumber(ARGV[3])
for i = 4, last_state, 2 do redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1]) end
for i = last_state + 1, #ARGV, 2 do
  if ARGV[i + 1] == '' then redis.call('ZREM', KEYS[3], ARGV[i])
  else redis.call('ZADD', KEYS[3], ARGV[i + 1], ARGV[i]) end
end
return 1
"""


class RedisStateStore:
    """In Redis: three keys a partition, with one hash tag, so that a cluster keeps them together."""

    def __init__(self, client: Any, project: str, topic: str) -> None:
        self._client = client
        self._prefix = f"evergreen:{project}:{topic}"
        self._save = client.register_script(_SAVE)

    def mark(self, partition: int) -> Mark | None:
        """See `StateStore`."""
        data = self._client.get(self._keys(partition)[0])
        return None if data is None else Mark.from_bytes(data)

    def load(self, partition: int, users: Sequence[str]) -> list[bytes | None]:
        """See `StateStore`."""
        if not users:
            return []
        states: list[bytes | None] = self._client.hmget(self._keys(partition)[1], users)
        return states

    def due(self, partition: int, now: int, limit: int) -> list[str]:
        """See `StateStore`."""
        users = self._client.zrangebyscore(self._keys(partition)[2], "-inf", now, start=0, num=limit)
        return [user.decode() for user in users]

    def save(
        self,
        partition: int,
        before: Mark | None,
        after: Mark,
        states: Mapping[str, bytes],
        due: Mapping[str, int | None],
    ) -> None:
        """See `StateStore`."""
        arguments: list[Any] = [b"" if before is None else before.to_bytes(), after.to_bytes(), len(states)]
        for user, state in states.items():
            arguments += [user, state]
        for user, at in due.items():
            arguments += [user, "" if at is None else at]
        if not self._save(keys=self._keys(partition), args=arguments):
            raise PartitionMovedError(f"partition {partition} is no longer at {before}")

    def _keys(self, partition: int) -> list[str]:
        tag = f"{self._prefix}:{{{partition}}}"
        return [f"{tag}:mark", f"{tag}:states", f"{tag}:due"]


class SqliteStateStore:
    """In a SQLite file: for one consumer on one machine."""

    def __init__(self, path: Path, topic: str) -> None:
        self._topic = topic
        self._db = sqlite3.connect(path, isolation_level=None, timeout=30)
        self._db.execute("PRAGMA journal_mode = WAL")
        for table in (
            "mark (topic, partition, mark, PRIMARY KEY (topic, partition))",
            "state (topic, partition, user, state, PRIMARY KEY (topic, partition, user))",
            "due (topic, partition, user, at, PRIMARY KEY (topic, partition, user))",
        ):
            self._db.execute(f"CREATE TABLE IF NOT EXISTS {table} WITHOUT ROWID")
        self._db.execute("CREATE INDEX IF NOT EXISTS due_at ON due (topic, partition, at)")

    def mark(self, partition: int) -> Mark | None:
        """See `StateStore`."""
        row = self._db.execute(
            "SELECT mark FROM mark WHERE topic = ? AND partition = ?", (self._topic, partition)
        ).fetchone()
        return None if row is None else Mark.from_bytes(row[0])

    def load(self, partition: int, users: Sequence[str]) -> list[bytes | None]:
        """See `StateStore`."""
        one = "SELECT state FROM state WHERE topic = ? AND partition = ? AND user = ?"
        rows = [self._db.execute(one, (self._topic, partition, user)).fetchone() for user in users]
        return [None if row is None else row[0] for row in rows]

    def due(self, partition: int, now: int, limit: int) -> list[str]:
        """See `StateStore`."""
        query = "SELECT user FROM due WHERE topic = ? AND partition = ? AND at <= ? ORDER BY at LIMIT ?"
        return [user for (user,) in self._db.execute(query, (self._topic, partition, now, limit))]

    def save(
        self,
        partition: int,
        before: Mark | None,
        after: Mark,
        states: Mapping[str, bytes],
        due: Mapping[str, int | None],
    ) -> None:
        """See `StateStore`."""
        place = (self._topic, partition)
        self._db.execute("BEGIN IMMEDIATE")
        try:
            if self.mark(partition) != before:
                raise PartitionMovedError(f"partition {partition} is no longer at {before}")
            self._db.execute("INSERT OR REPLACE INTO mark VALUES (?, ?, ?)", (*place, after.to_bytes()))
            self._db.executemany(
                "INSERT OR REPLACE INTO state VALUES (?, ?, ?, ?)", [(*place, *pair) for pair in states.items()]
            )
            self._db.executemany(
                "INSERT OR REPLACE INTO due VALUES (?, ?, ?, ?)",
                [(*place, user, at) for user, at in due.items() if at is not None],
            )
            self._db.executemany(
                "DELETE FROM due WHERE topic = ? AND partition = ? AND user = ?",
                [(*place, user) for user, at in due.items() if at is None],
            )
        except BaseException:
            if self._db.in_transaction:  # SQLite itself rolls back when the disk is full
                self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")
