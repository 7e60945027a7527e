"""What only a stream has: bounded memory, and events that come late."""

from __future__ import annotations

import sys
from dataclasses import fields

from evergreen.contracts.mapping import LogKind
from evergreen.fraud.rules import Limits, Reason
from evergreen.fraud.streaming import EventRules, _User
from tests.unit.fraud.conftest import event

LIMITS = Limits(click_rate=0.02)


def _size(user: _User) -> int:
    """How many things a user's state holds."""
    values = [getattr(user, field.name) for field in fields(user)]
    return sum(len(value) if hasattr(value, "__len__") else sys.getsizeof(value) > 0 for value in values)


def test_state_of_a_user_stops_growing() -> None:
    rules = EventRules(LIMITS, LogKind.IMPRESSIONS)
    sizes = []
    for n in range(5_000):
        rules.update(event("u", f"i{n % 50}", 0.5 * n, request=f"r{n}"))
        sizes.append(_size(rules._users.get("u")))
    assert max(sizes) == sizes[1_000] < 400


def test_users_beyond_the_limit_are_forgotten_and_counted() -> None:
    rules = EventRules(LIMITS, LogKind.IMPRESSIONS, max_users=10)
    for n in range(25):
        rules.update(event(f"u{n}", "i", float(n)))
    assert rules.forgotten == 15


def test_the_user_who_was_seen_last_is_kept() -> None:
    rules = EventRules(LIMITS, LogKind.IMPRESSIONS, max_users=2)
    reasons = []
    for n in range(30):
        reasons += rules.update(event("bot", "i", float(n), clicked=False))
        rules.update(event(f"u{n}", "i", float(n), clicked=False))
    assert Reason.VELOCITY in reasons


def test_late_event_is_counted_and_judged_as_if_it_came_with_the_last() -> None:
    rules = EventRules(Limits(requests_per_minute=3), LogKind.INTERACTIONS)
    for at in (100.0, 101.0, 102.0):
        assert rules.update(event("u", "i", at, request=f"r{at}")) == ()
    assert rules.update(event("u", "j", 40.0, request="late")) == ()
    assert rules.late == 1
    assert rules.update(event("u", "k", 103.0, request="r103")) == (Reason.VELOCITY,)


def test_a_clock_that_jumps_back_for_all_does_not_disturb_the_others() -> None:
    rules = EventRules(LIMITS, LogKind.IMPRESSIONS)
    rules.update(event("u", "i", 1e6))
    assert rules.update(event("v", "i", 10.0)) == ()
    assert rules.update(event("u", "j", 10.0)) == ()
    assert rules.late == 1
