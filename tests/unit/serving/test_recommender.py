from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from evergreen.serving.schema import DEFAULT_K, RankingRequest


def test_items_come_best_first_with_ranks(parts: Callable[[str], Any]) -> None:
    answer = parts("impressions").recommender.recommend(RankingRequest(user_id="u1"))
    probabilities = [item.probability for item in answer.items]
    assert probabilities == sorted(probabilities, reverse=True)
    assert [item.rank for item in answer.items] == list(range(1, DEFAULT_K + 1))
    assert all(0 <= p <= 1 for p in probabilities)
    assert answer.known_user and answer.user_id == "u1" and answer.model_version == "standin-0123456789ab"


def test_whole_catalogue_agrees_with_the_same_candidates(parts: Callable[[str], Any]) -> None:
    recommender = parts("impressions").recommender
    whole = recommender.recommend(RankingRequest(user_id="u1", k=500))
    ids = sorted((item.item_id for item in whole.items), reverse=True)
    assert recommender.recommend(RankingRequest(user_id="u1", candidates=ids)).items == whole.items


def test_all_candidates_are_returned_unless_k_says_otherwise(parts: Callable[[str], Any]) -> None:
    recommender = parts("impressions").recommender
    ids = [f"item-{n}" for n in range(20)]
    everything = recommender.recommend(RankingRequest(user_id="u1", candidates=ids)).items
    assert {item.item_id for item in everything} == set(ids)
    assert recommender.recommend(RankingRequest(user_id="u1", candidates=ids, k=3)).items == everything[:3]


def test_unknown_candidate_is_ranked_as_a_new_item_and_reported(parts: Callable[[str], Any]) -> None:
    answer = parts("impressions").recommender.recommend(RankingRequest(user_id="u1", candidates=["item-1", "new"]))
    assert answer.unknown_items == ("new",)
    assert {item.item_id for item in answer.items} == {"item-1", "new"}


def test_unknown_user_gets_cold_start_scores(parts: Callable[[str], Any]) -> None:
    answer = parts("impressions").recommender.recommend(RankingRequest(user_id="nobody yet"))
    assert not answer.known_user and len(answer.items) == DEFAULT_K


def test_items_that_the_user_knows_are_not_recommended_again(parts: Callable[[str], Any]) -> None:
    serving = parts("interactions")
    history = set(serving.recommender._users.get("u3").history)
    answer = serving.recommender.recommend(RankingRequest(user_id="u3", k=500))
    assert history and not history & {item.item_id for item in answer.items}
    given = serving.recommender.recommend(RankingRequest(user_id="u3", candidates=sorted(history)))
    assert {item.item_id for item in given.items} == history, "candidates are the caller's choice"


def test_log_that_repeats_itself_recommends_seen_items(parts: Callable[[str], Any]) -> None:
    serving = parts("interactions")
    again = serving.mapping.model_copy(update={"recommend_seen_items": True})
    recommender = type(serving.recommender)(serving.package, serving.store, again, clock=lambda: serving.store.as_of)
    history = set(recommender._users.get("u3").history)
    assert history <= {item.item_id for item in recommender.recommend(RankingRequest(user_id="u3", k=500)).items}


def test_user_who_knows_everything_gets_an_empty_answer_that_says_so(parts: Callable[[str], Any]) -> None:
    serving = parts("interactions")
    items = serving.store.items().slice(0, 1)

    class OneItem(type(serving.store)):  # type: ignore[misc]
        def items(self) -> Any:
            return items

    recommender = type(serving.recommender)(serving.package, OneItem(serving.tables), serving.mapping)
    reader = next(
        user
        for user in (f"u{n}" for n in range(12))
        if items["item_id"][0].as_py() in recommender._users.get(user).history
    )
    answer = recommender.recommend(RankingRequest(user_id=reader))
    assert answer.items == () and any("knows the whole catalogue" in note for note in answer.notes)


def test_ratings_are_answered_as_ratings(parts: Callable[[str], Any]) -> None:
    answer = parts("ratings").recommender.recommend(RankingRequest(user_id="u1"))
    assert all(item.probability is None and 1 <= item.rating <= 5 for item in answer.items)


def test_log_without_items_gets_one_probability(parts: Callable[[str], Any]) -> None:
    answer = parts("context_only").recommender.recommend(RankingRequest(k=5, context={"i1": 3.0}))
    assert answer.items == () and 0 < answer.probability < 1
    assert answer.notes == ("k ignored: the model's log has no items", "context taken as missing: c1")


def test_log_without_users_leaves_the_user_aside_and_says_so(parts: Callable[[str], Any]) -> None:
    recommender = parts("no_users").recommender
    answer = recommender.recommend(RankingRequest(user_id="u1", context={"device": "phone"}))
    assert answer.notes == ("user_id ignored: the model's log has no users",)
    assert answer.items == recommender.recommend(RankingRequest(context={"device": "phone"})).items


def test_context_that_the_model_does_not_read_is_noted(parts: Callable[[str], Any]) -> None:
    request = RankingRequest(user_id="u1", context={"coupons": ["a"], "device": "phone", "battery": 1.0})
    assert parts("impressions").recommender.recommend(request).notes == (
        "context ignored: the model does not read coupons",
    )


@pytest.mark.parametrize("given", [None, datetime(2026, 3, 20, 5, tzinfo=UTC)])
def test_request_is_asked_at_its_own_time_or_now(parts: Callable[[str], Any], given: datetime | None) -> None:
    serving = parts("impressions")
    answer = serving.recommender.recommend(RankingRequest(user_id="u1", event_timestamp=given))
    assert answer.event_timestamp == (given or serving.store.as_of)
    assert set(serving.package.tables[-1]["hour"].to_pylist()) == {str(answer.event_timestamp.hour)}
