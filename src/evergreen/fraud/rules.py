"""Rules that say which events no person made, as SQL over a snapshot. `streaming` keeps the same rules as state.

Every rule is causal: an event's verdict depends on the events up to it alone, in the order (event_timestamp, event_id).
So a stream can give the same verdict, and a rule that is calibrated (`Limits.click_rate`) says on what.

    velocity        more requests in a minute, or in an hour, than a person can make. A request is all that a user is
                    shown at one time, however many rows it has.
    click_rate      impressions only: the user's clicks of the day so far are too many even for a person who clicks
                    `plausible_factor` times what people click.
    no_clicks       impressions only: never a click, in more impressions than a person who clicks that much less.
    regular_clicks  the last gaps between a user's clicks are nearly equal: their standard deviation is a small part
                    of their mean.
    repeated_click  the same item of the same request again and again: a click without an impression of its own.
    account_burst   an item is clicked by accounts not a day old, far more than their share of all clicks explains.

"Too many" is a tail of the binomial distribution below `alpha`, by Chernoff's bound, which has a closed form that is
the same in SQL and in Python:  P(K >= k) <= exp(-n KL(k/n || p)).
"""

from __future__ import annotations

import math
from enum import StrEnum

import duckdb
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from evergreen.contracts.artifact import JsonModel
from evergreen.contracts.mapping import LogKind

MINUTE, HOUR, DAY = 60_000_000, 3_600_000_000, 86_400_000_000
"""In microseconds, which is how times are counted here."""

SAME_PAGE_MS = 1_000
"""Clicks nearer than this are two on one page, and no pace; who keeps it up is caught by `velocity`."""
RECENT_CLICKS = 64
"""How many of a user's last clicks the rules remember."""


class Reason(StrEnum):
    """Why an event is suspicious."""

    VELOCITY = "velocity"
    CLICK_RATE = "click_rate"
    NO_CLICKS = "no_clicks"
    REGULAR_CLICKS = "regular_clicks"
    REPEATED_CLICK = "repeated_click"
    ACCOUNT_BURST = "account_burst"
    ANOMALY = "anomaly"
    """Not a rule: the detector's verdict on a user's window."""


RULES = tuple(reason for reason in Reason if reason is not Reason.ANOMALY)


class Limits(JsonModel):
    """Where the rules draw the line."""

    requests_per_minute: int = Field(default=20, ge=1)
    requests_per_hour: int = Field(default=240, ge=1)
    alpha: float = Field(default=1e-6, gt=0, lt=0.1)
    """How likely chance may make a person break `click_rate`, `no_clicks` or `account_burst` at one look."""
    plausible_factor: float = Field(default=5.0, gt=1)
    """A person may click so many times as much, or as little, as people do in the mean."""
    click_rate: float = Field(default=0.0, ge=0, le=1)
    """What people click in the mean. 0: unknown, and the two rules that need it are silent; see `calibrate`."""
    regular_gaps: int = Field(default=6, ge=3, le=RECENT_CLICKS - 1)
    """How many gaps must be alike."""
    regular_spread: float = Field(default=0.1, gt=0, lt=1)
    """Standard deviation over mean, below which gaps are alike. People's are around 1."""
    longest_gap_seconds: int = Field(default=3_600, ge=1, le=86_400)
    """A longer gap is a pause, not a pace."""
    repeats: int = Field(default=1, ge=1)
    """How often an item of one request may be clicked."""
    new_account_hours: int = Field(default=24, ge=1)
    burst_accounts: int = Field(default=5, ge=2)
    """New accounts on one item in an hour, below which there is no burst."""

    @property
    def evidence(self) -> float:
        """Evidence that breaks a rule, in nats."""
        return -math.log(self.alpha)

    @property
    def silence(self) -> float:
        """Impressions without any click that break `no_clicks`; infinite while the click rate is unknown."""
        rate = self.click_rate / self.plausible_factor
        return self.evidence / -math.log1p(-rate) if rate > 0 else math.inf

    @property
    def highest_rate(self) -> float:
        """The click rate of the most eager person there may be; 1 while people's is unknown: no rate is too high."""
        return min(self.click_rate * self.plausible_factor, 1.0) if self.click_rate > 0 else 1.0


def limits_for(kind: LogKind) -> Limits:
    """The usual limits for a kind of log.

    Of an impression one click is made, of an item several interactions (it is read, liked, read again). Songs of about
    one length are no machine's, and who rates what they have seen goes through a list, one item a second or two.
    """
    if kind is LogKind.IMPRESSIONS:
        return Limits()
    many = Limits(repeats=10, regular_gaps=10, regular_spread=0.05)
    if kind is LogKind.INTERACTIONS:
        return many
    return many.model_copy(update={"requests_per_minute": 60, "requests_per_hour": 1_200, "regular_gaps": 20})


