from __future__ import annotations

import threading
from collections.abc import Sequence
from datetime import UTC, datetime

import pytest

from evergreen.contracts.errors import EvergreenError
from evergreen.serving.schema import MAX_INSTANCES, RankingRequest
from evergreen.simulator.asking import MAX_ASKS, Ask, Served, ask_all

ASKS = [
    Ask(f"w0-d30-{number}", f"u{number % 7}", datetime(2025, 1, 31, 12, tzinfo=UTC), 5, {"device": "mobile"})
    for number in range(200)
]


def _echo(asks: Sequence[Ask]) -> list[Served]:
    return [Served(ask.request_id, ("i1",), "echo") for ask in asks]


def test_a_question_is_a_request_of_the_servers_protocol():
    assert MAX_ASKS == MAX_INSTANCES
    request = RankingRequest.model_validate(ASKS[3].instance())
    assert (request.request_id, request.user_id, request.k) == ("w0-d30-3", "u3", 5)
    assert request.event_timestamp == ASKS[3].event_timestamp and request.context == {"device": "mobile"}
    page = Ask("r", "u", ASKS[0].event_timestamp, 1, {}, candidates=("i7",))
    assert RankingRequest.model_validate(page.instance()).candidates == ["i7"]


@pytest.mark.parametrize("connections", [1, 3])
def test_answers_come_in_the_order_of_the_questions(connections: int):
    batches: list[int] = []
    lock = threading.Lock()

    def recommend(asks: Sequence[Ask], /) -> list[Served]:
        with lock:
            batches.append(len(asks))
        return _echo(asks)

    answers = ask_all(ASKS, recommend, connections=connections)
    assert [answer.request_id for answer in answers] == [ask.request_id for ask in ASKS]
    assert sorted(batches) == [8, 64, 64, 64]


def test_missing_answer_is_told():
    with pytest.raises(EvergreenError, match="64 requests from w0-d30-0 on got 63 answers"):
        ask_all(ASKS, lambda asks: _echo(asks[:63]))


def test_answer_to_another_question_is_told():
    with pytest.raises(EvergreenError, match="request w0-d30-0: was given the answer to w0-d30-63"):
        ask_all(ASKS, lambda asks: _echo(asks[::-1]))
