from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evergreen.contracts.errors import ArtifactError, EvergreenError
from evergreen.serving import metrics
from evergreen.serving.items import changed_rows
from evergreen.serving.recommender import OnlineItems
from evergreen.serving.rules import AnswerRules, Candidates
from evergreen.serving.schema import DEFAULT_K, RankingRequest, Recommendation
from tests.serving import ask


def test_items_come_best_first_with_ranks(parts: Callable[[str], Any]) -> None:
    answer = parts("impressions").ask(user_id="u1")
    scores = answer.scores.tolist()
    assert scores == sorted(scores, reverse=True)
    assert len(answer.item_ids) == len(scores) == DEFAULT_K
    assert all(0 <= score <= 1 for score in scores) and answer.value_name == "probability"
    assert answer.known_user and answer.user_id == "u1" and answer.model_version == "standin-0123456789ab"


def test_answer_on_the_wire_is_a_recommendation(parts: Callable[[str], Any]) -> None:
    answer = parts("impressions").ask(user_id="u1", candidates=["item-3", "new", "item-1"])
    told = Recommendation.model_validate_json(orjson.dumps(answer.to_json()))
    assert [item.item_id for item in told.items] == answer.item_ids and len(answer.item_ids) == 2
    assert [item.rank for item in told.items] == [1, 2]
    assert [item.probability for item in told.items] == answer.scores.tolist()
    assert (told.request_id, told.degraded, told.unknown_items) == (answer.request_id, False, ("new",))


def test_whole_catalogue_agrees_with_the_same_candidates(parts: Callable[[str], Any]) -> None:
    serving = parts("impressions")
    whole = serving.ask(user_id="u1", k=500)
    again = serving.ask(user_id="u1", candidates=sorted(whole.item_ids, reverse=True))
    assert again.item_ids == whole.item_ids and np.array_equal(again.scores, whole.scores)


def test_requests_of_one_call_are_answered_as_alone(parts: Callable[[str], Any]) -> None:
    serving = parts("impressions")
    requests = [
        RankingRequest(user_id="u1"),
        RankingRequest(user_id="somebody new", candidates=["item-3", "item-7"]),
        RankingRequest(user_id="u2", candidates=["item-9", "item-2", "item-4"], context={"device": "phone"}),
    ]
    for together, request in zip(asyncio.run(serving.recommender.answer(requests)), requests, strict=True):
        (alone,) = asyncio.run(serving.recommender.answer([request]))
        assert together.item_ids == alone.item_ids and np.array_equal(together.scores, alone.scores)


def test_all_candidates_are_returned_unless_k_says_otherwise(parts: Callable[[str], Any]) -> None:
    serving = parts("impressions")
    ids = [f"item-{n}" for n in range(20)]
    everything = serving.ask(user_id="u1", candidates=ids).item_ids
    assert set(everything) == set(ids)
    assert serving.ask(user_id="u1", candidates=ids, k=3).item_ids == everything[:3]


def test_candidate_that_does_not_exist_is_reported_and_not_scored(parts: Callable[[str], Any]) -> None:
    answer = parts("impressions").ask(user_id="u1", candidates=["item-1", "new", "item-2"])
    assert answer.unknown_items == ("new",)
    assert set(answer.item_ids) == {"item-1", "item-2"}


def test_answer_is_empty_and_says_so_where_no_candidate_exists(parts: Callable[[str], Any]) -> None:
    answer = parts("impressions").ask(user_id="u1", candidates=["new"])
    assert answer.item_ids == [] and answer.unknown_items == ("new",)
    assert any("no items" in note for note in answer.notes)


def test_unknown_user_gets_cold_start_scores(parts: Callable[[str], Any]) -> None:
    answer = parts("impressions").ask(user_id="nobody yet")
    assert not answer.known_user and not answer.degraded and len(answer.item_ids) == DEFAULT_K


