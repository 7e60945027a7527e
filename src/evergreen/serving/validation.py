"""From JSON to `RankingRequest`s that a model can answer; every refusal says where and what is wrong."""

from __future__ import annotations

import itertools
import json
import math
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import orjson
from pydantic import ValidationError

from evergreen.contracts.errors import RequestError
from evergreen.contracts.mapping import Mapping as LogMapping
from evergreen.contracts.training_set import ColumnKind, Feature, FeatureOrigin
from evergreen.features.columns import feature_columns
from evergreen.serving.schema import (
    CANDIDATE_RULE,
    FIELD_RULES,
    MAX_CANDIDATES,
    MAX_ID_LENGTH,
    MAX_INSTANCES,
    NUMBER_PATTERN,
    RankingRequest,
)

Where = Callable[[int, str], str]
"""Names a field of the n-th request as the caller wrote it."""

MAX_CONTEXT_VALUES = 1000
"""Of one multi-valued context feature."""
MAX_PARTS = 150_000
"""Lists, objects and keys in one body: four megabytes of empty lists would hold up everybody for a second."""
MAX_TEXT_LENGTH = 1000
"""Of one text among the context features."""

_SPACED_QUOTES = (b'" ', b'"\t', b'"\n', b'"\r')

_CONTEXT_RULES = {
    ColumnKind.NUMERIC: "must be a finite number",
    ColumnKind.CATEGORICAL: f"must be a string of at most {MAX_TEXT_LENGTH} characters",
    ColumnKind.MULTI: f"must be a list of at most {MAX_CONTEXT_VALUES} strings of at most {MAX_TEXT_LENGTH} characters",
}

_OF_ITEMS = ("candidates", "k", "exclude_seen", "diversity")
_NUMBER = re.compile(NUMBER_PATTERN)


class _Brief(reprlib.Repr):
    """Values in a few words, in a time that does not grow with them."""

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        """The first entries; the base class would sort all of them."""
        first = list(itertools.islice(x.items(), self.maxdict))
        parts = [f"{self.repr1(key, level - 1)}: {self.repr1(value, level - 1)}" for key, value in first]
        return "{" + ", ".join(parts + ["..."] * (len(x) > len(first))) + "}" if level > 0 else "{...}"


_repr = _Brief()
_repr.maxstring, _repr.maxlist, _repr.maxdict, _repr.maxlevel, _repr.maxlong = 60, 3, 3, 2, 30


def describe(value: object) -> str:
    """A value as it appears in an error: short, however large or deep the value is."""
    return _repr.repr(value)


def decode_json(text: str | bytes, what: str) -> Any:
    """The value that JSON holds.

    Raises:
        RequestError: `what` is not JSON, or has more parts than any request. NaN, Infinity and half a surrogate pair
            are not JSON, nor is what is nested deeper than 1024.
    """
    if len(text) > MAX_PARTS:
        marks = ("[", "{", ":") if isinstance(text, str) else (b"[", b"{", b":")
        # Those in strings count, too: looking for them takes a thousandth of the time that building the parts does.
        if sum(map(text.count, marks)) > MAX_PARTS:  # type: ignore[arg-type]  # each with marks of its own type
            raise RequestError(f"{what} has more than {MAX_PARTS} lists, objects and keys, by its brackets and colons")
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"{what} is not valid JSON: {error}") from None


def refuse_repeated_keys(text: str | bytes, num_keys: int, what: str) -> None:
    """Raise RequestError if an object in JSON gives a key twice, of which every reader takes another.

    Args:
        text: the JSON, whose content was checked: this is slow for many objects.
        num_keys: of all objects in it, as it was decoded.
        what: names it.
    """
    # Each key is followed by a colon, so as many colons as keys mean that none was given twice. Strings may hold more
    # of them, as times do; but not after a quote, unless it is escaped, and then the count is off. Where anything else
    # may be between a key and its colon, the slow reader decides.
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if data.count(b":") == num_keys:
        return
    if data.count(b'":') == num_keys and not any(quote in data for quote in _SPACED_QUOTES):
        return

    def unique(pairs: list[tuple[str, Any]]) -> None:
        keys = set()
        for key, _ in pairs:
            if key in keys:
                raise RequestError(f"{what} gives the key {describe(key)} twice in one object")
            keys.add(key)

    json.loads(text, object_pairs_hook=unique, parse_int=str, parse_float=str)


