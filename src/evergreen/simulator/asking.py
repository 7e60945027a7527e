"""How the world asks for recommendations: the question, the answer, and whoever gives it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from evergreen.contracts.errors import EvergreenError

MAX_ASKS = 64
"""Questions in one call; no more fit into one of the server's protocol."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Somebody opens a page that has room for k items."""

    request_id: str
    user_id: str
    event_timestamp: datetime
    k: int
    context: dict[str, str]
    candidates: tuple[str, ...] | None = None
    """Items that the page itself names; None: whatever suits."""

    def instance(self) -> dict[str, Any]:
        """The question as an instance of KServe's V1 protocol."""
        instance: dict[str, Any] = {
            "request_id": self.request_id,
            "user_id": self.user_id,
            "event_timestamp": self.event_timestamp.isoformat(),
            "k": self.k,
            "context": self.context,
        }
        return instance | ({"candidates": list(self.candidates)} if self.candidates is not None else {})


@dataclass(frozen=True, slots=True)
class Served:
    """An answer."""

    request_id: str
    item_ids: tuple[str, ...]
    """Best first."""
    model_version: str
    degraded: bool = False
    """Whether defaults stood for the user's features."""
    failures: int = 0
    """Calls that failed before one succeeded; of a call for many, they are those of its first answer."""


class Recommend(Protocol):
    """Answers up to `MAX_ASKS` questions in one call, in their order."""

    def __call__(self, asks: Sequence[Ask], /) -> Sequence[Served]:
        """One answer each."""


def ask_all(asks: Sequence[Ask], recommend: Recommend, *, connections: int = 1) -> list[Served]:
    """Ask in the order of time, `connections` calls at once.

    Raises:
        EvergreenError: an answer is missing, or belongs to another question.
    """
    batches = [asks[first : first + MAX_ASKS] for first in range(0, len(asks), MAX_ASKS)]
    if connections == 1:
        answers = [recommend(batch) for batch in batches]
    else:
        with ThreadPoolExecutor(connections) as pool:
            answers = list(pool.map(recommend, batches))
    for batch, answer in zip(batches, answers, strict=True):
        for ask, served in zip(batch, answer, strict=False):
            if served.request_id != ask.request_id:
                raise EvergreenError(f"request {ask.request_id}: was given the answer to {served.request_id}")
        if len(answer) != len(batch):
            raise EvergreenError(f"{len(batch)} requests from {batch[0].request_id} on got {len(answer)} answers")
    return [served for answer in answers for served in answer]
