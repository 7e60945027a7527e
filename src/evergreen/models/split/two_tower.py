"""Two towers: the user's once a request, of the item's what does not depend on the moment."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from evergreen.contracts.training_set import Side
from evergreen.models.inputs import ModelInputs
from evergreen.models.split.halves import FoldedLayers, Half, Halves, SplitModel, TableRows
from evergreen.models.two_tower import TwoTower


class SplitTwoTower(SplitModel):
    """The dot product of a user's vector and an item's; the latter is ready unless the tower reads an item's age."""

    def __init__(self, model: TwoTower, halves: Halves) -> None:
        self._model = model
        tower = model.item_tower
        self._tower = FoldedLayers(tower.network)
        numbers = tower.numbers.tolist()
        first_number = self._tower.weight.shape[1] - len(numbers)
        weight = torch.zeros(len(halves.numbers(Side.PAIR)), len(self._tower.weight), device=model.bias.device)
        read = [(row, place) for row, place in enumerate(halves.numbers(Side.PAIR)) if place in numbers]
        for row, place in read:
            weight[row] = self._tower.weight[:, first_number + numbers.index(place)]
        self._pair_weight = weight if read else None
        self._user_tower = FoldedLayers(model.user_tower.network)
        exponent = model.config.history_exponent
        self._user_rows = TableRows(model.table, halves, Side.USER, exponent=exponent)
        # Both vectors have length temperature**-0.5; the item's that is computed with each pair is left at 1.
        self._user_scale = model.config.temperature if read else math.sqrt(model.config.temperature)

    def item_half(self, items: ModelInputs) -> Half:
        """(n, output_dim) vectors, or (n, width) of the tower's first layer where it reads what changes."""
        if self._pair_weight is None:
            return (self._model.item_vectors(items),)
        inputs = self._model.item_tower.network_inputs(self._model.table, items)
        return (functional.linear(inputs, self._tower.weight, self._tower.bias),)

    def user_half(self, user: ModelInputs) -> Half:
        """(1, output_dim) vector, divided by what the item's still lacks."""
        numeric = user.numeric.index_select(1, self._model.user_tower.numbers)
        inputs = torch.cat([self._user_rows.of_user(user).flatten(1), numeric], dim=1)
        output = self._user_tower.rest(functional.linear(inputs, self._user_tower.weight, self._user_tower.bias))
        return (functional.normalize(output, dim=1) / self._user_scale,)

    def join(self, user: Half, items: Half, pairs: Tensor) -> Tensor:
        """(m,) dot products."""
        if self._pair_weight is None:
            return items[0] @ user[0][0]
        vectors = self._tower.rest(torch.addmm(items[0], pairs, self._pair_weight))
        return functional.normalize(vectors, dim=1) @ user[0][0]
