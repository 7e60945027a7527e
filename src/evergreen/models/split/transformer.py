"""The Transformer: its encoder reads the user's history alone, so that it runs once a request."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from evergreen.contracts.training_set import Side
from evergreen.models.inputs import PAD, ModelInputs
from evergreen.models.split.factorization import SplitFactorizationMachine
from evergreen.models.split.halves import FoldedLayers, Half, Halves
from evergreen.models.transformer import Transformer, last_states


class SplitTransformer(SplitFactorizationMachine):
    """DeepFM's halves; of the item also the vector that meets the history, of the user also the history's states."""

    def __init__(self, model: Transformer, halves: Halves) -> None:
        super().__init__(model, halves, FoldedLayers(model.deep))
        self._transformer = model
        width = model.history_input.out_features
        weights = model.history_output.weight.detach()[0]
        self._latest, self._attended = weights[:width], weights[width:]
        self._root = width**0.5

    def item_half(self, items: ModelInputs) -> Half:
        """DeepFM's terms and (n, width) candidates."""
        rows, numeric = self._of_items(items)
        places = [self._halves.vectors(Side.ITEM).index(place) for place in self._transformer.candidate_places]
        candidate = self._transformer.candidate_input(rows[:, places, 1:].flatten(1))
        return self._item_terms(rows, numeric), candidate

    def user_half(self, user: ModelInputs) -> Half:
        """DeepFM's terms, (L, width) states of the L items of the history, and (width,) weights of the latest."""
        (terms,) = super().user_half(user)
        rows = self._transformer.history(user.bags)
        rows = rows[:, : int((rows != PAD).sum())]
        if rows.shape[1] == 0:
            return (terms,)
        states = self._transformer.encode_history(rows)[0]
        return terms, states, states[-1] * self._latest

    def user_halves(self, users: ModelInputs) -> Half:
        """Of U users: as `user_half`, up to the longest history, and (U, L) what keeps states beyond each one's out."""
        (terms,) = torch.vmap(super().user_half)(ModelInputs(*(tensor.unsqueeze(1) for tensor in users)))
        rows = self._transformer.history(users.bags)
        lengths = (rows != PAD).sum(dim=1)
        rows = rows[:, : int(lengths.max())]
        if rows.shape[1] == 0:
            return (terms,)
        beyond = rows == PAD
        states = self._transformer.encode_history(rows).masked_fill(beyond[:, :, None], 0.0)
        # A mean over no states at all would be nan; over zeros it is zero, which says as little.
        kept_out = (beyond & (lengths > 0)[:, None]).float() * torch.finfo(torch.float32).min
        return terms, states, last_states(states, lengths) * self._latest, kept_out

    def join(self, user: Half, items: Half, pairs: Tensor) -> Tensor:
        """(m,) responses."""
        terms, candidate = items
        response = super().join(user[:1], (terms,), pairs)
        if len(user) == 1:  # an empty history says nothing
            return response
        _, states, latest, *kept_out = user
        likeness = candidate @ (states.T / self._root)
        weight = functional.softmax(likeness + kept_out[0] if kept_out else likeness, dim=1)
        attended = torch.addmm(latest, weight, states * self._attended)
        return response.add_(torch.linalg.vecdot(attended, candidate))