def instance_field(index: int, field: str) -> str:
    """Where a field is in a V1 body."""
    return f"instances[{index}].{field}" if field else f"instances[{index}]"


@dataclass(frozen=True)
class RequestRules:
    """What requests to one model may hold."""

    context: Mapping[str, ColumnKind]
    """Context features of the log."""
    unused_context: frozenset[str]
    """Those of them that the model does not read."""
    has_users: bool
    has_items: bool

    @classmethod
    def of(cls, mapping: LogMapping, features: Sequence[Feature]) -> RequestRules:
        """Rules for a model with these features, trained on a log with this mapping."""
        context = {f.name: f.kind for f in feature_columns(mapping) if f.origin is FeatureOrigin.CONTEXT}
        return cls(
            context=context,
            unused_context=frozenset(context) - {f.name for f in features},
            has_users=mapping.columns.user_id is not None,
            has_items=mapping.columns.item_id is not None,
        )

    def parse_body(self, text: bytes) -> list[RankingRequest]:
        """Requests of a V1 body, `{"instances": [...]}`.

        Raises:
            RequestError: the body is not of that form, or an instance is malformed.
        """
        body = decode_json(text, "the body")
        if not isinstance(body, dict):
            raise RequestError(f'the body is {_json_type(body)}: send an object, {{"instances": [...]}}')
        if "instances" not in body:
            raise RequestError(f'instances: missing: send {{"instances": [...]}}, not {describe(list(body))}')
        if len(body) > 1:
            other = next(name for name in body if name != "instances")
            raise RequestError(f"{describe(other)}: unknown field of the body; known: instances")
        instances = body["instances"]
        if not isinstance(instances, list):
            raise RequestError(f"instances={describe(instances)}: must be a list of objects")
        requests = self.parse(instances, instance_field)
        num_keys = len(body) + sum([len(instance) + len(instance.get("context") or ()) for instance in instances])
        refuse_repeated_keys(text, num_keys, "the body")
        return requests

    def parse(self, instances: Sequence[object], where: Where) -> list[RankingRequest]:
        """Requests of decoded instances.

        Raises:
            RequestError: there are none or too many, or one is malformed.
        """
        if not 1 <= len(instances) <= MAX_INSTANCES:
            raise RequestError(f"{len(instances)} instances: must be between 1 and {MAX_INSTANCES}; send several calls")
        return [self._request(instance, index, where) for index, instance in enumerate(instances)]

    def notes(self, request: RankingRequest) -> tuple[str, ...]:
        """What of a request is left aside, and why."""
        notes = []
        if request.user_id is not None and not self.has_users:
            notes.append("user_id ignored: the model's log has no users")
        if not self.has_items:
            given = [name for name in _OF_ITEMS if getattr(request, name) is not None]
            notes += [f"{name} ignored: the model's log has no items" for name in given]
        if unused := sorted(self.unused_context & request.context.keys()):
            notes.append(f"context ignored: the model does not read {', '.join(unused)}")
        wanted = self.context.keys() - self.unused_context
        if missing := sorted(name for name in wanted if request.context.get(name) is None):
            notes.append(f"context taken as missing: {', '.join(missing)}")
        return tuple(notes)

    def _request(self, instance: object, index: int, where: Where) -> RankingRequest:
        if not isinstance(instance, dict):
            raise RequestError(f"{where(index, '')}={describe(instance)}: must be an object")
        unknown = next((name for name in instance if name not in FIELD_RULES), None)
        if unknown is not None:
            place = where(index, unknown if unknown.isidentifier() and len(unknown) < 60 else describe(unknown))
            raise RequestError(f"{place}: unknown field; known: {', '.join(FIELD_RULES)}")
        # pydantic takes 0.1 µs an id: a list is looked at in bulk, and one by one where something is wrong with it.
        candidates = instance.get("candidates")
        sound = isinstance(candidates, list) and _are_ids(candidates)
        try:
            request = RankingRequest.model_validate(instance | {"candidates": None} if sound else instance)
        except ValidationError as error:
            raise RequestError(_explain(error, index, where)) from error
        if request.user_id is None and self.has_users:
            raise RequestError(f"{where(index, 'user_id')}: missing: give the user's id (a new user is fine)")
        if not sound and request.candidates:
            _refuse_repeated(request.candidates, where(index, "candidates"))
        context = {name: self._context_value(name, value, index, where) for name, value in request.context.items()}
        return request.model_copy(update={"context": context} | ({"candidates": candidates} if sound else {}))

    def _context_value(self, name: str, value: object, index: int, where: Where) -> float | str | list[str] | None:
        place = f"{where(index, 'context')}.{name if name.isidentifier() and len(name) < 60 else describe(name)}"
        kind = self.context.get(name)
        if kind is None:
            known = ", ".join(self.context) or "none"
            raise RequestError(f"{place}: no such context feature; the model's log has: {known}")
        if value is None:
            return None
        try:
            if kind is not ColumnKind.MULTI:
                return _number(value) if kind is ColumnKind.NUMERIC else _text(value)
            if not isinstance(value, list) or len(value) > MAX_CONTEXT_VALUES:
                raise ValueError
            return [_text(entry) for entry in value]
        except (ValueError, OverflowError):
            raise RequestError(f"{place}={describe(value)}: {_CONTEXT_RULES[kind]}") from None


