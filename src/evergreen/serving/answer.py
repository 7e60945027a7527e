"""The answer to one request as the server holds it: lists and arrays, written once in the protocol of the call."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Answer:
    """What `schema.Recommendation` says on the wire.

    Attributes:
        request_id: the request's own, or a new one.
        user_id: as asked.
        known_user: whether the features know the user.
        model_version: of the model that answered.
        event_timestamp: that the request was answered for.
        value_name: "probability" or "rating".
        item_ids: (num_items) best first; None for a log without items.
        scores: (num_items) probability or rating of each; (1,) for a log without items.
        degraded: whether defaults stand for the user's features, because the online store did not answer in time.
        unknown_items: candidates that are not in the catalogue; they are not scored.
        filtered_items: candidates that a rule took out, by the rule's name.
        notes: what of the request was left aside, and why.
    """

    request_id: str
    user_id: str | None
    known_user: bool
    model_version: str
    event_timestamp: datetime
    value_name: str
    item_ids: list[str] | None
    scores: NDArray[np.float64]
    degraded: bool = False
    unknown_items: tuple[str, ...] = ()
    filtered_items: dict[str, list[str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The V1 prediction, of what JSON knows; a field that does not apply is left out."""
        scores = self.scores.tolist()
        body: dict[str, Any] = {"request_id": self.request_id}
        if self.user_id is not None:
            body["user_id"] = self.user_id
        body["known_user"] = self.known_user
        if self.item_ids is None:
            body[self.value_name] = scores[0]
        else:
            name = self.value_name
            body["items"] = [
                {"item_id": item_id, "rank": rank, name: score}
                for rank, (item_id, score) in enumerate(zip(self.item_ids, scores, strict=True), start=1)
            ]
        return body | {
            "model_version": self.model_version,
            "event_timestamp": self.event_timestamp.isoformat(),
            "degraded": self.degraded,
            "unknown_items": self.unknown_items,
            "filtered_items": self.filtered_items,
            "notes": self.notes,
        }
