"""Each rule, in batch and as a stream: what breaks it, and what does not quite."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from evergreen.contracts.mapping import LogKind
from evergreen.fraud.rules import RECENT_CLICKS, Limits, Reason, calibrate, evidence, limits_for
from tests.unit.fraud.conftest import Broken, event, judge_as_stream, judge_in_batch

Judge = Callable[..., Broken]
LIMITS = Limits(click_rate=0.02)


def _of(broken: Broken, reason: Reason) -> list[int]:
    return sorted(place for place, name in broken if name == reason)


def test_one_request_too_many_in_a_minute_is_velocity(judge: Judge) -> None:
    events = [event("u", "i", 2.9 * n, clicked=False) for n in range(21)]
    assert _of(judge(events, LIMITS), Reason.VELOCITY) == [20]


def test_request_just_a_minute_ago_does_not_count(judge: Judge) -> None:
    events = [event("u", "i", 3.0 * n, clicked=False) for n in range(40)]
    assert _of(judge(events, LIMITS), Reason.VELOCITY) == []


def test_all_rows_of_a_slate_are_one_request(judge: Judge) -> None:
    events = [event("u", f"i{n}", 5.0, clicked=False) for n in range(50)]
    assert _of(judge(events, LIMITS), Reason.VELOCITY) == []


def test_users_have_paces_of_their_own(judge: Judge) -> None:
    events = [event(f"u{n % 4}", "i", 1.0 * n, clicked=False) for n in range(200)]
    assert _of(judge(events, LIMITS), Reason.VELOCITY) == []


def test_a_slower_pace_kept_up_for_an_hour_is_velocity(judge: Judge) -> None:
    events = [event("u", "i", 10.0 * n, clicked=False) for n in range(300)]
    assert _of(judge(events, LIMITS), Reason.VELOCITY) == list(range(240, 300))


def test_who_clicks_everything_breaks_the_click_rate_within_a_slate(judge: Judge) -> None:
    events = [event("u", f"i{n}", 0.0) for n in range(10)]
    broken = _of(judge(events, LIMITS), Reason.CLICK_RATE)
    assert broken == list(range(broken[0], 10))
    assert evidence(broken[0], broken[0], LIMITS.highest_rate) <= LIMITS.evidence
    assert evidence(broken[0] + 1, broken[0] + 1, LIMITS.highest_rate) > LIMITS.evidence


def test_click_rate_starts_anew_each_day(judge: Judge) -> None:
    events = [event("u", f"i{n}", 86_400.0 * n) for n in range(30)]
    assert _of(judge(events, LIMITS), Reason.CLICK_RATE) == []


def test_an_eager_person_does_not_break_the_click_rate(judge: Judge) -> None:
    rng = np.random.default_rng(0)
    events = [event("u", f"i{n}", 60.0 * n, clicked=bool(rng.random() < 0.08)) for n in range(1_000)]
    assert _of(judge(events, LIMITS), Reason.CLICK_RATE) == []


def test_who_never_clicks_is_suspicious_after_long_silence_and_not_before(judge: Judge) -> None:
    silence = math.floor(LIMITS.silence)
    events = [event("u", "i", 600.0 * n, clicked=False) for n in range(silence + 2)]
    assert _of(judge(events, LIMITS), Reason.NO_CLICKS) == [silence, silence + 1]


def test_one_click_ends_the_silence(judge: Judge) -> None:
    events = [event("u", "i", 600.0 * n, clicked=n == 700) for n in range(5_000)]
    assert _of(judge(events, LIMITS), Reason.NO_CLICKS) == []


@pytest.mark.parametrize("kind", [LogKind.INTERACTIONS, LogKind.RATINGS])
def test_logs_without_impressions_have_no_click_rate_to_break(judge: Judge, kind: LogKind) -> None:
    events = [event("u", f"i{n}", 100.0 * n * n) for n in range(30)]
    assert judge(events, LIMITS, kind) == set()


def test_unknown_click_rate_silences_its_rules(judge: Judge) -> None:
    events = [event("u", f"i{n}", 0.0) for n in range(10)]
    assert _of(judge(events, Limits()), Reason.CLICK_RATE) == []


def test_log_where_most_is_clicked_has_no_rate_that_is_too_high(judge: Judge) -> None:
    events = [event("u", f"i{n}", 0.0) for n in range(50)]
    assert _of(judge(events, Limits(click_rate=0.5)), Reason.CLICK_RATE) == []


def test_clicks_like_clockwork_are_regular(judge: Judge) -> None:
    events = [event("u", f"i{n}", 20.0 * n + 0.3 * (n % 3)) for n in range(9)]
    assert _of(judge(events, LIMITS), Reason.REGULAR_CLICKS) == [6, 7, 8]


def test_one_pause_among_the_gaps_is_human(judge: Judge) -> None:
    gaps = [20, 20, 20, 55, 20, 20, 20, 20]
    events = [event("u", f"i{n}", at) for n, at in enumerate(accumulate(gaps, initial=0))]
    assert _of(judge(events, LIMITS), Reason.REGULAR_CLICKS) == []


def test_people_with_log_normal_gaps_are_not_regular(judge: Judge) -> None:
    gaps = np.random.default_rng(1).lognormal(3.5, 0.8, 3_000)
    events = [event("u", f"i{n}", float(at)) for n, at in enumerate(np.cumsum(gaps))]
    assert _of(judge(events, LIMITS), Reason.REGULAR_CLICKS) == []


def test_daily_visits_at_the_same_time_are_a_habit_not_a_pace(judge: Judge) -> None:
    events = [event("u", f"i{n}", 86_400.0 * n) for n in range(20)]
    assert _of(judge(events, LIMITS), Reason.REGULAR_CLICKS) == []


def test_time_of_the_click_counts_where_the_log_knows_it(judge: Judge) -> None:
    events = [event("u", f"i{n}", 20.0 * n) for n in range(9)]
    delays = np.random.default_rng(2).lognormal(2.0, 1.0, 9)
    late = [replace(e, clicked_at=e.t + int(d * 1e6)) for e, d in zip(events, delays, strict=True)]
    assert _of(judge(events, LIMITS), Reason.REGULAR_CLICKS) == [6, 7, 8]
    assert _of(judge(late, LIMITS), Reason.REGULAR_CLICKS) == []


def test_second_click_on_one_impression_is_repeated(judge: Judge) -> None:
    events = [event("u", "i", 0, request="r"), event("u", "j", 1, request="r"), event("u", "i", 70, request="r")]
    assert _of(judge(events, LIMITS), Reason.REPEATED_CLICK) == [2]


def test_same_item_in_another_request_is_another_impression(judge: Judge) -> None:
    events = [event("u", "i", 0, request="r"), event("u", "i", 700, request="s")]
    assert _of(judge(events, LIMITS), Reason.REPEATED_CLICK) == []


def test_interactions_may_repeat_a_few_times(judge: Judge) -> None:
    limits = limits_for(LogKind.INTERACTIONS)
    events = [event("u", "i", 40.0 * n * n, request="session") for n in range(12)]
    assert _of(judge(events, limits, LogKind.INTERACTIONS), Reason.REPEATED_CLICK) == [10, 11]


def test_who_rates_one_film_after_the_other_for_an_hour_is_a_person(judge: Judge) -> None:
    gaps = np.maximum(np.random.default_rng(4).lognormal(1.2, 0.6, 800).round(), 1)
    events = [event("u", f"film{n}", float(at)) for n, at in enumerate(np.cumsum(gaps))]
    assert judge(events, limits_for(LogKind.RATINGS), LogKind.RATINGS) == set()


def test_songs_of_about_one_length_are_no_clockwork(judge: Judge) -> None:
    lengths = np.random.default_rng(5).normal(210, 40, 300)
    events = [event("u", f"song{n}", float(at)) for n, at in enumerate(np.cumsum(lengths))]
    assert judge(events, limits_for(LogKind.INTERACTIONS), LogKind.INTERACTIONS) == set()


def test_a_repeat_is_forgotten_after_so_many_clicks(judge: Judge) -> None:
    others = [event("u", f"j{n}", 300.0 * n * n, request="r") for n in range(1, RECENT_CLICKS + 1)]
    again = event("u", "i", 10_000_000, request="r")
    first, place = event("u", "i", 0, request="r"), RECENT_CLICKS - 1
    assert _of(judge([first, *others[1:], again], LIMITS), Reason.REPEATED_CLICK) == []
    assert _of(judge([first, *others[2:], again], LIMITS), Reason.REPEATED_CLICK) == [place]


def _old_and_new(num_new: int, item: str = "hot") -> list:
    """Two days in which a hundred known accounts click, then new ones come for one item within half an hour."""
    day = 86_400.0
    known = [event(f"old{n % 100}", f"i{n % 7}", n * 900.0) for n in range(300)]
    new = [event(f"new{n}", item, 3.5 * day + 1_800 * n / num_new) for n in range(num_new)]
    return sorted([*known, *new], key=lambda e: e.t)


def test_many_new_accounts_on_one_item_are_a_burst(judge: Judge) -> None:
    events = _old_and_new(20)
    caught = {events[place].user_id for place in _of(judge(events, LIMITS), Reason.ACCOUNT_BURST)}
    assert len(caught) >= 15 and all(user.startswith("new") for user in caught)


def test_a_few_new_accounts_are_no_burst(judge: Judge) -> None:
    assert _of(judge(_old_and_new(4), LIMITS), Reason.ACCOUNT_BURST) == []


def test_first_day_of_a_service_is_no_burst(judge: Judge) -> None:
    events = [event(f"u{n}", "hot", 10.0 * n) for n in range(500)]
    assert _of(judge(events, LIMITS), Reason.ACCOUNT_BURST) == []


def test_one_new_account_that_clicks_an_item_often_is_no_burst(judge: Judge) -> None:
    events = _old_and_new(4)
    last = events[-1]
    events += [event(last.user_id, "hot", last.t / 1e6 + 90 * n * n) for n in range(1, 6)]
    assert _of(judge(events, LIMITS), Reason.ACCOUNT_BURST) == []


@pytest.mark.parametrize("rate", [0.001, 0.02, 0.1, 0.5])
def test_evidence_never_says_more_than_the_binomial_tail(rate: float) -> None:
    trials = np.arange(1, 200)
    for n in trials:
        for k in {1, int(n // 2) or 1, int(n)}:
            assert math.exp(-evidence(k, int(n), rate)) >= binom.sf(k - 1, n, rate) * (1 - 1e-9)


def test_click_rate_is_that_of_people_though_bots_click_more_than_all_of_them() -> None:
    rng = np.random.default_rng(3)
    shown = rng.integers(50, 300, 1_000)
    clicks = rng.binomial(shown, 0.02)
    shown[:20], clicks[:20] = 1_000, 970
    assert clicks[:20].sum() > 3 * clicks[20:].sum()
    assert calibrate(shown, clicks, Limits()).click_rate == pytest.approx(0.02, rel=0.1)


def test_log_without_clicks_calibrates_to_an_unknown_rate() -> None:
    limits = calibrate(np.array([100, 200]), np.array([0, 0]), Limits())
    assert limits.click_rate == 0 and limits.silence == math.inf and limits.highest_rate == 1


STRICT = Limits(
    requests_per_minute=3, requests_per_hour=9, alpha=0.05, click_rate=0.1, regular_gaps=3, burst_accounts=2
)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("abcdef"),
            st.sampled_from("ijk"),
            st.sampled_from([0, 0, 0, 1, 19, 20, 21, 59, 60, 400, 3_599, 3_600, 40_000, 90_000]),
            st.booleans(),
            st.sampled_from([None, "r", "s"]),
            st.sampled_from([None, 0, 1, 7]),
        ),
        max_size=120,
    ),
    st.sampled_from(LogKind),
)
def test_stream_gives_the_verdict_of_the_batch(rows: list, kind: LogKind) -> None:
    """Many events at one time, at the edges of the windows, of few users and items, under limits that are soon met."""
    events, now = [], 0
    for user, item, gap, clicked, request, delay in rows:
        now += gap
        clicked = clicked or kind is not LogKind.IMPRESSIONS
        made = event(user, item, now, clicked=clicked, request=request)
        events.append(made if delay is None else replace(made, clicked_at=made.t + delay * 1_000_000))
    assert judge_as_stream(events, STRICT, kind) == judge_in_batch(events, STRICT, kind)
