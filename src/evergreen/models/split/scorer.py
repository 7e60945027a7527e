"""Scoring a request against items whose half is ready: `ModelPackage.predict` of one user and many candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, TypeAlias

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.training_set import ColumnKind, Feature, Side
from evergreen.models.encoding import check_columns
from evergreen.models.package import ModelPackage
from evergreen.models.split.halves import Half, Halves, PartialFirstOrder, SplitModel, half_of
from evergreen.models.split.networks import split_model
from evergreen.models.split.request import PairColumns, PairEncoder, UserEncoder

_CHUNK_ROWS = 16_384
_MOST_PAIRS = {"cpu": 4_096, "cuda": 131_072}
"""Scored at once, by device: on a CPU what fits its caches, on a GPU what its memory never notices."""

Request: TypeAlias = tuple[pa.Table | Mapping[str, Any], pa.Table | Sequence[PairColumns], NDArray[np.int64]]
"""A user, the features of pairs, and which item each candidate is: the arguments of `SplitScorer.score`."""


@dataclass(frozen=True)
class SplitScorer:
    """A model package with the half of every item computed. Safe to share between threads: scoring changes nothing.

    A refresh makes another scorer (`updated`), which shares the weights; swapping them is one assignment.

    Attributes:
        package: the model.
        item_half: (num_items + 1, …) tensors; the last row is an item of which nothing is known.
        item_first_order: (num_items + 1,) of the items' numbers; zeros where the model has none.
    """

    package: ModelPackage
    item_half: Half
    item_first_order: NDArray[np.float32]
    _bias: float
    _scale: float
    _model: SplitModel
    _halves: Halves
    _users: UserEncoder
    _pairs: PairEncoder

    @classmethod
    def prepare(cls, package: ModelPackage, items: pa.Table) -> Self:
        """Compute the items' half.

        Args:
            package: the model; its network may be on a GPU, where the items' half then is, too.
            items: (num_items) one row an item, with the features of the item's side that do not depend on the moment
                (`half_of`); others are ignored, nulls are allowed anywhere.

        Raises:
            ArtifactError: a feature is absent or has a type that does not fit, or a feature of pairs is not a number.
        """
        encoder = package.encoder
        for feature in encoder.features:
            if half_of(feature) is Side.PAIR and feature.kind is not ColumnKind.NUMERIC:
                raise ArtifactError(
                    f"{package.path}: the feature {feature.name!r} of user and item at once is {feature.kind.value}; "
                    "split scoring reads numbers there: score whole rows with ModelPackage.predict"
                )
        halves = Halves(encoder.spec, encoder.features)
        model = split_model(package.model.eval(), halves)
        nobody = pa.table({feature.name: pa.nulls(1) for feature in encoder.features})
        ready, first_order = _item_half(package, model, halves, items)
        unknown, its_first_order = _item_half(package, model, halves, nobody)
        return cls(
            package=package,
            item_half=tuple(torch.cat(tensors) for tensors in zip(ready, unknown, strict=True)),
            item_first_order=np.concatenate([first_order, its_first_order]),
            _bias=package.model.bias.item(),
            _scale=package.model.scale.item(),
            _model=model,
            _halves=halves,
            _users=UserEncoder(encoder, halves, model.first_order),
            _pairs=PairEncoder(encoder, halves, model.first_order),
        )

    @property
    def num_items(self) -> int:
        """Items whose half is ready."""
        return len(self.item_half[0]) - 1

    def features(self, side: Side) -> tuple[Feature, ...]:
        """The features that `score` reads of the user or of the pairs, or `prepare` of the items."""
        return tuple(feature for feature in self.package.encoder.features if half_of(feature) is side)

    def updated(self, rows: NDArray[np.int64], items: pa.Table) -> Self:
        """A scorer in which some items have newer features.

        Args:
            rows: (n,) of the items, distinct, in [0, num_items).
            items: (n) as in `prepare`.

        Raises:
            ArtifactError: as in `prepare`.
            ValueError: rows are out of range, or not as many as `items`.
        """
        check_updated(rows, items, self.num_items)
        place = torch.from_numpy(rows).to(self.item_half[0].device)
        newer, newer_first_order = _item_half(self.package, self._model, self._halves, items)
        half = tuple(old.index_copy(0, place, new) for old, new in zip(self.item_half, newer, strict=True))
        first_order = self.item_first_order.copy()
        first_order[rows] = newer_first_order
        return replace(self, item_half=half, item_first_order=first_order)

    def score(
        self, user: pa.Table | Mapping[str, Any], pairs: pa.Table | Sequence[PairColumns], rows: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """(m,) what `ModelPackage.predict` gives for the user with each candidate, to within 1e-5.

        Args:
            user: one row, or one value each, of the features of the user's side.
            pairs: (m) the features of pairs, in one table or in parts.
            rows: (m,) which item each candidate is, -1 for one of which nothing is known.

        Raises:
            ArtifactError: a feature is absent or has a type that does not fit; names it.
            ValueError: a row is out of range, or `pairs` has another number of rows.
        """
        scores = self.logits(user, pairs, rows)
        return self.package.calibrate(scores)

    def logits(
        self, user: pa.Table | Mapping[str, Any], pairs: pa.Table | Sequence[PairColumns], rows: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """(m,) like `score`, before calibration: `ModelPackage.scores`."""
        if len(rows) == 0:
            return np.empty(0, np.float32)
        places = self._places(rows)
        inputs, user_first_order = self._users.encode(self._values(user))
        numbers, first_order = self._pairs.encode(pairs, len(rows))
        device = self.item_half[0].device
        most = _MOST_PAIRS[device.type]
        with torch.inference_mode():
            ours = self._model.user_half(inputs.to(device))
            chosen, of_pairs = torch.from_numpy(places).to(device), torch.from_numpy(numbers).to(device)
            if len(rows) <= most:
                response = self._response(ours, chosen, of_pairs)
            else:
                parts = zip(torch.split(chosen, most), torch.split(of_pairs, most), strict=True)
                response = torch.cat([self._response(ours, *part) for part in parts])
        first_order += np.take(self.item_first_order, places)
        scores: NDArray[np.float32] = self._bias + self._scale * (
            response.cpu().numpy() + first_order + np.float32(user_first_order)
        )
        return scores

    def score_many(self, requests: Sequence[Request]) -> list[NDArray[np.float64]]:
        """What `score` gives for each request, to within 1e-6, with the work of all users done at once.

        Requests of about the same size are computed together, so that filling up the shorter ones never doubles the
        work, and only so many at a time: memory does not depend on the number of requests.

        Raises:
            ArtifactError: as in `score`, for any of the requests.
            ValueError: as in `score`.
        """
        if len(requests) == 1:
            return [self.score(*requests[0])]
        scores: list[NDArray[np.float64]] = [np.empty(0) for _ in requests]
        alike: dict[int, list[int]] = {}
        for place, (_, _, rows) in enumerate(requests):
            alike.setdefault(len(rows).bit_length(), []).append(place)
        for bits, places in alike.items():
            together = max(1, _MOST_PAIRS[self.item_half[0].device.type] >> bits)
            for start in range(0, len(places), together):
                chunk = places[start : start + together]
                for place, own in zip(chunk, self._score_alike([requests[p] for p in chunk]), strict=True):
                    scores[place] = own
        return scores

    def _score_alike(self, requests: Sequence[Request]) -> list[NDArray[np.float64]]:
        """Scores of requests that are filled up to the longest."""
        if len(requests) == 1 or len(requests[0][2]) == 0:
            return [self.score(*request) for request in requests]
        users, pairs, rows = zip(*requests, strict=True)
        sizes = np.array([len(own) for own in rows])
        places = np.concatenate([self._places(own) for own in rows])
        inputs, user_first_order = self._users.encode_many([self._values(user) for user in users])
        numbers, first_order = self._pairs.encode_many(pairs, sizes.tolist())
        filled = np.arange(sizes.max()) < sizes[:, None]  # (num_requests, most candidates)
        items = np.full(filled.shape, self.num_items)
        items[filled] = places
        padded = np.zeros((*filled.shape, numbers.shape[1]), np.float32)
        padded[filled] = numbers
        device = self.item_half[0].device
        with torch.inference_mode():
            ours = self._model.user_halves(inputs.to(device))
            chosen = torch.from_numpy(items).to(device)
            theirs = tuple(tensor[chosen] for tensor in self.item_half)
            responses = self._model.join_each(ours, theirs, torch.from_numpy(padded).to(device)).cpu().numpy()
        first_order += np.take(self.item_first_order, places)
        logits = self._bias + self._scale * (responses[filled] + first_order + np.repeat(user_first_order, sizes))
        return np.split(self.package.calibrate(logits), np.cumsum(sizes)[:-1])

    def _response(self, user: Half, places: Tensor, pairs: Tensor) -> Tensor:
        return self._model.join(user, tuple(tensor.index_select(0, places) for tensor in self.item_half), pairs)

    def _places(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """(m,) places in the items' half."""
        if not (rows.min() >= -1 and rows.max() < self.num_items):
            raise ValueError(f"rows from {rows.min()} to {rows.max()}: must be in [-1, {self.num_items})")
        return np.where(rows < 0, self.num_items, rows)

    def _values(self, user: pa.Table | Mapping[str, Any]) -> Mapping[str, Any]:
        return _only_row(user, self._users.features) if isinstance(user, pa.Table) else user


