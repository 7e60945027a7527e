"""When calls go through, and when they are spared."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evergreen.serving.circuit_breaker import BreakerState, CircuitBreaker


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def changes() -> list[tuple[str, str]]:
    return []


@pytest.fixture
def breaker(clock: Clock, changes: list[tuple[str, str]]) -> CircuitBreaker:
    return CircuitBreaker(
        failures=3,
        probe_seconds=0.5,
        clock=clock,
        on_change=lambda old, new: changes.append((old.name, new.name)),
    )


def fail(breaker: CircuitBreaker, times: int) -> None:
    for _ in range(times):
        assert breaker.allows()
        breaker.failed()


def test_failures_that_are_not_in_a_row_do_not_open(breaker: CircuitBreaker) -> None:
    fail(breaker, 2)
    breaker.succeeded()
    fail(breaker, 2)
    assert breaker.state is BreakerState.CLOSED


def test_failures_in_a_row_open_until_a_probe_is_due(breaker: CircuitBreaker, clock: Clock) -> None:
    fail(breaker, 3)
    assert breaker.state is BreakerState.OPEN
    assert not breaker.allows()
    clock.now += 0.49
    assert not breaker.allows()
    clock.now += 0.02
    assert breaker.allows()


def test_one_call_probes_and_others_do_not_wait_for_it(breaker: CircuitBreaker, clock: Clock) -> None:
    fail(breaker, 3)
    clock.now += 0.5
    assert [breaker.allows() for _ in range(8)] == [True] + [False] * 7
    assert breaker.state is BreakerState.HALF_OPEN


def test_probe_that_is_answered_closes(breaker: CircuitBreaker, clock: Clock, changes: list[tuple[str, str]]) -> None:
    fail(breaker, 3)
    clock.now += 0.5
    assert breaker.allows()
    breaker.succeeded()
    assert breaker.state is BreakerState.CLOSED
    assert changes == [("CLOSED", "OPEN"), ("OPEN", "HALF_OPEN"), ("HALF_OPEN", "CLOSED")]
    fail(breaker, 2)  # it counts from the beginning
    assert breaker.state is BreakerState.CLOSED


def test_probe_that_fails_opens_for_another_while(breaker: CircuitBreaker, clock: Clock) -> None:
    fail(breaker, 3)
    clock.now += 0.5
    fail(breaker, 1)
    assert breaker.state is BreakerState.OPEN
    assert not breaker.allows()
    clock.now += 0.5
    assert breaker.allows()


def test_probe_that_nobody_reports_on_is_followed_by_another(breaker: CircuitBreaker, clock: Clock) -> None:
    fail(breaker, 3)
    clock.now += 0.5
    assert breaker.allows()  # its caller went away
    clock.now += 0.5
    assert breaker.allows()


def test_calls_that_were_under_way_when_it_opened_change_nothing(
    breaker: CircuitBreaker, clock: Clock, changes: list[tuple[str, str]]
) -> None:
    assert all(breaker.allows() for _ in range(8))
    for _ in range(8):
        breaker.failed()
        clock.now += 0.01
    assert changes == [("CLOSED", "OPEN")]
    clock.now += 0.45  # half a second after it opened, not after the last of them
    assert breaker.allows()


@given(st.lists(st.tuples(st.floats(0, 0.3), st.booleans()), max_size=60))
def test_while_a_store_is_away_it_is_asked_at_most_every_half_second(steps: list[tuple[float, bool]]) -> None:
    clock = Clock()
    breaker = CircuitBreaker(failures=1, probe_seconds=0.5, clock=clock)
    breaker.failed()
    asked = [clock.now]
    for pause, reports in steps:
        clock.now += pause
        if breaker.allows():
            asked.append(clock.now)
            if reports:
                breaker.failed()
    assert all(later - earlier >= 0.5 for earlier, later in itertools.pairwise(asked))
    assert clock.now - asked[-1] < 0.5 + 0.3


@pytest.mark.parametrize("options", [{"failures": 0}, {"probe_seconds": 0.0}])
def test_settings_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        CircuitBreaker(**options)
