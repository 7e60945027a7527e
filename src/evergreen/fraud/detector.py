"""The detector: users whose window of days is unlike that of people, though it breaks no rule. Unsupervised.

A bot that keeps people's pace and hours still does not like what people like. For a log of impressions, three measures
of a user's window, each high for a bot:

    excess     more clicks than the shown items and positions explain:  ln((k + .5) / (E + .5)) in its standard error
    flat       clicks that go on further down the slate than clicks do:  ln(position), standardised
    tasteless  clicks on items that others do not click:  -ln(click rate of the item), standardised

E sums over what was shown: the click rate of all x the position's x the item's, which is also how likely each row is to
be among the clicks. Other logs do not know what was shown; there the measures are of pace (requests an active hour,
hours of the day, evenness of the gaps, share of repeated items).

PyOD's ECOD (Li et al. 2022, "ECOD: Unsupervised Outlier Detection Using Empirical Cumulative Distribution Functions")
adds up how far out in its distribution each measure is. Measures are cut off at their middle, for ECOD also finds what
is unusually human. Its scores are sums of exponentials, whose tail falls ever faster towards an exponential one. So the
exponential through two quantiles that few bots do not move says what share of people score as high at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from evergreen.contracts.mapping import LogKind
from evergreen.fraud.rules import HOUR

MEASURES = {
    LogKind.IMPRESSIONS: ("excess", "flat", "tasteless"),
    LogKind.INTERACTIONS: ("requests_an_hour", "hours_of_day", "evenness", "repeats"),
    LogKind.RATINGS: ("requests_an_hour", "hours_of_day", "evenness", "repeats"),
}
"""What the detector looks at, by kind of log. Higher is less like people."""

MIN_WINDOWS = 50
"""With fewer windows there is no distribution to be an outlier of."""

_OWN_RATE_SPREAD = 0.5
"""How much people's own click rates differ, as a standard deviation of their logarithm."""
_POSITION_PRIOR, _ITEM_PRIOR = 20, 100
"""Rows that the mean click rate counts for in that of a position, and of an item."""
_PAUSE_SECONDS = 1_800
_QUANTILES = (0.7, 0.9)


@dataclass(frozen=True)
class UserWindows:
    """Windows of users, and how unlike people's they are."""

    table: pa.Table
    """user_id, window_index (int64: 0 is the last one), events, positives, the measures, and `tail`: the share of
    people whose score would be as high; null: not judged."""
    left_out: int
    """Windows with too few events to judge."""


def score_windows(db: duckdb.DuckDBPyConnection, kind: LogKind, *, window_days: int, min_events: int) -> UserWindows:
    """Score every user's windows, counted backwards from the last event.

    Args:
        db: with table `judged` of `rules.judged_events`, and table `caught` (user_id, day): what rules have caught;
            these rows count for nothing here. Leaves a table `remaining`: the others, with their window_index.
        kind: of the log.
        window_days: length of a window.
        min_events: rows that a window must have to be judged.
    """
    db.execute(
        f"""CREATE TABLE remaining AS
        SELECT *, ((SELECT max(day) FROM judged) - day) // {window_days} AS window_index
        FROM judged ANTI JOIN caught USING (user_id, day)"""
    )
    measured = _click_measures(db) if kind is LogKind.IMPRESSIONS else _pace_measures(db)
    events = measured["events"].to_numpy()
    enough = events >= min_events
    tail = np.full(len(events), np.nan)
    if enough.sum() >= MIN_WINDOWS:
        measures = np.column_stack([measured[name].to_numpy()[enough] for name in MEASURES[kind]])
        # The last bits of a sum depend on the threads that add it up; ranks must not.
        tail[enough] = tail_shares(measures.round(6))
    table = measured.append_column("tail", pa.array(tail, from_pandas=True))
    return UserWindows(table, int((~enough).sum()))