def test_store_that_is_away_degrades_the_answer_to_that_of_a_stranger(parts: Callable[[str], Any]) -> None:
    serving = parts("impressions")
    away = type(serving.users)(serving.store)
    away.away = True
    answer = ask(serving.other(users=away), user_id="u1")
    stranger = serving.ask(user_id="somebody new")
    assert answer.degraded and not answer.known_user
    assert np.array_equal(np.sort(answer.scores), np.sort(stranger.scores))


def test_items_that_the_user_knows_are_not_recommended_again(parts: Callable[[str], Any]) -> None:
    serving = parts("interactions")
    history = set(serving.users.one("u3").values["user_history"])
    answer = serving.ask(user_id="u3", k=500)
    assert history and not history & set(answer.item_ids)
    given = serving.ask(user_id="u3", candidates=sorted(history))
    assert set(given.item_ids) == history, "candidates are the caller's choice"
    assert history <= set(serving.ask(user_id="u3", k=500, exclude_seen=False).item_ids)


def test_seen_candidates_are_left_out_and_told_where_the_caller_wants_that(parts: Callable[[str], Any]) -> None:
    serving = parts("impressions")
    history = serving.users.one("u3").values["user_history"]
    unseen = next(item for item in serving.recommender.items.ids if item not in history)
    answer = serving.ask(user_id="u3", candidates=[history[0], unseen], exclude_seen=True)
    assert answer.item_ids == [unseen] and answer.filtered_items == {"seen": [history[0]]}


def test_log_that_repeats_itself_recommends_seen_items(parts: Callable[[str], Any]) -> None:
    serving = parts("interactions")
    recommender = serving.other(mapping=serving.mapping.model_copy(update={"recommend_seen_items": True}))
    history = set(serving.users.one("u3").values["user_history"])
    assert history <= set(ask(recommender, user_id="u3", k=500).item_ids)


def test_user_who_knows_everything_gets_an_empty_answer_that_says_so(parts: Callable[[str], Any]) -> None:
    serving = parts("interactions")
    items = serving.store.items().slice(0, 1)

    class OneItem(type(serving.store)):  # type: ignore[misc]
        def items(self) -> Any:
            return items

    item = items["item_id"][0].as_py()
    reader = next(u for u in (f"u{n}" for n in range(12)) if item in serving.users.one(u).values["user_history"])
    answer = ask(serving.other(source=OneItem(serving.tables)), user_id=reader)
    assert answer.item_ids == [] and any("no items" in note for note in answer.notes)


def test_blocked_items_are_never_shown(parts: Callable[[str], Any]) -> None:
    serving = parts("impressions")
    table = serving.recommender.items.table
    in_c1 = {i for i, c in zip(table["item_id"].to_pylist(), table["category"].to_pylist(), strict=True) if c == "c1"}
    free = next(item for item in serving.recommender.items.ids if item not in in_c1 and item != "item-3")
    recommender = serving.other(rules=AnswerRules(blocked_items={"item-3", "gone"}, blocked_categories={"c1"}))
    assert in_c1 and not ({"item-3"} | in_c1) & set(ask(recommender, user_id="u1", k=500).item_ids)
    answer = ask(recommender, user_id="u1", candidates=["item-3", free])
    assert answer.item_ids == [free] and answer.filtered_items == {"blocked": ["item-3"]}


def in_stock(candidates: Candidates) -> Any:
    prices = candidates.items.table["price"].fill_null(0).to_numpy()[candidates.rows]
    return (prices > candidates.context["battery"]) & np.array([item != "item-9" for item in candidates.item_ids])