def evidence(clicks: int, trials: int, rate: float) -> float:
    """How surprising so many clicks are, in nats: -log of Chernoff's bound on P(K >= clicks). 0: not too many.

    Args:
        clicks: of `trials`.
        trials: at least 1.
        rate: of a click, below 1.
    """
    if clicks <= trials * rate:
        return 0.0
    missed = trials - clicks
    surprise = clicks * math.log(clicks / (trials * rate))
    return surprise + missed * math.log(missed / (trials * (1 - rate))) if missed else surprise


def calibrate(impressions: NDArray[np.int64], clicks: NDArray[np.int64], limits: Limits) -> Limits:
    """Set `click_rate` to that of people: users who break it themselves do not count, until nothing changes.

    Args:
        impressions: (n,) of each user.
        clicks: (n,) of each user.
        limits: where to draw the line.
    """
    person = np.ones(len(clicks), dtype=bool)
    while True:
        shown, clicked = int(impressions[person].sum()), int(clicks[person].sum())
        limits = limits.model_copy(update={"click_rate": clicked / shown if shown else 0.0})
        rate = limits.highest_rate
        suspects = np.flatnonzero(person & (clicks > impressions * rate))
        bots = [i for i in suspects if evidence(int(clicks[i]), int(impressions[i]), rate) > limits.evidence]
        if not bots:
            return limits
        person[bots] = False


def _evidence_sql(clicks: str, trials: str, rate: str) -> str:
    """`evidence` in SQL."""
    return (
        f"CASE WHEN {clicks} <= {trials} * {rate} THEN 0.0 "
        f"WHEN {clicks} = {trials} THEN {clicks} * ln({clicks} / ({trials} * {rate})) "
        f"ELSE {clicks} * ln({clicks} / ({trials} * {rate})) "
        f"+ ({trials} - {clicks}) * ln(({trials} - {clicks}) / ({trials} * (1 - {rate}))) END"
    )


def _double(value: float) -> str:
    """A number as DuckDB's DOUBLE: 0.1 alone would be a DECIMAL, whose products are others."""
    return f"{value!r}::DOUBLE"


def broken_rules(db: duckdb.DuckDBPyConnection, limits: Limits, kind: LogKind) -> None:
    """Create table `broken` (event_id, reason): every event that breaks a rule, once for each.

    Args:
        db: with a table or view `judged` as `judged_events` makes it.
        limits: where the rules draw the line.
        kind: of the log.
    """
    queries = [_velocity(limits), _regular_clicks(limits), _repeated_click(limits), _account_burst(limits)]
    if kind is LogKind.IMPRESSIONS and limits.click_rate > 0:
        queries += [_click_rate(limits), _no_clicks(limits)]
    db.execute("CREATE TABLE broken (event_id BIGINT, reason VARCHAR)")
    db.execute(_CLICKS_SQL)
    for query in queries:
        db.execute(f"INSERT INTO broken {query}")
    db.execute("DROP TABLE clicks")


def judged_events(db: duckdb.DuckDBPyConnection, files: list[str], kind: LogKind) -> None:
    """Create table `judged`: what the rules look at, one row an event of a known user.

    Columns: event_id, user_id, item_id, request (text), category, position, t (microseconds since 1970), day (t's),
    clicked (a click, an interaction or a rating), clicked_at (microseconds), dwell_seconds.
    """
    columns = {row[0] for row in db.execute("DESCRIBE SELECT * FROM read_parquet($1)", [files]).fetchall()}
    t = "epoch_us(event_timestamp)"
    clicked_at = f"coalesce(epoch_us(click_timestamp), {t})" if "click_timestamp" in columns else t
    clicked = {LogKind.IMPRESSIONS: "coalesce(clicked, false)", LogKind.RATINGS: "rating IS NOT NULL"}.get(kind, "true")
    db.execute(
        f"""CREATE TABLE judged AS
        SELECT event_id, user_id, item_id, coalesce(request_id, {t}::VARCHAR) AS request, category, position,
               {t} AS t, {t} // {DAY} AS day, {clicked} AS clicked, {clicked_at} AS clicked_at, dwell_seconds
        FROM read_parquet($1, hive_partitioning = false) WHERE user_id IS NOT NULL""",
        [files],
    )


# A user's clicks in order, and since when the user is known.
_CLICKS_SQL = """
CREATE TABLE clicks AS
SELECT event_id, user_id, item_id, request, t, clicked_at, first_seen,
       row_number() OVER (PARTITION BY user_id ORDER BY t, event_id) AS place
FROM judged JOIN (SELECT user_id, min(t) AS first_seen FROM judged GROUP BY user_id) USING (user_id)
WHERE clicked
"""


def _velocity(limits: Limits) -> str:
    return f"""
    WITH paced AS (
        SELECT user_id, t,
               count(*) OVER (PARTITION BY user_id ORDER BY t RANGE BETWEEN {MINUTE - 1} PRECEDING AND CURRENT ROW)
                   > {limits.requests_per_minute}
               OR count(*) OVER (PARTITION BY user_id ORDER BY t RANGE BETWEEN {HOUR - 1} PRECEDING AND CURRENT ROW)
                   > {limits.requests_per_hour} AS fast
        FROM (SELECT DISTINCT user_id, t FROM judged)
    )
    SELECT event_id, '{Reason.VELOCITY}' FROM judged JOIN paced USING (user_id, t) WHERE fast"""


