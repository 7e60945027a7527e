"""DCN-v2: in low-rank cross layers the user's features shrink to a small matrix that is made once a request.

A cross layer multiplies x0 by a sum: x_l = x0 * (s_l + V_1 y_1 + … + V_l y_l), where y_l = U_l x_(l-1) has `rank`
numbers and s_l is 1 plus the biases so far. So whatever reads x_l by a matrix R, the next layer's U or the last layer,
gets

    R x_l = (R * s_l) x0 + sum over k of (R diag(x0) V_k) y_k

The first part is a sum over features. Of the second, the user's features give one small matrix for all candidates, and
only the columns of item and pair are computed for each.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from evergreen.contracts.training_set import Side
from evergreen.models.dcn_v2 import NUMERIC_LIMIT, DCNv2
from evergreen.models.inputs import ModelInputs
from evergreen.models.split.factorization import SplitFactorizationMachine
from evergreen.models.split.halves import FoldedLayers, Half, Halves


class SplitDCNv2(SplitFactorizationMachine):
    """The factorization machine's halves, and those of the cross layers, whose matrices must be of low rank."""

    def __init__(self, model: DCNv2, halves: Halves) -> None:
        last = model.last.weight.detach()
        width = (len(halves.spec.categorical) + len(halves.spec.bags)) * (model.table.weight.shape[1] - 1)
        width += halves.spec.numeric_width
        self._parallel = model.parallel
        if self._parallel:
            self._network = FoldedLayers([*model.deep, _linear(last[:, width:], model.last.bias.detach())])
            super().__init__(model, halves, self._network, numeric_limit=NUMERIC_LIMIT)
            readers = [last[:, :width]]
        else:  # the network reads what the cross layers give, so nothing of it is a sum over features
            self._network = FoldedLayers([*model.deep, model.last])
            super().__init__(model, halves, numeric_limit=NUMERIC_LIMIT)
            readers = [self._network.weight]
        downs, ups, biases = zip(*(_low_rank(layer) for layer in model.cross), strict=True)
        readers = [*downs, *readers]
        shifts = torch.cumsum(torch.stack([torch.ones(width, device=last.device), *biases]), dim=0)
        # (width, readers' outputs) of the sums over features, which stand behind the factorization machine's terms.
        sums = torch.cat([reader * shift for reader, shift in zip(readers, shifts, strict=True)]).T
        self._reads = _slices([len(reader) for reader in readers], start=self._hidden.stop)
        columns = {side: self._columns(side) for side in Side}
        self._side_sums = {side: sums[columns[side]] for side in Side}
        self._pair_weight = torch.cat([self._pair_weight, self._side_sums[Side.PAIR]], dim=1)
        varying = columns[Side.ITEM] + columns[Side.PAIR]
        self._readers = [reader[:, varying].T.contiguous() for reader in readers]
        self._ups = [up[varying].T.contiguous() for up in ups]
        self._user_readers = [reader[:, columns[Side.USER]] for reader in readers]
        self._user_ups = torch.cat([up[columns[Side.USER]] for up in ups], dim=1)

    @staticmethod
    def fits(model: DCNv2) -> bool:
        """Whether the cross layers' matrices are of low rank."""
        return all(isinstance(layer.linear, nn.Sequential) for layer in model.cross)

    def item_half(self, items: ModelInputs) -> Half:
        """(n, …) terms, and (n, num_item_columns) of x0."""
        rows, numeric = self._of_items(items)
        x0 = self._network_inputs(rows, numeric)
        sums = x0 @ self._side_sums[Side.ITEM]
        if not self._parallel:
            sums[:, -len(self._network.bias) :] += self._network.bias
        return torch.cat([self._item_terms(rows, numeric), sums], dim=1), x0

    def user_half(self, user: ModelInputs) -> Half:
        """(1, …) terms, and for each reader but the first the matrix by which it reads all y before it."""
        rows, numeric = self._of_user(user)
        x0 = self._network_inputs(rows, numeric)
        sums = x0 @ self._side_sums[Side.USER]
        scaled = x0.T * self._user_ups
        rank = self._user_ups.shape[1] // len(self._ups)
        matrices = [
            (reader @ scaled[:, : before * rank]).T for before, reader in enumerate(self._user_readers) if before
        ]
        return torch.cat([self._terms(rows, numeric, Side.USER), sums], dim=1), *matrices

    def join(self, user: Half, items: Half, pairs: Tensor) -> Tensor:
        """(m,) responses."""
        user_terms, *matrices = user
        terms = self._joined(user_terms, items[0], pairs)
        varying = torch.cat([items[1], self._limited(pairs)], dim=1)
        y = terms[:, self._reads[0]]
        read, factor = y, y @ self._ups[0]
        for place, matrix in enumerate(matrices, start=1):
            read = torch.addmm(terms[:, self._reads[place]], y, matrix)
            read = torch.addmm(read, varying * factor, self._readers[place])
            if place < len(matrices):
                y = torch.cat([y, read], dim=1)
                factor = torch.addmm(factor, read, self._ups[place])
        response = self._response(terms)
        return response + (read if self._parallel else self._network.rest(read)).squeeze(1)


def _low_rank(layer: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """(rank, width) and (width, rank) matrices of a cross layer, and its (width,) bias."""
    down, up, bias = (parameter.detach() for parameter in layer.parameters())
    return down, up, bias


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A layer of given weights."""
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    return layer


def _slices(lengths: list[int], *, start: int) -> list[slice]:
    """Slices of the given lengths, one after the other."""
    ends = list(accumulate(lengths, initial=start))
    return [slice(first, end) for first, end in pairwise(ends)]
