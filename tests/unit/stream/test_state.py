"""One user's state: the same values whatever the order of the events, and whenever it forgets."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from evergreen.stream.state import HORIZON_US, WINDOWS_US, Event, UserState

MINUTE = 60_000_000


def click(minutes: float, item: str = "i", *, offset: int = 0, known: float | None = None) -> Event:
    at = round(minutes * MINUTE)
    return Event("u", item, at, at if known is None else round(known * MINUTE), at, offset)


def state(*events: Event) -> UserState:
    user = UserState()
    for event in events:
        user.add(event)
    return user


def test_event_counts_from_just_after_it_until_just_after_the_window() -> None:
    user = state(click(5))
    counts = [
        (now - 5 * MINUTE, user.values(now)["user_recent_events_10m"])
        for now in (5 * MINUTE, 5 * MINUTE + 1, 15 * MINUTE, 15 * MINUTE + 1)
    ]
    assert counts == [(0, 0), (1, 1), (10 * MINUTE, 1), (10 * MINUTE + 1, 0)]


def test_positive_that_is_not_yet_known_is_not_counted_but_is_due() -> None:
    user = state(click(5, known=15))
    now = 14 * MINUTE
    assert (user.values(now)["user_recent_positives_1h"], user.values(now)["user_recent_items"]) == (0, [])
    assert user.next_change(now) == 15 * MINUTE + 1
    assert user.values(15 * MINUTE + 1)["user_recent_items"] == ["i"]


def test_positives_of_one_instant_keep_the_order_of_their_offsets() -> None:
    user = state(click(5, "second", offset=8), click(5, "first", offset=7))
    assert user.values(6 * MINUTE)["user_recent_items"] == ["first", "second"]


def test_bytes_hold_everything() -> None:
    user = state(click(1, "ä", offset=2**40), click(5, known=15))
    assert UserState.from_bytes(user.to_bytes()) == user


events = st.builds(
    lambda at, delay, offset: Event("u", f"i{offset}", at, None if delay is None else at + delay, at, offset),
    at=st.integers(0, 2 * HORIZON_US),
    delay=st.sampled_from([None, 0, 5 * MINUTE, 90 * MINUTE]),
    offset=st.integers(0, 99),
)


@settings(deadline=None, max_examples=200)
@given(events=st.lists(events, max_size=30), data=st.data())
def test_values_do_not_depend_on_arrival_order_nor_on_when_it_forgot(events: list[Event], data: st.DataObject) -> None:
    arrival = data.draw(st.permutations(events))
    moments = sorted(data.draw(st.lists(st.integers(0, 3 * HORIZON_US), min_size=1, max_size=6)))
    cuts = sorted(data.draw(st.integers(0, len(arrival))) for _ in moments)
    user, taken = UserState(), 0
    for now, cut in zip(moments, cuts, strict=True):
        for event in arrival[taken:cut]:
            user.add(event)
        taken = cut
        user.forget(now)
        assert user.values(now) == state(*arrival[:cut]).values(now)
        assert user.next_change(now) == state(*arrival[:cut]).next_change(now)


@settings(deadline=None, max_examples=200)
@given(events=st.lists(events, max_size=20), now=st.integers(0, 3 * HORIZON_US))
def test_nothing_changes_before_the_next_change_and_something_does_then(events: list[Event], now: int) -> None:
    user = state(*events)
    change = user.next_change(now)
    if change is None:
        assert user.values(now) == user.values(now + 10 * HORIZON_US)
        return
    assert now < change
    assert user.values(change - 1) == user.values(now)
    # An event may enter a window in the very moment in which another leaves it: look at the counts that hide behind.
    moved = [
        at
        for counts in (user.events, user.positives)
        for at, _ in counts
        for delay in (0, *WINDOWS_US.values())
        if at + delay + 1 == change
    ]
    assert moved