def _are_ids(candidates: list[Any]) -> bool:
    """Whether these are ids, each once; False when in doubt."""
    if not 1 <= len(candidates) <= MAX_CANDIDATES:
        return False
    try:
        text = "".join(candidates)
        text.encode()  # half a surrogate pair
    except (TypeError, UnicodeEncodeError):
        return False
    different = set(candidates)
    return (
        len(different) == len(candidates)
        and "" not in different
        and "\0" not in text
        and (len(text) <= MAX_ID_LENGTH or max(map(len, candidates)) <= MAX_ID_LENGTH)
    )


def _refuse_repeated(candidates: list[str], place: str) -> None:
    seen: set[str] = set()
    for index, item in enumerate(candidates):
        if item in seen:
            raise RequestError(f"{place}[{index}]={describe(item)}: given twice")
        seen.add(item)


def _number(value: object) -> float:
    """A finite float. Text that reads as a number is one: a log's own numbers come as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    if isinstance(value, str) and not _NUMBER.fullmatch(value):
        raise ValueError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT_LENGTH:
        raise ValueError
    value.encode()  # JSON can hold half a surrogate pair, Arrow cannot
    return value


def _explain(error: ValidationError, index: int, where: Where) -> str:
    """The first problem that pydantic found, in our words."""
    first = error.errors(include_url=False)[0]
    field, *rest = (str(part) for part in first["loc"])
    rule = CANDIDATE_RULE if field == "candidates" and rest else FIELD_RULES[field]
    place = where(index, field) + (f"[{rest[0]}]" if field == "candidates" and rest else "")
    value: Any = first["input"]
    if isinstance(value, list):
        return f"{place}: a list of {len(value)}: {rule}"
    return f"{place}={value.isoformat() if isinstance(value, datetime) else describe(value)}: {rule}"


def _json_type(value: object) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", type(None): "null", bytes: "not JSON"}
    return names.get(type(value), "a number")