def test_hook_takes_items_out_under_its_name(parts: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shop_rules", SimpleNamespace(in_stock=in_stock))
    recommender = parts("impressions").other(rules=AnswerRules(hooks=("shop_rules:in_stock",)))
    candidates = ["item-1", "item-9", "item-21"]
    answer = ask(recommender, user_id="u1", candidates=candidates, context={"battery": 5.0})
    assert answer.item_ids == ["item-21"] and answer.filtered_items == {"in_stock": ["item-1", "item-9"]}
    shown = ask(recommender, user_id="u1", k=500, context={"battery": 5.0})
    assert not {"item-1", "item-9"} & set(shown.item_ids) and shown.filtered_items == {}


def test_diversity_puts_categories_one_after_the_other(parts: Callable[[str], Any]) -> None:
    serving = parts("impressions")
    category = dict(
        zip(*(serving.recommender.items.table[n].to_pylist() for n in ("item_id", "category")), strict=True)
    )
    first = serving.ask(user_id="u1", k=4, diversity=1.0).item_ids
    assert {category[item] for item in first if category[item]} == {category[i] for i in first} - {None}
    assert len({category[item] or item for item in first}) == 4
    assert serving.ask(user_id="u1", k=30, diversity=0).item_ids == serving.ask(user_id="u1", k=30).item_ids
    diverse = ask(serving.other(rules=AnswerRules(diversity=1.0)), user_id="u1", k=4)
    assert diverse.item_ids == first, "the server's own diversity holds where the request says nothing"


def test_retriever_finds_what_is_ranked_in_a_large_catalogue(
    parts: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    serving = parts("interactions")
    monkeypatch.setattr("evergreen.serving.recommender.EXACT_BELOW", 10)
    monkeypatch.setattr("evergreen.serving.recommender.RETRIEVED", 5)
    asked = []

    class LastItems:
        def search(self, user: dict[str, Any], k: int, exclude: Any) -> Any:
            asked.append((user["user_id"], k, exclude.tolist()))
            rows = np.arange(num_items)[::-1]
            return rows[~np.isin(rows, exclude)][:k]

        def updated(self, rows: Any, items: Any) -> Any:
            return self

    recommender = serving.other(build_index=lambda items: LastItems())
    num_items = recommender.items.num_items
    history = serving.users.one("u3").values["user_history"]
    answer = ask(recommender, user_id="u3", k=20)
    excluded = sorted({recommender.items.rows[item] for item in history})
    assert asked == [("u3", 5, excluded)]
    expected = [row for row in range(num_items)[::-1] if row not in excluded][:5]
    assert set(answer.item_ids) == {recommender.items.ids[row] for row in expected}


def test_many_pairs_are_computed_beside_the_event_loop(
    parts: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    serving = parts("impressions")
    threads = []
    scorer = type(serving.recommender.items.scorer)
    score = scorer.score
    monkeypatch.setattr(
        scorer, "score", lambda self, *args: (threads.append(threading.current_thread()), score(self, *args))[1]
    )
    serving.ask(user_id="u1")
    monkeypatch.setattr("evergreen.serving.recommender._INLINE_PAIRS", 3)
    beside = serving.ask(user_id="u1")
    assert threads[0] is threading.main_thread() and threads[1] is not threading.main_thread()
    assert beside.item_ids == serving.ask(user_id="u1").item_ids


def test_refresh_brings_new_features_and_new_items(parts: Callable[[str], Any]) -> None:
    serving = parts("impressions")
    early = type(serving.store)(serving.tables, serving.store.as_of - timedelta(days=9, hours=20))
    recommender = serving.other(source=early)
    before, known = ask(recommender, user_id="u1", k=500), recommender.items.num_items
    recommender._source = serving.store
    recommender.refresh()
    after, now = ask(recommender, user_id="u1", k=500), serving.ask(user_id="u1", k=500)
    assert known < recommender.items.num_items and before.item_ids != after.item_ids
    assert after.item_ids == now.item_ids and np.array_equal(after.scores, now.scores)


def test_refresh_of_a_few_items_is_as_good_as_reading_all_anew(parts: Callable[[str], Any]) -> None:
    serving = parts("impressions")
    recommender = serving.other()
    table = serving.store.features(recommender.items.ids)
    place = table.column_names.index("price")
    prices = table["price"].to_pylist()
    prices[3], prices[7] = None if prices[3] else 99.0, 1234.5

    class NewPrices(type(serving.store)):  # type: ignore[misc]
        def features(self, item_ids: Any) -> Any:
            return table.set_column(place, "price", pa.array(prices))

    source = NewPrices(serving.tables)
    assert changed_rows(table, source.features(())).tolist() == [3, 7]
    recommender._source = source
    prepared = []
    recommender._prepare = prepared.append
    recommender.refresh()
    assert not prepared, "only what changed is computed"
    expected = ask(serving.other(source=source), user_id="u1", k=500)
    refreshed = ask(recommender, user_id="u1", k=500)
    assert refreshed.item_ids == expected.item_ids and np.array_equal(refreshed.scores, expected.scores)


def test_refresh_that_fails_leaves_the_old_items_and_is_counted(
    parts: Callable[[str], Any], caplog: pytest.LogCaptureFixture
) -> None:
    serving = parts("impressions")

    class Away(type(serving.store)):  # type: ignore[misc]
        def features(self, item_ids: Any) -> Any:
            raise EvergreenError("Redis is away")

    recommender = serving.other()
    recommender._source = Away(serving.tables)
    failures = metrics.REFRESH_FAILURES._value.get()
    before = recommender.items
    recommender.refresh()
    assert recommender.items is before and metrics.REFRESH_FAILURES._value.get() == failures + 1
    assert "Redis is away" in caplog.text


def test_ratings_are_answered_as_ratings(parts: Callable[[str], Any]) -> None:
    answer = parts("ratings").ask(user_id="u1")
    assert answer.value_name == "rating" and all(1 <= rating <= 5 for rating in answer.scores)


def test_log_without_items_gets_one_probability(parts: Callable[[str], Any]) -> None:
    answer = parts("context_only").ask(k=5, context={"i1": 3.0})
    assert answer.item_ids is None and answer.scores.shape == (1,) and 0 < answer.to_json()["probability"] < 1
    assert answer.notes == ("k ignored: the model's log has no items", "context taken as missing: c1")


def test_log_without_users_leaves_the_user_aside_and_says_so(parts: Callable[[str], Any]) -> None:
    serving = parts("no_users")
    answer = serving.ask(user_id="u1", context={"device": "phone"})
    assert answer.notes == ("user_id ignored: the model's log has no users",)
    assert answer.item_ids == serving.ask(context={"device": "phone"}).item_ids


def test_context_that_the_model_does_not_read_is_noted(parts: Callable[[str], Any]) -> None:
    answer = parts("impressions").ask(user_id="u1", context={"coupons": ["a"], "device": "phone", "battery": 1.0})
    assert answer.notes == ("context ignored: the model does not read coupons",)


@pytest.mark.parametrize("given", [None, datetime(2026, 3, 20, 5, tzinfo=UTC)])
def test_request_is_asked_at_its_own_time_or_now(parts: Callable[[str], Any], given: datetime | None) -> None:
    serving = parts("impressions")
    answer = serving.ask(user_id="u1", event_timestamp=given)
    assert answer.event_timestamp == (given or serving.store.as_of)
    assert set(serving.package.tables[-1]["hour"].to_pylist()) == {str(answer.event_timestamp.hour)}


def test_published_items_are_read_each_time_and_the_stores_own_until_there_are_any(
    parts: Callable[[str], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, published = parts("impressions").store, tmp_path / "items.parquet"
    items = OnlineItems(store, None, str(published))  # type: ignore[arg-type]  # the reader is of the features alone
    own = store.items().select(["item_id", "category"])
    assert items.catalogue().equals(own)
    assert "own items stand in" in caplog.text
    for newer in (store.items().slice(2), store.items().slice(5)):
        pq.write_table(newer, published)
        assert items.catalogue().equals(newer.select(["item_id", "category"]))
    published.unlink()  # the older ones would come back without a word
    with pytest.raises(ArtifactError, match="cannot be read"):
        items.catalogue()