def check_updated(rows: NDArray[np.int64], items: pa.Table, num_items: int) -> None:
    """Raise ValueError unless there is a row in [0, num_items) for each of the items."""
    if len(rows) != items.num_rows:
        raise ValueError(f"{len(rows)} rows for {items.num_rows} items: give one row for each item")
    if len(rows) and not (rows.min() >= 0 and rows.max() < num_items):
        raise ValueError(f"rows from {rows.min()} to {rows.max()}: must be in [0, {num_items})")


def _only_row(table: pa.Table, features: Sequence[Feature]) -> Mapping[str, Any]:
    """The features' values; those that the table lacks are left out."""
    if table.num_rows != 1:
        raise ValueError(f"{table.num_rows} rows of user features: a request has one user")
    names = set(table.column_names)
    return {feature.name: table[feature.name][0].as_py() for feature in features if feature.name in names}


def _item_half(
    package: ModelPackage, model: SplitModel, halves: Halves, items: pa.Table
) -> tuple[Half, NDArray[np.float32]]:
    """(n, …) tensors of a table's items, and the (n,) first order of their numbers."""
    encoder = package.encoder
    check_columns([feature for feature in encoder.features if half_of(feature) is Side.ITEM], items.column_names)
    columns = {
        feature.name: items[feature.name] if half_of(feature) is Side.ITEM else pa.nulls(items.num_rows)
        for feature in encoder.features
    }
    encoded = encoder.transform(pa.table(columns))
    first_order = np.zeros(len(encoded), np.float32)
    if model.first_order is not None:
        numbers = halves.numbers(Side.ITEM)
        first_order = PartialFirstOrder(model.first_order, numbers)(encoded.numeric[:, numbers])
    parts = []
    with torch.inference_mode():
        for start in range(0, max(1, len(encoded)), _CHUNK_ROWS):
            inputs = encoded.inputs(slice(start, start + _CHUNK_ROWS)).to(package.model.bias.device)
            parts.append(model.item_half(halves.only(Side.ITEM, inputs)))
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True)), first_order
