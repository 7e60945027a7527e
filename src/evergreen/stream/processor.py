"""From messages to rows: without Kafka, and safe against being killed anywhere.

The order of a step: bad messages are delivered to the dead letters, then state, place and what is due are saved in one
transaction a partition, then the rows are written, which clears what is due with the next save. Read again from the
saved place, nothing counts twice; a row that was not written is still due.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from evergreen.stream import metrics
from evergreen.stream.clock import Clock, wall_clock, wall_micros
from evergreen.stream.records import Message, Records, Reject
from evergreen.stream.state import HORIZON_US, Event, UserState
from evergreen.stream.store import Mark, PartitionMovedError, StateStore

Row = tuple[str, int, dict[str, int | list[str]]]
"""user_id, event_timestamp in microseconds since 1970, and the features of `user_recent`."""

_CACHED_USERS = 50_000
_DUE_AT_ONCE = 2_000


@dataclass
class _Partition:
    """What this process holds of a partition."""

    mark: Mark | None
    states: OrderedDict[str, UserState] = field(default_factory=OrderedDict)
    """The users seen last; the store has all."""
    written: dict[str, int | None] = field(default_factory=dict)
    """Users whose row was written since the last save, and when it is next due."""


class Processor:
    """The features of the last minutes, partition by partition."""

    def __init__(
        self,
        records: Records,
        store: StateStore,
        *,
        clock: Clock,
        write: Callable[[Sequence[Row]], None],
        reject: Callable[[Sequence[Reject]], None],
        judge: Callable[[Event], Iterable[str]] | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            records: checks messages.
            store: of the topic.
            clock: says what time it is for a partition.
            write: writes rows to the online store; the newest of a user is kept there.
            reject: delivers bad messages to the dead letters before it returns.
            judge: the rules of fraud that an event breaks. They are counted; the event stays in the features of its
                own user, so that a replay, which the rules' state does not outlive, gives the same values.
        """
        self._records = records
        self._store = store
        self._clock = clock
        self._write = write
        self._reject = reject
        self._judge = judge
        self._partitions: dict[int, _Partition] = {}

    def open(self, partitions: Iterable[int]) -> dict[int, Mark | None]:
        """Take over these partitions and no others; returns where each goes on, None for one that is new."""
        self._partitions = {p: _Partition(self._store.mark(p)) for p in partitions}
        return self.marks

    @property
    def marks(self) -> dict[int, Mark | None]:
        """How far each partition has been read and saved."""
        return {p: partition.mark for p, partition in self._partitions.items()}

    def check_marks(self) -> None:
        """Notice a store that restarted empty or from an older copy, though nothing happens.

        Raises:
            PartitionMovedError: a partition is not where this process left it.
        """
        for number, mark in self.marks.items():
            if (found := self._store.mark(number)) != mark:
                raise PartitionMovedError(f"partition {number}: the state store is at {found}, not at {mark}")

    def process(self, messages: Sequence[Message]) -> None:
        """Take messages in, and write the rows that changed, also by time alone.

        Raises:
            PartitionMovedError: somebody else has a partition now: `open` again.
            Exception: the stores' own; what was not saved must be read again after `open`.
        """
        fresh = [m for m in messages if m.partition in self._partitions and not self._is_replay(m)]
        checked = self._records.check(fresh)
        if checked.rejects:
            self._reject(checked.rejects)
        rows: list[Row] = []
        for number, partition in self._partitions.items():
            events = [event for message, event in checked.events if message.partition == number]
            offsets = [message.offset for message in fresh if message.partition == number]
            rows += self._step(number, partition, events, max(offsets, default=-1) + 1)
        if rows:
            self._write(rows)
        self._count(messages, fresh, [event for _, event in checked.events], rows)
        if self._judge is not None:
            for _, event in checked.events:
                for rule in self._judge(event):
                    metrics.SUSPICIOUS.labels(rule).inc()
        for reason, count in checked.left_out.items():
            metrics.LEFT_OUT.labels(reason).inc(count)
        for rejected in checked.rejects:
            metrics.DEAD_LETTERS.labels(rejected.reason).inc()

    def _is_replay(self, message: Message) -> bool:
        mark = self._partitions[message.partition].mark
        return mark is not None and message.offset < mark.offset

    def _step(self, number: int, partition: _Partition, events: Sequence[Event], next_offset: int) -> list[Row]:
        """Bring one partition forward and save it; returns the rows to write."""
        before = partition.mark
        if before is None and next_offset == 0:
            return []
        now = self._clock(0 if before is None else before.clock, [event.seen for event in events])
        changed = dict.fromkeys(event.user_id for event in events)
        waiting = self._store.due(number, now, _DUE_AT_ONCE)
        due = [user for user in waiting if not self._is_written(partition, user, now)]
        users = list(changed | dict.fromkeys(due))
        if not users and not partition.written and next_offset == 0:
            return []
        self._load(number, partition, users)
        for event in events:
            partition.states[event.user_id].add(event)
        rows: list[Row] = []
        next_due: dict[str, int | None] = {}
        for user in users:
            state = partition.states[user]
            state.forget(now)
            rows.append((user, now, state.values(now)))
            next_due[user] = state.next_change(now)
        offset = max(next_offset, 0 if before is None else before.offset)
        after = Mark(offset, now, 1 if before is None else before.number + 1)
        states = {user: partition.states[user].to_bytes() for user in changed}
        self._store.save(number, before, after, states, partition.written | dict.fromkeys(users, now))
        partition.mark, partition.written = after, next_due
        while len(partition.states) > _CACHED_USERS:
            partition.states.popitem(last=False)
        return rows

    @staticmethod
    def _is_written(partition: _Partition, user: str, now: int) -> bool:
        """Whether a user whom the store has as due was dealt with, which the next save will say."""
        if user not in partition.written:
            return False
        next_due = partition.written[user]
        return next_due is None or next_due > now

    def _load(self, number: int, partition: _Partition, users: Sequence[str]) -> None:
        unknown = [user for user in users if user not in partition.states]
        for user, data in zip(unknown, self._store.load(number, unknown), strict=True):
            partition.states[user] = UserState() if data is None else UserState.from_bytes(data)
        for user in users:
            partition.states.move_to_end(user)

    def _count(
        self, messages: Sequence[Message], fresh: Sequence[Message], events: Sequence[Event], rows: Sequence[Row]
    ) -> None:
        metrics.REPLAYED.inc(len(messages) - len(fresh))
        metrics.EVENTS.inc(len(events))
        metrics.ROWS.inc(len(rows))
        written_at = {user: now for user, now, _ in rows}
        metrics.LATE_EVENTS.inc(sum(event.at < written_at[event.user_id] - HORIZON_US for event in events))
        if self._clock is wall_clock:
            now = wall_micros()
            for event in events:
                metrics.FRESHNESS.observe((now - event.seen) / 1e6)
