"""Stop asking a store that does not answer, and find out when it is back."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import IntEnum


class BreakerState(IntEnum):
    """Whether calls go through. The number is what the gauge shows."""

    CLOSED = 0  # all do
    HALF_OPEN = 1  # one does, as a probe
    OPEN = 2  # none does


class CircuitBreaker:
    """Opens after some failures in a row, then lets one call through now and then until one succeeds.

    Source: M. Nygard, Release It!, 2nd ed. 2018, "Circuit Breaker". Not safe for several threads: an event loop's.
    """

    def __init__(
        self,
        *,
        failures: int = 5,
        probe_seconds: float = 0.5,
        clock: Callable[[], float] = time.monotonic,
        on_change: Callable[[BreakerState, BreakerState], None] = lambda old, new: None,
    ) -> None:
        """Begin closed.

        Args:
            failures: in a row, that open it.
            probe_seconds: between two probes. A probe that nobody reports on is forgotten after this time.
            clock: seconds that never go back.
            on_change: called with the old and the new state.

        Raises:
            ValueError: an argument is out of its range.
        """
        if failures < 1 or probe_seconds <= 0:
            raise ValueError(f"failures={failures}, probe_seconds={probe_seconds}: must be at least 1, and above 0")
        self._limit = failures
        self._probe_seconds = probe_seconds
        self._clock = clock
        self._on_change = on_change
        self._failures = 0
        self._next_probe = 0.0
        self.state = BreakerState.CLOSED

    def allows(self) -> bool:
        """Whether a call may go through; whoever is told so reports its outcome."""
        if self.state is BreakerState.CLOSED:
            return True
        now = self._clock()
        if now < self._next_probe:
            return False
        self._next_probe = now + self._probe_seconds
        self._change(BreakerState.HALF_OPEN)
        return True

    def succeeded(self) -> None:
        """A call was answered."""
        self._failures = 0
        if self.state is not BreakerState.CLOSED:
            self._change(BreakerState.CLOSED)

    def failed(self) -> None:
        """A call was not answered."""
        self._failures += 1
        if self.state is BreakerState.CLOSED and self._failures >= self._limit:
            self._next_probe = self._clock() + self._probe_seconds
        if self.state is BreakerState.HALF_OPEN or self._failures >= self._limit:
            self._change(BreakerState.OPEN)

    def _change(self, state: BreakerState) -> None:
        old, self.state = self.state, state
        if old is not state:
            self._on_change(old, state)