def _click_rate(limits: Limits) -> str:
    too_many = _evidence_sql("clicks", "shown", _double(limits.highest_rate))
    return f"""
    WITH counted AS (
        SELECT event_id, count(*) OVER so_far AS shown, count(*) FILTER (clicked) OVER so_far AS clicks
        FROM judged WINDOW so_far AS (PARTITION BY user_id, day ORDER BY t, event_id ROWS UNBOUNDED PRECEDING)
    )
    SELECT event_id, '{Reason.CLICK_RATE}' FROM counted WHERE {too_many} > {_double(limits.evidence)}"""


def _no_clicks(limits: Limits) -> str:
    return f"""
    WITH counted AS (
        SELECT event_id, count(*) OVER so_far AS shown, count(*) FILTER (clicked) OVER so_far AS clicks
        FROM judged WINDOW so_far AS (PARTITION BY user_id ORDER BY t, event_id ROWS UNBOUNDED PRECEDING)
    )
    SELECT event_id, '{Reason.NO_CLICKS}' FROM counted WHERE clicks = 0 AND shown > {_double(limits.silence)}"""


def _regular_clicks(limits: Limits) -> str:
    # Whole milliseconds up to an hour or so: the sums of squares are exact in float64.
    longest = limits.longest_gap_seconds * 1000
    return f"""
    WITH gaps AS (
        SELECT event_id, user_id, place,
               least(abs(clicked_at - lag(clicked_at) OVER in_order) // 1000, {longest + 1}) AS gap
        FROM clicks WINDOW in_order AS (PARTITION BY user_id ORDER BY place)
    ), sums AS (
        SELECT event_id, count(gap) OVER last AS num, max(gap) OVER last AS longest,
               sum(gap) OVER last AS total, sum(gap * gap) OVER last AS squares
        FROM gaps WHERE gap >= {SAME_PAGE_MS}
        WINDOW last AS (PARTITION BY user_id ORDER BY place ROWS {limits.regular_gaps - 1} PRECEDING)
    )
    SELECT event_id, '{Reason.REGULAR_CLICKS}' FROM sums
    WHERE num = {limits.regular_gaps} AND longest <= {longest}
      AND (num * squares - total * total)::DOUBLE < {_double(limits.regular_spread**2)} * (total * total)::DOUBLE"""


def _repeated_click(limits: Limits) -> str:
    return f"""
    WITH counted AS (
        SELECT event_id, count(*) OVER (PARTITION BY user_id, request, item_id ORDER BY place
                                        RANGE BETWEEN {RECENT_CLICKS - 1} PRECEDING AND CURRENT ROW) AS times
        FROM clicks
    )
    SELECT event_id, '{Reason.REPEATED_CLICK}' FROM counted WHERE times > {limits.repeats}"""


def _account_burst(limits: Limits) -> str:
    """A user's first click on an item, among the last `RECENT_CLICKS`, is a vote; votes of new accounts are counted.

    Their share is compared with that of all votes in the 24 full hours before. A range of times holds the events of the
    same microsecond that come `later`: a stream has not seen them yet.
    """
    too_many = _evidence_sql("fresh", "votes", "share")
    return f"""
    WITH votes AS (
        SELECT event_id, item_id, t, t // {HOUR} AS hour, t - first_seen < {limits.new_account_hours * HOUR} AS is_new
        FROM clicks WHERE item_id IS NOT NULL
        QUALIFY place - lag(place, 1, -{RECENT_CLICKS}::BIGINT)
                OVER (PARTITION BY user_id, item_id ORDER BY place) >= {RECENT_CLICKS}
    ), hours AS (
        SELECT hour, sum(votes) OVER before AS votes, sum(fresh) OVER before AS fresh
        FROM (SELECT hour, count(*) AS votes, count(*) FILTER (is_new) AS fresh FROM votes GROUP BY hour)
        WINDOW before AS (ORDER BY hour RANGE BETWEEN 24 PRECEDING AND 1 PRECEDING)
    ), counted AS (
        SELECT event_id, is_new,
               count(*) OVER last - count(*) OVER later AS votes,
               count(*) FILTER (is_new) OVER last - count(*) FILTER (is_new) OVER later AS fresh,
               (coalesce(hours.fresh, 0) + 1) / (coalesce(hours.votes, 0) + 1) AS share
        FROM votes JOIN hours USING (hour)
        WINDOW last AS (PARTITION BY item_id ORDER BY t RANGE BETWEEN {HOUR - 1} PRECEDING AND CURRENT ROW),
               later AS (PARTITION BY item_id, t ORDER BY event_id ROWS BETWEEN 1 FOLLOWING AND UNBOUNDED FOLLOWING)
    )
    SELECT event_id, '{Reason.ACCOUNT_BURST}' FROM counted
    WHERE is_new AND fresh >= {limits.burst_accounts} AND share < 1 AND {too_many} > {_double(limits.evidence)}"""
