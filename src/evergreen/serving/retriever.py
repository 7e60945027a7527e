"""Which items to score when a request brings no candidates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.training_set import Feature, Side
from evergreen.models.encoding import check_columns
from evergreen.models.package import ModelPackage
from evergreen.models.split.halves import Halves
from evergreen.models.split.request import UserEncoder
from evergreen.models.split.scorer import check_updated
from evergreen.models.split.two_tower import SplitTwoTower
from evergreen.models.two_tower import TwoTower

_CHUNK_ROWS = 16_384
_BLOCK = 16


@dataclass(frozen=True)
class RetrievalIndex:
    """Vectors of all items, searched whole: no item is missed. Safe to share between threads: a search changes nothing.

    To read 100,000 vectors takes half a millisecond. An approximate index would be hardly faster, and would have to be
    built anew at every refresh (docs/adr/0011-retrieval.md).

    Attributes:
        package: the two towers; their network may be on a GPU, where the vectors then are, too.
        vectors: (output_dim, num_items) of the items. Items are columns: each score is then summed in the same order,
            so that equal items are equal.
    """

    package: ModelPackage
    vectors: Tensor
    _model: SplitTwoTower
    _users: UserEncoder

    @classmethod
    def build(cls, package: ModelPackage, items: pa.Table) -> Self:
        """Compute the items' vectors.

        Args:
            package: of a two_tower.
            items: (num_items) the features of the item's side, those of the moment (the item's age) included: they are
                taken as of now until the item is `updated`. Others are ignored, nulls are allowed anywhere.

        Raises:
            ArtifactError: the package holds another model, or a feature is absent or has a type that does not fit.
        """
        model, encoder = package.model, package.encoder
        if not isinstance(model, TwoTower):
            raise ArtifactError(f"{package.path}: holds a {package.info.name}; only a two_tower can retrieve items")
        halves = Halves(encoder.spec, encoder.features)
        vectors = _item_vectors(package, items)
        return cls(package, vectors, SplitTwoTower(model, halves), UserEncoder(encoder, halves, None))

    @property
    def num_items(self) -> int:
        """Items that a search may find."""
        return self.vectors.shape[1]

    def features(self, side: Side) -> tuple[Feature, ...]:
        """The features that `search` reads of the user, or `build` of the items; it reads none of pairs."""
        if side is Side.USER:
            return tuple(self._users.features)
        return tuple(feature for feature in self.package.encoder.features if feature.side is side is Side.ITEM)

    def updated(self, rows: NDArray[np.int64], items: pa.Table) -> Self:
        """An index in which some items have newer features.

        Args:
            rows: (n,) of the items, distinct, in [0, num_items).
            items: (n) as in `build`.

        Raises:
            ArtifactError: as in `build`.
            ValueError: rows are out of range, or not as many as `items`.
        """
        check_updated(rows, items, self.num_items)
        place = torch.from_numpy(rows).to(self.vectors.device)
        return replace(self, vectors=self.vectors.index_copy(1, place, _item_vectors(self.package, items)))

    def search(self, user: Mapping[str, Any], k: int, exclude: NDArray[np.int64]) -> NDArray[np.int64]:
        """(min(k, num_items less those excluded),) rows of the items nearest to the user, best first, ties by row.

        Args:
            user: one value each of the features of the user's side; more are ignored.
            k: how many, from 1.
            exclude: rows never returned.

        Raises:
            ArtifactError: a feature is absent or has a type that does not fit; names it.
        """
        inputs, _ = self._users.encode(user)
        with torch.inference_mode():
            (vector,) = self._model.user_half(inputs.to(self.vectors.device))
            scores = (vector[0] @ self.vectors).cpu().numpy()
        scores[exclude] = -np.inf
        rows = best_rows(scores, k)
        return rows[scores[rows] > -np.inf]


def best_rows(scores: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """(min(k, n),) places of the highest of (n,) scores, best first, ties by place.

    The k-th highest of the maxima of blocks is at most the k-th highest score: what is below it cannot be among the
    best, and to find it takes a fraction of a search among all.
    """
    num_blocks = len(scores) // _BLOCK
    if num_blocks < k:
        return np.argsort(-scores, kind="stable")[:k]
    maxima = scores[: num_blocks * _BLOCK].reshape(_BLOCK, num_blocks).max(axis=0)
    candidates = np.flatnonzero(scores >= np.partition(maxima, num_blocks - k)[num_blocks - k])
    return candidates[np.argsort(-scores[candidates], kind="stable")[:k]]


def _item_vectors(package: ModelPackage, items: pa.Table) -> Tensor:
    """(output_dim, num_items) vectors of a table's items."""
    encoder, model = package.encoder, package.model
    assert isinstance(model, TwoTower)
    own = [feature for feature in encoder.features if feature.side is Side.ITEM]
    check_columns(own, items.column_names)
    unread = pa.nulls(items.num_rows)
    columns = {feature.name: items[feature.name] if feature in own else unread for feature in encoder.features}
    encoded = encoder.transform(pa.table(columns))
    with torch.inference_mode():
        parts = [
            model.item_vectors(encoded.inputs(slice(start, start + _CHUNK_ROWS)).to(model.bias.device))
            for start in range(0, max(1, len(encoded)), _CHUNK_ROWS)
        ]
        return torch.cat(parts).T.contiguous()
