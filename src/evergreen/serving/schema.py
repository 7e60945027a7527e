"""What goes over the wire: a request for recommendations and its answer. Imports pydantic alone, so clients may use it.

V1   POST /v1/models/evergreen:predict   {"instances": [RankingRequest, ...]} → {"predictions": [Recommendation, ...]}
V2   POST /v2/models/evergreen/infer     the same as tensors, see `tensors`
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
)

MAX_INSTANCES = 64
"""Requests in one call."""
MAX_CANDIDATES = 500
MAX_K = 500
DEFAULT_K = 10
"""How many items of the whole catalogue are returned; of given candidates, all are."""
MAX_ID_LENGTH = 1000
MAX_CONTEXT_FEATURES = 1000
NUMBER_PATTERN = r"[+-]?([0-9]{1,200}(\.[0-9]{0,200})?|\.[0-9]{1,200})([eE][+-]?[0-9]{1,2})?"
"""A number written as text, which a numeric context feature may be: a log's own numbers come so."""

_EARLIEST, _LATEST = datetime(1970, 1, 1, tzinfo=UTC), datetime(2200, 1, 1, tzinfo=UTC)

FIELD_RULES = {
    "user_id": f"must be a string of 1 to {MAX_ID_LENGTH} characters without zero bytes",
    "candidates": f"must be a list of 1 to {MAX_CANDIDATES} item ids",
    "k": f"must be between 1 and {MAX_K}",
    "context": "must be an object of context features by name",
    "event_timestamp": "must be an ISO 8601 time with an offset between 1970 and 2200, e.g. 2026-11-23T12:00:00Z",
    "request_id": f"must be a string of 1 to {MAX_ID_LENGTH} characters without zero bytes",
    "exclude_seen": "must be true or false",
    "diversity": "must be a number from 0 to 1",
    "shown": "must be true or false",
}
"""What each field of a request must be; an error message ends with it."""

CANDIDATE_RULE = FIELD_RULES["user_id"]


def _instant(value: object) -> object:
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    if not isinstance(value, datetime) or value.tzinfo is None or not _EARLIEST <= value < _LATEST:
        raise ValueError(FIELD_RULES["event_timestamp"])
    return value.astimezone(UTC)


def _whole(value: object) -> object:
    """JSON has one kind of number: 3.0 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) <= MAX_K else value


Identifier = Annotated[StrictStr, Field(min_length=1, max_length=MAX_ID_LENGTH, pattern=r"^[^\x00]*$")]
Instant = Annotated[AwareDatetime, BeforeValidator(_instant)]


class RankingRequest(BaseModel):
    """One request: whom to recommend to, what to choose from, and what is known of the moment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    user_id: Identifier | None = None
    """Needed unless the model's log has no users. A user that the model has never seen gets cold-start scores."""
    request_id: Identifier | None = None
    """What the impression log calls this request, and clicks come back with; default: a new UUID."""
    candidates: list[Identifier] | None = Field(default=None, min_length=1, max_length=MAX_CANDIDATES)
    """Item ids to rank, each once. Without it, the whole catalogue is ranked."""
    k: Annotated[StrictInt, Field(ge=1, le=MAX_K), BeforeValidator(_whole)] | None = None
    """How many items to return."""
    context: dict[StrictStr, Any] = Field(default_factory=dict, max_length=MAX_CONTEXT_FEATURES)
    """Context features by name. One that is left out, or null, is taken as missing."""
    event_timestamp: Instant | None = None
    """Of the request, in UTC; default: now."""
    exclude_seen: StrictBool | None = None
    """Whether items that the user chose before are left out. Default: left out of what the server proposes where the
    log's mapping says so, never of given candidates."""
    diversity: Annotated[StrictFloat | StrictInt, Field(ge=0, le=1)] | None = None
    """How much the order avoids repeating a category (maximal marginal relevance): 0 is by score alone. Default: the
    server's."""
    shown: StrictBool | None = None
    """Whether somebody is shown the answer, which is the default. One that is not shown, such as a canary's, is neither
    logged as an impression nor counted."""


class RankedItem(BaseModel):
    """One item of an answer."""

    model_config = ConfigDict(frozen=True)

    item_id: str
    rank: int
    """From 1, the best."""
    probability: float | None = None
    """Calibrated, of a click or an interaction …"""
    rating: float | None = None
    """… or the expected rating, for a log of ratings."""


class Recommendation(BaseModel):
    """The answer to one request: items in order, best first."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    request_id: str | None = None
    """The request's own, or a new UUID."""
    user_id: str | None = None
    known_user: bool = False
    """Whether the features know this user."""
    items: tuple[RankedItem, ...] = ()
    """Empty for a log without items."""
    probability: float | None = None
    """For a log without items: the one answer."""
    rating: float | None = None
    model_version: str
    event_timestamp: AwareDatetime
    degraded: bool = False
    """Whether defaults stand for the user's features, because the online store did not answer in time."""
    unknown_items: tuple[str, ...] = ()
    """Candidates that are not in the catalogue; they are not scored."""
    filtered_items: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Candidates that a rule took out, by its name: seen, blocked, …"""
    notes: tuple[str, ...] = ()
    """What of the request was left aside, and why."""
