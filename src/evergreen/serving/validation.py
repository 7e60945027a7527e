"""From a decoded body to `RankingRequest`s that a model can answer; every refusal says where and what is wrong."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from evergreen.contracts.errors import RequestError
from evergreen.contracts.mapping import Mapping as LogMapping
from evergreen.contracts.training_set import ColumnKind, Feature, FeatureOrigin
from evergreen.features.columns import feature_columns
from evergreen.serving.schema import CANDIDATE_RULE, FIELD_RULES, MAX_INSTANCES, RankingRequest

Where = Callable[[int, str], str]
"""Names a field of the n-th request as the caller wrote it."""

MAX_CONTEXT_VALUES = 1000
"""Of one multi-valued context feature."""

_CONTEXT_RULES = {
    ColumnKind.NUMERIC: "must be a finite number",
    ColumnKind.CATEGORICAL: "must be a string",
    ColumnKind.MULTI: f"must be a list of at most {MAX_CONTEXT_VALUES} strings",
}

_repr = reprlib.Repr()
_repr.maxstring, _repr.maxlist, _repr.maxdict, _repr.maxlevel, _repr.maxlong = 60, 3, 3, 2, 30


def describe(value: object) -> str:
    """A value as it appears in an error: short, however large or deep the value is."""
    return _repr.repr(value)


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

    def parse_body(self, body: object) -> list[RankingRequest]:
        """Requests of a decoded V1 body, `{"instances": [...]}`.

        Raises:
            RequestError: the body is not of that form, or an instance is malformed.
        """
        if not isinstance(body, dict):
            raise RequestError(f'the body is {_json_type(body)}: send an object, {{"instances": [...]}}')
        if "instances" not in body:
            raise RequestError(f'instances: missing: send {{"instances": [...]}}, not {describe(sorted(body))}')
        instances = body["instances"]
        if not isinstance(instances, list):
            raise RequestError(f"instances={describe(instances)}: must be a list of objects")
        return self.parse(instances, instance_field)

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
            given = [name for name in ("candidates", "k") if getattr(request, name) is not None]
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
        try:
            request = RankingRequest.model_validate(instance)
        except ValidationError as error:
            raise RequestError(_explain(error, index, where)) from error
        if request.user_id is None and self.has_users:
            raise RequestError(f"{where(index, 'user_id')}: missing: give the user's id (a new user is fine)")
        if request.candidates and len(set(request.candidates)) < len(request.candidates):
            seen: set[str] = set()
            for place, item in enumerate(request.candidates):
                if item in seen:
                    raise RequestError(f"{where(index, 'candidates')}[{place}]={describe(item)}: given twice")
                seen.add(item)
        context = {name: self._context_value(name, value, index, where) for name, value in request.context.items()}
        return request.model_copy(update={"context": context})

    def _context_value(self, name: str, value: object, index: int, where: Where) -> float | str | list[str] | None:
        place = f"{where(index, 'context')}.{name if name.isidentifier() else describe(name)}"
        kind = self.context.get(name)
        if kind is None:
            known = ", ".join(self.context) or "none"
            raise RequestError(f"{place}: no such context feature; the model's log has: {known}")
        if value is None:
            return None
        problem = RequestError(f"{place}={describe(value)}: {_CONTEXT_RULES[kind]}")
        if kind is ColumnKind.MULTI:
            if not isinstance(value, list) or len(value) > MAX_CONTEXT_VALUES:
                raise problem
            return [_text(entry, problem) for entry in value]
        return _number(value, problem) if kind is ColumnKind.NUMERIC else _text(value, problem)


def _number(value: object, problem: RequestError) -> float:
    """A finite float. Text that reads as a number is one: a log's own numbers come as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise problem
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise problem from None
    if not math.isfinite(number):
        raise problem
    return number


def _text(value: object, problem: RequestError) -> str:
    if not isinstance(value, str):
        raise problem
    try:
        value.encode()  # JSON can hold half a surrogate pair, Arrow cannot
    except UnicodeEncodeError:
        raise problem from None
    return value


def _explain(error: ValidationError, index: int, where: Where) -> str:
    """The first problem that pydantic found, in our words."""
    first = error.errors(include_url=False)[0]
    field, *rest = (str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        place = where(index, field if field.isidentifier() else describe(field))
        return f"{place}: unknown field; known: {', '.join(FIELD_RULES)}"
    rule = CANDIDATE_RULE if field == "candidates" and rest else FIELD_RULES[field]
    place = where(index, field) + (f"[{rest[0]}]" if field == "candidates" and rest else "")
    value: Any = first["input"]
    if isinstance(value, list):
        return f"{place}: a list of {len(value)}: {rule}"
    return f"{place}={value.isoformat() if isinstance(value, datetime) else describe(value)}: {rule}"


def _json_type(value: object) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", type(None): "null", bytes: "not JSON"}
    return names.get(type(value), "a number")
