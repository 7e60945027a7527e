"""Which inputs of a model belong to the user's half, to the items' half, or to each pair, and layers cut along them.

Shapes: m candidates of one request, P numeric inputs of the pairs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from evergreen.contracts.training_set import Feature, FeatureOrigin, Side
from evergreen.models.base import RankingModel
from evergreen.models.inputs import PAD, InputSpec, ModelInputs
from evergreen.models.layers import FirstOrder, SharedTable
from evergreen.models.numeric import CLIP

_RANGE = 4 * CLIP
"""Wider than that of an encoded number, which is cut at CLIP."""

Half: TypeAlias = tuple[Tensor, ...]
"""What is computed ahead, or once a request; the first dimension counts items, or is 1 for the user."""


class Halves:
    """Places of the inputs of each half."""

    def __init__(self, spec: InputSpec, features: Sequence[Feature]) -> None:
        self.spec = spec
        self._half_of = {feature.name: half_of(feature) for feature in features}

    def vectors(self, side: Side) -> list[int]:
        """Places of the fields and bags of a half, counted as models stack their vectors: fields, then bags."""
        names = [*(field.name for field in self.spec.categorical), *(bag.name for bag in self.spec.bags)]
        return [place for place, name in enumerate(names) if self._half_of[name] is side]

    def columns(self, side: Side) -> list[int]:
        """Places of the numeric columns of a half, without indicators."""
        return [p for p, column in enumerate(self.spec.numeric) if self._half_of[column.name] is side]

    def numbers(self, side: Side) -> list[int]:
        """Places of the numeric columns of a half, then those of their indicators."""
        columns = self.columns(side)
        return columns + [missing for p in columns if (missing := self.spec.numeric[p].missing) is not None]

    def only(self, side: Side, inputs: ModelInputs) -> ModelInputs:
        """The inputs of one half; the others are padding and zeros, which add nothing to a sum."""
        fields = [self._half_of[field.name] is side for field in self.spec.categorical]
        fields += [fields[place] for place in self.spec.second_rows]
        bags = [self._half_of[bag.name] is side for bag in self.spec.bags for _ in range(bag.width)]
        numeric = torch.zeros_like(inputs.numeric)
        numbers = self.numbers(side)
        numeric[:, numbers] = inputs.numeric[:, numbers]
        device = inputs.numeric.device
        return ModelInputs(
            inputs.categorical.where(torch.tensor(fields, dtype=torch.bool, device=device), PAD),
            numeric,
            inputs.bags.where(torch.tensor(bags, dtype=torch.bool, device=device), PAD),
        )


def half_of(feature: Feature) -> Side:
    """The half that a feature is computed with. The age of an item is of the pair: it grows from moment to moment."""
    if feature.origin is FeatureOrigin.ON_DEMAND and feature.side is Side.ITEM:
        return Side.PAIR
    return feature.side


class SplitModel(ABC):
    """A model cut into halves: its `response` is join(user_half, item_half, pairs) and the first order of numbers."""

    first_order: FirstOrder | None = None
    """What `join` leaves out: a sum over numbers, which is added to the response in the end."""

    @abstractmethod
    def item_half(self, items: ModelInputs) -> Half:
        """(n, …) tensors of n items, whose other inputs are padding and zeros (`Halves.only`)."""

    @abstractmethod
    def user_half(self, user: ModelInputs) -> Half:
        """(1, …) tensors of one user, likewise."""

    @abstractmethod
    def join(self, user: Half, items: Half, pairs: Tensor) -> Tensor:
        """(m,) responses of one user, m items and (m, P) numbers of pairs. May overwrite `items`."""

    def user_halves(self, users: ModelInputs) -> Half:
        """(U, 1, …) tensors of U users at once, what `user_half` gives of each."""
        halves: Half = torch.vmap(self.user_half)(ModelInputs(*(tensor.unsqueeze(1) for tensor in users)))
        return halves

    def join_each(self, users: Half, items: Half, pairs: Tensor) -> Tensor:
        """(U, m) responses of U users at once, each with m items of its own, (U, m, …), and (U, m, P) numbers."""
        responses: Tensor = torch.vmap(self.join)(users, items, pairs)
        return responses


class PlainModel(SplitModel):
    """Any model: only encoding is done ahead, all of the network is computed for each candidate."""

    def __init__(self, model: RankingModel, halves: Halves) -> None:
        self._model = model
        self._pair_numbers = halves.numbers(Side.PAIR)

    def item_half(self, items: ModelInputs) -> Half:
        """Encoded rows of n items."""
        return tuple(items)

    def user_half(self, user: ModelInputs) -> Half:
        """The encoded row of the user."""
        return tuple(user)

    def join(self, user: Half, items: Half, pairs: Tensor) -> Tensor:
        """(m,) responses."""
        # Padding is 0, so that halves are put together by a sum.
        categorical, numeric, bags = (ours + theirs for ours, theirs in zip(user, items, strict=True))
        numeric[:, self._pair_numbers] = pairs
        return self._model.response(categorical, numeric, bags)

    def user_halves(self, users: ModelInputs) -> Half:
        """(U, 1, …) encoded rows of the users."""
        return tuple(tensor.unsqueeze(1) for tensor in users)

    def join_each(self, users: Half, items: Half, pairs: Tensor) -> Tensor:
        """(U, m) responses: of all pairs in one list, because what a model does may not fit `torch.vmap`."""
        spread = tuple(tensor.expand(-1, pairs.shape[1], -1).flatten(0, 1) for tensor in users)
        flat = tuple(tensor.flatten(0, 1) for tensor in items)
        return self.join(spread, flat, pairs.flatten(0, 1)).view(pairs.shape[:2])


class TableRows:
    """Rows of a half's fields and bags: of many items as training reads them, of one user by a single product."""

    def __init__(self, table: SharedTable, halves: Halves, side: Side, *, exponent: float) -> None:
        """Prepare.

        Args:
            table: of the model.
            halves: of its inputs.
            side: which half.
            exponent: of `SharedTable.pool`.
        """
        spec = halves.spec
        self._table, self._exponent = table, exponent
        device = table.weight.device
        self._places = torch.tensor(halves.vectors(side), dtype=torch.int64, device=device)
        # (F, C + X + L): which of a row's table rows each field and bag sums up.
        num_fields = len(spec.categorical)
        sums = torch.zeros(num_fields + len(spec.bags), spec.categorical_width + spec.bag_width, device=device)
        sums[range(num_fields), range(num_fields)] = 1.0
        sums[list(spec.second_rows), range(num_fields, spec.categorical_width)] = 1.0
        start = spec.categorical_width
        for place, bag in enumerate(spec.bags, start=num_fields):
            sums[place, start : start + bag.width] = 1.0
            start += bag.width
        self._sums = sums[self._places]
        self._values = self._sums * (self._places >= num_fields)[:, None]
        self._has_bags = bool((self._places >= num_fields).any())

    def of_items(self, items: ModelInputs) -> Tensor:
        """(n, F, width) rows of n items."""
        rows = self._table.lookup(items.categorical)
        if items.bags.shape[1]:
            rows = torch.cat([rows, self._table.pool(items.bags, exponent=self._exponent)], dim=1)
        return rows[:, self._places]

    def of_user(self, user: ModelInputs) -> Tensor:
        """(1, F, width) rows of one user."""
        places = torch.cat([user.categorical, user.bags], dim=1)[0]
        rows = self._sums @ self._table.weight.index_select(0, places)
        if self._has_bags:  # a field has no values to be divided by
            rows /= (self._values @ (places != PAD).float()).clamp(min=1.0).pow(self._exponent)[:, None]
        return rows.unsqueeze(0)


