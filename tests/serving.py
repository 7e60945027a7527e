"""What tests of serving share."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import numpy as np

from evergreen.serving.answer import Answer
from evergreen.serving.recommender import Recommender
from evergreen.serving.schema import RankingRequest


def ask(recommender: Recommender, **fields: Any) -> Answer:
    """The answer to one request."""
    (answer,) = asyncio.run(recommender.answer([RankingRequest(**fields)]))
    return answer


def make_answer(*item_ids: str, request_id: str = "r", model: str = "m", degraded: bool = False) -> Answer:
    """An answer that shows these items, each with a score of 0.5."""
    return Answer(
        request_id=request_id,
        user_id="u1",
        known_user=False,
        model_version=model,
        event_timestamp=datetime(2026, 3, 9, 12, tzinfo=UTC),
        value_name="probability",
        item_ids=list(item_ids),
        scores=np.full(len(item_ids), 0.5),
        degraded=degraded,
    )
