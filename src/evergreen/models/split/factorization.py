"""Models whose halves are sums: linear ones, the factorization machine, and DeepFM."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from evergreen.contracts.training_set import Side
from evergreen.models.factorization_machine import NUMERIC_LIMIT, FactorizationMachine
from evergreen.models.inputs import ModelInputs
from evergreen.models.layers import FirstOrder
from evergreen.models.split.halves import FoldedLayers, Half, Halves, SplitModel, TableRows


class SplitSum(SplitModel):
    """Popularity and logistic regression: a sum of what the user and the item add."""

    def __init__(
        self,
        terms: Callable[[ModelInputs], Tensor],
        *,
        pair_weight: Tensor | None = None,
        first_order: FirstOrder | None = None,
    ) -> None:
        """Cut.

        Args:
            terms: (N,) what inputs add, 0 for padding and zeros.
            pair_weight: (P,) of the pairs' numbers; None: `first_order` holds all that they add.
            first_order: of the model's numbers.
        """
        self._terms = terms
        self._pair_weight = pair_weight
        self.first_order = first_order

    def item_half(self, items: ModelInputs) -> Half:
        """(n,) sums."""
        return (self._terms(items),)

    def user_half(self, user: ModelInputs) -> Half:
        """(1,) sum."""
        return (self._terms(user),)

    def user_halves(self, users: ModelInputs) -> Half:
        """(U, 1) sums."""
        return (self._terms(users).unsqueeze(1),)

    def join(self, user: Half, items: Half, pairs: Tensor) -> Tensor:
        """(m,) responses."""
        total = user[0] + items[0]
        return total if self._pair_weight is None else total + pairs @ self._pair_weight


class SplitFactorizationMachine(SplitModel):
    """Factorization machine, with or without a network over the same vectors and the numbers.

    The second order is half the square of the sum of all vectors, less what each half knows of itself: so a half is its
    weights less half its squares, its sum of vectors, and what the network's first layer makes of its inputs.
    """

    def __init__(
        self,
        model: FactorizationMachine,
        halves: Halves,
        deep: FoldedLayers | None = None,
        *,
        numeric_limit: float = math.inf,
    ) -> None:
        """Cut the model.

        Args:
            model: trained.
            halves: of its inputs.
            deep: reads vectors and numbers; what it gives is added.
            numeric_limit: where `deep` reads numbers cut.
        """
        self.first_order = model.first_order
        self._halves = halves
        self._deep = deep
        self._limit = numeric_limit
        self._dim = model.table.weight.shape[1] - 1
        self._rows = {side: TableRows(model.table, halves, side, exponent=model.exponent) for side in Side}
        device = model.bias.device
        self._numbers = {side: torch.tensor(halves.numbers(side), dtype=torch.int64, device=device) for side in Side}
        # Columns of the terms: the weights, then the sum of vectors, then the network's first layer.
        self._total = slice(1, 1 + self._dim)
        self._hidden = slice(1 + self._dim, 1 + self._dim + (0 if deep is None else len(deep.weight)))
        self._pair_weight = torch.zeros(len(halves.numbers(Side.PAIR)), self._hidden.stop, device=device)
        self._first_layer: dict[Side, Tensor] = {}
        if deep is not None:
            self._first_layer = {side: deep.weight[:, self._columns(side)].T.contiguous() for side in Side}
            self._pair_weight[:, self._hidden] = self._first_layer[Side.PAIR]
        self._numeric_vectors: dict[Side, Tensor] = {}
        if model.numeric_vectors is not None:
            self._numeric_vectors = {side: model.numeric_vectors.detach()[self._numbers[side]] for side in Side}

    def item_half(self, items: ModelInputs) -> Half:
        """(n, 1 + embedding_dim + hidden) terms, the bias of the network's first layer included."""
        return (self._item_terms(*self._of_items(items)),)

    def user_half(self, user: ModelInputs) -> Half:
        """(1, 1 + embedding_dim + hidden) terms."""
        return (self._terms(*self._of_user(user), Side.USER),)

    def join(self, user: Half, items: Half, pairs: Tensor) -> Tensor:
        """(m,) responses."""
        return self._response(self._joined(user[0], items[0], pairs))

    def _columns(self, side: Side) -> list[int]:
        """Columns that a half fills of what a network reads: all vectors, then all numbers."""
        places = self._halves.vectors(side)
        first_number = (len(self._halves.spec.categorical) + len(self._halves.spec.bags)) * self._dim
        columns = [place * self._dim + column for place in places for column in range(self._dim)]
        return columns + [first_number + place for place in self._halves.numbers(side)]

    def _of_items(self, items: ModelInputs) -> tuple[Tensor, Tensor]:
        """(n, F, 1 + embedding_dim) rows of the items' fields and bags, and (n, M) numbers."""
        return self._rows[Side.ITEM].of_items(items), items.numeric[:, self._numbers[Side.ITEM]]

    def _of_user(self, user: ModelInputs) -> tuple[Tensor, Tensor]:
        """(1, F, 1 + embedding_dim) rows of the user's fields and bags, and (1, M) numbers."""
        return self._rows[Side.USER].of_user(user), user.numeric.index_select(1, self._numbers[Side.USER])

    def _item_terms(self, rows: Tensor, numeric: Tensor) -> Tensor:
        terms = self._terms(rows, numeric, Side.ITEM)
        if self._deep is not None:
            terms[:, self._hidden] += self._deep.bias
        return terms

    def _terms(self, rows: Tensor, numeric: Tensor, side: Side) -> Tensor:
        """(N, 1 + embedding_dim + hidden) what a half adds up to."""
        flat = rows[:, :, 1:].flatten(1)
        sums, squares = rows.sum(dim=1), torch.linalg.vecdot(flat, flat)
        weights, total = sums[:, 0], sums[:, 1:]
        if self._numeric_vectors:
            limited = numeric.clamp(-NUMERIC_LIMIT, NUMERIC_LIMIT)
            total = total + limited @ self._numeric_vectors[side]
            squares = squares + limited.square() @ self._numeric_vectors[side].square().sum(dim=1)
        parts = [(weights - 0.5 * squares).unsqueeze(1), total]
        if self._deep is not None:
            parts.append(self._network_inputs(rows, numeric) @ self._first_layer[side])
        return torch.cat(parts, dim=1)

    def _network_inputs(self, rows: Tensor, numeric: Tensor) -> Tensor:
        """(N, len(columns)) what a network reads of a half."""
        return torch.cat([rows[:, :, 1:].flatten(1), self._limited(numeric)], dim=1)

    def _limited(self, numeric: Tensor) -> Tensor:
        return numeric if math.isinf(self._limit) else numeric.clamp(-self._limit, self._limit)

    def _joined(self, user: Tensor, items: Tensor, pairs: Tensor) -> Tensor:
        """(m, …) terms of user, item and pair."""
        terms = torch.addmm(user, self._limited(pairs), self._pair_weight).add_(items)
        if self._numeric_vectors:
            vectors, limited = self._numeric_vectors[Side.PAIR], pairs.clamp(-NUMERIC_LIMIT, NUMERIC_LIMIT)
            terms[:, self._total] += limited @ vectors
            terms[:, 0] -= 0.5 * (limited.square() @ vectors.square().sum(dim=1))
        return terms

    def _response(self, terms: Tensor) -> Tensor:
        """(m,) weights, products and the network's output."""
        total = terms[:, self._total]
        response: Tensor = terms[:, 0] + 0.5 * torch.linalg.vecdot(total, total)
        if self._deep is not None:
            response += self._deep.rest(terms[:, self._hidden]).squeeze(1)
        return response