def tail_shares(measures: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,) the share of people who would be as far out as each row.

    Args:
        measures: (n, m); higher is less like people, NaN: unknown, which counts as the middle.
    """
    # Takes two seconds to import, so only who filters pays for it.
    from pyod.models.ecod import ECOD

    middle = np.nan_to_num(np.nanmedian(measures, axis=0))
    beyond = np.maximum(np.where(np.isnan(measures), middle, measures), middle)
    beyond = beyond[:, np.ptp(beyond, axis=0) > 0]
    if not beyond.shape[1]:
        return np.ones(len(measures))
    return _tail(ECOD().fit(beyond).decision_scores_)


def _tail(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """P(score >= each one), by the exponential tail through the two quantiles."""
    low, high = np.quantile(scores, _QUANTILES)
    above_low, above_high = 1 - np.array(_QUANTILES)
    scale = max(high - low, 1e-9) / np.log(above_low / above_high)
    tail: NDArray[np.float64] = np.minimum(above_low * np.exp((low - scores) / scale), 1.0)
    return tail


def _click_measures(db: duckdb.DuckDBPyConnection) -> pa.Table:
    return db.sql(
        f"""
        WITH overall AS (SELECT greatest(avg(clicked::INTEGER), 1e-9) AS rate FROM remaining),
        positions AS (
            SELECT position, (count(*) FILTER (clicked) / any_value(rate) + {_POSITION_PRIOR})
                             / (count(*) + {_POSITION_PRIOR}) AS factor
            FROM remaining, overall GROUP BY position
        ),
        items AS (
            SELECT item_id, (count(*) FILTER (clicked) / any_value(rate) + {_ITEM_PRIOR})
                            / (count(*) + {_ITEM_PRIOR}) AS factor
            FROM remaining, overall GROUP BY item_id
        ),
        expected AS (
            SELECT user_id, window_index, clicked, least(rate * p.factor * i.factor, 1.0) AS chance,
                   ln(coalesce(r.position, 1)) AS depth, -ln(i.factor) AS dislike
            FROM remaining r, overall
            JOIN positions p ON r.position IS NOT DISTINCT FROM p.position
            JOIN items i ON r.item_id IS NOT DISTINCT FROM i.item_id
        ),
        typical AS (
            SELECT sum(chance * depth) / sum(chance) AS depth, sum(chance * dislike) / sum(chance) AS dislike,
                   sum(chance * depth * depth) / sum(chance) AS depth_2,
                   sum(chance * dislike * dislike) / sum(chance) AS dislike_2
            FROM expected
        ),
        windows AS (
            SELECT user_id, window_index, count(*) AS events, count(*) FILTER (clicked) AS positives,
                   sum(chance) AS chance, coalesce(sum(depth) FILTER (clicked), 0) AS depth,
                   coalesce(sum(dislike) FILTER (clicked), 0) AS dislike
            FROM expected GROUP BY user_id, window_index
        )
        SELECT w.user_id, w.window_index, events, positives,
               ln((positives + 0.5) / (chance + 0.5)) / sqrt(1 / (positives + 0.5) + {_OWN_RATE_SPREAD**2}) AS excess,
               (w.depth - positives * t.depth)
                   / sqrt(greatest(positives, 1) * greatest(depth_2 - t.depth ** 2, 1e-12)) AS flat,
               (w.dislike - positives * t.dislike)
                   / sqrt(greatest(positives, 1) * greatest(dislike_2 - t.dislike ** 2, 1e-12)) AS tasteless
        FROM windows w, typical t ORDER BY ALL"""
    ).to_arrow_table()


def _pace_measures(db: duckdb.DuckDBPyConnection) -> pa.Table:
    return db.sql(
        f"""
        WITH gaps AS (
            SELECT *, (t - lag(t) OVER (PARTITION BY user_id, window_index ORDER BY t)) / 1e6 AS gap
            FROM (SELECT DISTINCT user_id, window_index, t FROM remaining)
        ),
        paces AS (
            SELECT user_id, window_index, count(*) / count(DISTINCT t // {HOUR}) AS requests_an_hour,
                   count(DISTINCT t // {HOUR} % 24)::DOUBLE AS hours_of_day,
                   -stddev_pop(ln(gap)) FILTER (gap <= {_PAUSE_SECONDS}) AS evenness
            FROM gaps GROUP BY user_id, window_index
        ),
        windows AS (
            SELECT user_id, window_index, count(*) AS events, count(*) FILTER (clicked) AS positives,
                   1 - count(DISTINCT item_id) / count(*) AS repeats
            FROM remaining GROUP BY user_id, window_index
        )
        SELECT user_id, window_index, events, positives,
               requests_an_hour, hours_of_day, evenness, repeats
        FROM windows JOIN paces USING (user_id, window_index) ORDER BY ALL"""
    ).to_arrow_table()
