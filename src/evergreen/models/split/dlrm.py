"""DLRM: dot products within a half are known ahead, those across halves are left."""

from __future__ import annotations

import torch
from torch import Tensor

from evergreen.contracts.training_set import Side
from evergreen.models.dlrm import DLRM, NUMERIC_LIMIT
from evergreen.models.inputs import ModelInputs
from evergreen.models.split.halves import FoldedLayers, Half, Halves, SplitModel, TableRows


class SplitDLRM(SplitModel):
    """Terms of the user, of the item, and of both, for whatever reads the dot products.

    That is the sum by pair weights, column 0 of the terms, and the first layer of the top network. Pairs of vectors of
    one half are in its terms; those of a user's and an item's vector are left to a request, and so are those with the
    vector of all numbers, which user, item and pair make together.

    The model must have numbers and a top network.
    """

    def __init__(self, model: DLRM, halves: Halves) -> None:
        assert model.bottom is not None
        assert model.top is not None
        self.first_order = model.first_order
        self._bottom, self._top = FoldedLayers(model.bottom), FoldedLayers(model.top)
        self._dim = model.table.weight.shape[1] - 1
        users, items = (torch.tensor(halves.vectors(side), dtype=torch.int64) for side in (Side.USER, Side.ITEM))
        numbers = len(halves.spec.categorical) + len(halves.spec.bags)  # place of the numbers' vector
        device = model.bias.device
        self._rows = {side: TableRows(model.table, halves, side, exponent=model.exponent) for side in Side}
        self._numbers = {side: torch.tensor(halves.numbers(side), dtype=torch.int64, device=device) for side in Side}
        self._first_layer = {side: self._bottom.weight[:, self._numbers[side]].T.contiguous() for side in Side}
        # (1 + hidden, num_inputs): the sum by pair weights as one more output of the first layer.
        sums = torch.cat([torch.zeros(self._dim, device=device), model.pair_weights.detach()])
        self._reader = torch.cat([sums[None], self._top.weight])
        # Place of each dot product among the reader's columns, by the places of its vectors.
        self._column = torch.full((numbers + 1, numbers + 1), -1, dtype=torch.int64)
        left, right = model.pairs.cpu() // (numbers + 1), model.pairs.cpu() % (numbers + 1)
        self._column[left, right] = self._column[right, left] = self._dim + torch.arange(len(left))
        self._own = {Side.USER: self._within(users), Side.ITEM: self._within(items)}
        across = self._column[items][:, users].flatten()
        self._with_items = self._reader[:, torch.cat([self._column[items, numbers], across])].T.contiguous()
        self._with_users = self._reader[:, self._column[users, numbers]].T.contiguous()
        self._of_numbers = self._reader[:, : self._dim].T.contiguous()

    def _within(self, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Left and right of each pair of a half's vectors, and the reader's columns for them."""
        left, right = torch.triu_indices(len(places), len(places), offset=1)
        columns = self._column[places[left], places[right]]
        device = self._reader.device
        return left.to(device), right.to(device), self._reader[:, columns].T.contiguous()

    def _half(self, rows: Tensor, numeric: Tensor, side: Side) -> tuple[Tensor, Tensor, Tensor]:
        """(N, 1 + hidden) terms, (N, width) of the bottom's first layer without its bias, and (N, F, dim) vectors."""
        vectors = rows[:, :, 1:].contiguous()
        left, right, reader = self._own[side]
        terms = (vectors[:, left] * vectors[:, right]).sum(dim=2) @ reader
        terms[:, 0] += rows[:, :, 0].sum(dim=1)
        return terms, numeric.clamp(-NUMERIC_LIMIT, NUMERIC_LIMIT) @ self._first_layer[side], vectors

    def item_half(self, items: ModelInputs) -> Half:
        """Terms and the bottom's first layer, biases included, and (n, num_item_vectors, dim) vectors."""
        rows, numeric = self._rows[Side.ITEM].of_items(items), items.numeric[:, self._numbers[Side.ITEM]]
        terms, bottom, vectors = self._half(rows, numeric, Side.ITEM)
        terms[:, 1:] += self._top.bias
        return terms, bottom + self._bottom.bias, vectors

    def user_half(self, user: ModelInputs) -> Half:
        """Terms, the bottom's first layer, (dim, num_user_vectors) vectors, and the reader of what is left.

        That is the numbers' vector together with its dot products with the user's, and all with the item's.
        """
        numeric = user.numeric.index_select(1, self._numbers[Side.USER])
        terms, bottom, vectors = self._half(self._rows[Side.USER].of_user(user), numeric, Side.USER)
        transposed = vectors[0].T.contiguous()
        reader = torch.cat([torch.addmm(self._of_numbers, transposed, self._with_users), self._with_items])
        return terms, bottom, transposed, reader

    def join(self, user: Half, items: Half, pairs: Tensor) -> Tensor:
        """(m,) responses."""
        terms, user_bottom, user_vectors, reader = user
        item_terms, item_bottom, item_vectors = items
        limited = pairs.clamp(-NUMERIC_LIMIT, NUMERIC_LIMIT)
        numbers = self._bottom.rest(torch.addmm(user_bottom, limited, self._first_layer[Side.PAIR]).add_(item_bottom))
        across = (item_vectors.view(-1, self._dim) @ user_vectors).view(len(item_vectors), -1)
        with_numbers = (item_vectors * numbers.unsqueeze(1)).sum(dim=2)
        terms = torch.addmm(terms, torch.cat([numbers, with_numbers, across], dim=1), reader).add_(item_terms)
        return terms[:, 0] + self._top.rest(terms[:, 1:]).squeeze(1)