class PartialFirstOrder:
    """`FirstOrder` of some columns and their indicators, in numpy: it takes no part in any product."""

    def __init__(self, whole: FirstOrder, numbers: Sequence[int]) -> None:
        """Cut it out.

        Args:
            whole: of all columns.
            numbers: places of numeric columns, then those of indicators.
        """
        boundaries = whole.boundaries.cpu().numpy()
        bins = whole.bin_table.detach().cpu().numpy().reshape(len(boundaries), -1)
        columns = [place for place in numbers if place < len(boundaries)]
        finite = [boundaries[place][np.isfinite(boundaries[place])] for place in columns]
        self._weight = whole.weight.detach().cpu().numpy()[list(numbers)]
        # One search for all columns: each has a range of its own on the number line, which float64 holds exactly.
        self._offsets = np.arange(len(columns)) * _RANGE
        shifted = [row.astype(np.float64) + offset for row, offset in zip(finite, self._offsets, strict=True)]
        self._boundaries = np.concatenate([np.empty(0), *shifted])
        used = [bins[place, : len(row) + 1] for place, row in zip(columns, finite, strict=True)]
        self._bins = np.concatenate([np.empty(0, np.float32), *used])

    def __call__(self, numeric: NDArray[np.float32]) -> NDArray[np.float32]:
        """(N,) first order terms of (N, len(numbers)) numbers."""
        num_columns = len(self._offsets)
        place = np.searchsorted(self._boundaries, numeric[:, :num_columns] + self._offsets, side="right")
        terms: NDArray[np.float32] = numeric @ self._weight
        terms += np.take(self._bins, place + np.arange(num_columns)).sum(axis=1)
        return terms


class FoldedLayers:
    """Linear layers with ReLU between them as they score: dropout is gone, batch normalisation is in the weights."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        """Fold.

        Args:
            modules: at least one nn.Linear, each followed by BatchNorm1d, ReLU and Dropout or some of them.

        Raises:
            TypeError: there is another module among them.
        """
        self._layers: list[tuple[Tensor, Tensor]] = []
        self._relu: list[bool] = []
        for module in modules:
            if isinstance(module, nn.Linear):
                self._layers.append((module.weight.detach(), module.bias.detach()))
                self._relu.append(False)
            elif isinstance(module, nn.BatchNorm1d):
                self._layers[-1] = _normalised(*self._layers[-1], module)
            elif isinstance(module, nn.ReLU):
                self._relu[-1] = True
            elif not isinstance(module, nn.Dropout):
                raise TypeError(f"{type(module).__name__} among the layers of a network: it has no folded form")

    @property
    def weight(self) -> Tensor:
        """(width, num_inputs) of the first layer."""
        return self._layers[0][0]

    @property
    def bias(self) -> Tensor:
        """(width,) of the first layer."""
        return self._layers[0][1]

    def rest(self, x: Tensor) -> Tensor:
        """(N, num_outputs) from what the first layer gives, (N, width) before its ReLU."""
        relu = self._relu[0]
        for place, (weight, bias) in enumerate(self._layers[1:], start=1):
            x = functional.linear(torch.relu(x) if relu else x, weight, bias)
            relu = self._relu[place]
        return torch.relu(x) if relu else x


def _normalised(weight: Tensor, bias: Tensor, norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """Weights of a layer whose outputs are normalised by the running statistics."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = norm.weight.detach() / torch.sqrt(norm.running_var + norm.eps)
    return weight * factor[:, None], (bias - norm.running_mean) * factor + norm.bias.detach()
