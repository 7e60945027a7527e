"""The rules of the answer: what may not be shown, and in which order the rest is.

    blocked_items = ["i17"]
    blocked_categories = ["tobacco"]
    diversity = 0.2                       # 0: by score alone
    hooks = ["shop.rules:in_stock"]       # functions of ours: candidates → which may be shown

Diversity is maximal marginal relevance over categories (Carbonell and Goldstein 1998): items are chosen one by one,
each time the one with the largest (1 - d) * relevance - d * similarity, where similarity is 1 if an item of the same
category was chosen before, and relevance is the score brought to [0, 1]. An item without a category is like no other.
"""

from __future__ import annotations

import pkgutil
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from evergreen.contracts.errors import InputError
from evergreen.serving.items import ItemTable

SEEN = "seen"
BLOCKED = "blocked"

_PARTITION_ABOVE = 4096  # below, sorting everything is quicker than finding the best first


@dataclass(frozen=True)
class Candidates:
    """What a hook is asked about.

    Attributes:
        user_id: who asks; None for a log without users.
        user: what is known of the user, by feature.
        context: what the request brought.
        items: the catalogue.
        rows: (m,) the candidates' rows in it.
    """

    user_id: str | None
    user: Mapping[str, Any]
    context: Mapping[str, Any]
    items: ItemTable
    rows: NDArray[np.int64]

    @cached_property
    def item_ids(self) -> list[str]:
        """(m) the candidates' ids."""
        ids = self.items.ids
        return [ids[row] for row in self.rows.tolist()]


class Hook(Protocol):
    """A business rule in Python."""

    def __call__(self, candidates: Candidates) -> NDArray[np.bool_]:
        """(m,) which candidates may be shown. Called for every request: keep it quick, and it must not raise."""


class AnswerRules(BaseModel):
    """What a deployment wants of its answers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    blocked_items: frozenset[str] = frozenset()
    blocked_categories: frozenset[str] = frozenset()
    diversity: float = Field(default=0.0, ge=0, le=1)
    """Of requests that bring none."""
    hooks: tuple[str, ...] = ()
    """`module:function` of each `Hook`; what it takes out is reported under the function's name."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a TOML file.

        Raises:
            InputError: the file cannot be read, or holds something that is no rule; names it.
        """
        try:
            return cls.model_validate(tomllib.loads(path.read_text()))
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read as TOML: {error}") from error
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            known = ", ".join(cls.model_fields)
            raise InputError(f"{path}: {place}={first['input']!r}: {first['msg']}; rules are: {known}") from error

    def resolve(self) -> dict[str, Hook]:
        """The hooks by name.

        Raises:
            InputError: there is no such function.
        """
        hooks = {}
        for target in self.hooks:
            try:
                hook = pkgutil.resolve_name(target)
            except (ImportError, AttributeError, ValueError) as error:
                raise InputError(f"hooks: {target!r}: {error}; name a function as module:function") from error
            if not callable(hook):
                raise InputError(f"hooks: {target!r} is no function")
            hooks[target.rpartition(":")[2]] = hook
        return hooks

    def blocked_rows(self, items: ItemTable) -> NDArray[np.int64]:
        """Rows of the items that are never shown, ascending."""
        blocked = np.zeros(items.num_items, np.bool_)
        blocked[[items.rows[item] for item in self.blocked_items if item in items.rows]] = True
        places = [place for place, category in enumerate(items.categories) if category in self.blocked_categories]
        blocked |= np.isin(items.category_of[:-1], places)
        return np.flatnonzero(blocked)


def best_first(
    scores: NDArray[np.float64], k: int, *, categories: NDArray[np.int64] | None, diversity: float
) -> NDArray[np.int64]:
    """(min(k, m),) places of the best candidates, in order; of equal ones the earlier comes first.

    Args:
        scores: (m,) probability or rating of candidates in the order of their ids, so that an order is never chance.
        k: how many are wanted.
        categories: (m,) place of each candidate's category, -1 for none; may be None where diversity is 0.
        diversity: from 0, by score alone, to 1.
    """
    if diversity > 0 and categories is not None and len(scores):
        scores = _marginal_relevance(scores, categories, diversity)
    chosen = None
    if len(scores) > max(_PARTITION_ABOVE, 4 * k):
        chosen = np.flatnonzero(scores >= np.partition(scores, len(scores) - k)[len(scores) - k])
        scores = scores[chosen]
    order = np.argsort(-scores, kind="stable")[:k]
    return order if chosen is None else chosen[order]


def _marginal_relevance(
    scores: NDArray[np.float64], categories: NDArray[np.int64], diversity: float
) -> NDArray[np.float64]:
    """(m,) numbers whose descending order is that in which marginal relevance chooses.

    Similarity is 0 or 1, so that of a category only its best item is ever chosen as the first of it: a bonus for being
    that item gives the order of the greedy choice by one sort.
    """
    low = scores.min()
    relevance = (scores - low) / max(scores.max() - low, np.finfo(np.float64).tiny)
    order = np.argsort(-scores, kind="stable")
    in_order = categories[order]
    first = in_order == -1
    _, places = np.unique(in_order, return_index=True)
    first[places] = True
    is_first = np.empty_like(first)
    is_first[order] = first
    gain: NDArray[np.float64] = (1 - diversity) * relevance + diversity * is_first
    return gain
