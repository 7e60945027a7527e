"""The users of a call from the online store; defaults, flagged, when it is slow or gone."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from prometheus_client import Counter, Gauge, Histogram

from evergreen.features.online_reader import OnlineReader, OnlineReadError, ReadFailure
from evergreen.features.online_user import OnlineUser
from evergreen.serving.circuit_breaker import BreakerState, CircuitBreaker

_DAY = 86_400.0
_QUIET_SECONDS = 60.0  # between two lines about rows that cannot be decoded

FAILURES = Counter("evergreen_online_store_failures", "Reads of users that failed.", ["reason"])
STATE = Gauge("evergreen_online_store_breaker", "0: the store is asked; 1: one read tries it; 2: it is left alone.")
AGE = Histogram(
    "evergreen_feature_age_seconds",
    "Seconds since a known user's features last changed, when they were read.",
    buckets=(1.0, 10.0, 60.0, 600.0, 3600.0, 6 * 3600.0, _DAY, 2 * _DAY, 7 * _DAY, 30 * _DAY, 90 * _DAY),
)

for _reason in ReadFailure:  # a counter that does not exist until its first failure cannot be alarmed on
    FAILURES.labels(_reason.value)

logger = logging.getLogger(__name__)


class UserFeatures:
    """Users as an `OnlineReader` gives them, with a way on when it gives none. For one event loop."""

    def __init__(
        self,
        reader: OnlineReader,
        *,
        failures: int = 5,
        probe_seconds: float = 0.5,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Begin with trust in the store.

        Args:
            reader: of the store; closed with this.
            failures: reads in a row without an answer after which the store is left alone …
            probe_seconds: … but for one read every so often, until one is answered.
            clock: Unix seconds now.
        """
        self._reader = reader
        self._clock = clock
        self._breaker = CircuitBreaker(failures=failures, probe_seconds=probe_seconds, on_change=self._changed)
        STATE.set(self._breaker.state)
        self._last_error: OnlineReadError | None = None
        self._away_since = 0.0
        self._num_degraded = 0
        self._told_at = float("-inf")
        self.user_features = reader.user_features
        self.pair_features = reader.pair_features

    def nobody(self, num_categories: int) -> OnlineUser:
        """A user of whom nothing is known."""
        return self._reader.nobody(num_categories)

    async def get(self, asked: Sequence[tuple[str, Sequence[str]]]) -> tuple[list[OnlineUser], bool]:
        """The users of one call, in one round trip.

        Args:
            asked: user ids, and the categories to read for each.

        Returns:
            (num_asked) users, and whether they are defaults because the store did not answer; then each is as `nobody`.
        """
        if self._breaker.allows():
            try:
                users = await self._reader.read(asked)
            except OnlineReadError as error:
                self._failed(error)
            else:
                self._breaker.succeeded()
                now = self._clock()
                for user in users:
                    if user.updated_at is not None:
                        AGE.observe(now - user.updated_at)
                return users, False
        self._num_degraded += len(asked)
        return [self.nobody(len(categories)) for _, categories in asked], True

    async def close(self) -> None:
        """Close the reader."""
        await self._reader.close()

    def _failed(self, error: OnlineReadError) -> None:
        FAILURES.labels(error.reason.value).inc()
        self._last_error = error
        if error.reason is ReadFailure.DECODING:  # the store is there; it is this user's row that is broken
            self._breaker.succeeded()
            if self._clock() - self._told_at > _QUIET_SECONDS:
                self._told_at = self._clock()
                logger.warning("a user gets default features: %s", error)
        else:
            self._breaker.failed()

    def _changed(self, old: BreakerState, new: BreakerState) -> None:
        STATE.set(new)
        if old is BreakerState.CLOSED:
            self._away_since = self._clock()
            self._num_degraded = 0
            logger.warning("requests get default features until the online store is back: %s", self._last_error)
        elif new is BreakerState.CLOSED:
            seconds = self._clock() - self._away_since
            logger.info(
                "the online store is back after %.1f s; %d users got default features", seconds, self._num_degraded
            )
