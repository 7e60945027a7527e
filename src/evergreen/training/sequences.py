"""Item sequences of users: from interactions, held out for evaluation, and as batches of windows to train on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from evergreen.contracts.errors import TrainingError
from evergreen.models.inputs import PAD, Bag


@dataclass(frozen=True)
class Sequences:
    """Items of each user, oldest first, numbered from 1 (0 is padding)."""

    items: Bag
    num_items: int

    def __len__(self) -> int:
        return len(self.items.offsets) - 1

    @classmethod
    def from_interactions(cls, users: ArrayLike, items: ArrayLike) -> Sequences:
        """Group interactions by user.

        Args:
            users: (n,) ids of any kind, in time order.
            items: (n,) ids of any kind; numbered in the order of their sorted ids.

        Raises:
            TrainingError: there are none.
        """
        _, user = np.unique(np.asarray(users), return_inverse=True)
        catalogue, item = np.unique(np.asarray(items), return_inverse=True)
        if len(item) == 0:
            raise TrainingError("there are no interactions: a next-item model needs sequences of at least three items")
        order = np.argsort(user, kind="stable")
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.bincount(user))])
        return cls(Bag((item[order] + 1).astype(np.int32), offsets), len(catalogue))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(num_users,) number of items."""
        return np.diff(self.items.offsets)

    def counts(self, *, last: int | None = None) -> NDArray[np.int64]:
        """(num_items + 1,) how often each item occurs, or among the `last` items of each user; padding's is 0."""
        values = self.items.values
        if last is not None:
            from_end = np.repeat(self.items.offsets[1:], self.lengths) - np.arange(len(values))
            values = values[from_end <= last]
        return np.bincount(values, minlength=self.num_items + 1)


@dataclass(frozen=True)
class Holdout:
    """Histories, and the item that each is followed by."""

    histories: Sequences
    targets: NDArray[np.int64]
    """(num_users,)."""

    def every(self, max_users: int) -> Holdout:
        """Every n-th user, such that at most `max_users` are left."""
        rows = np.arange(0, len(self.targets), math.ceil(len(self.targets) / max_users))
        return Holdout(Sequences(self.histories.items.take(rows), self.histories.num_items), self.targets[rows])


def leave_one_out(sequences: Sequences) -> tuple[Sequences, Holdout, Holdout]:
    """Training sequences, validation and test: a user's last item is for test, the one before for validation.

    When the test item is predicted, the validation item is part of the history, as in the papers.

    Raises:
        TrainingError: no user has three items.
    """
    users = np.flatnonzero(sequences.lengths >= 3)
    if len(users) == 0:
        raise TrainingError(
            f"none of {len(sequences)} users has three items: leave-one-out takes the last for test, the one before "
            "for validation, and needs one to start from"
        )
    values, end = sequences.items.values, sequences.items.offsets[1:]

    def without_last(count: int) -> Sequences:
        keep = sequences.lengths[users] - count
        start = sequences.items.offsets[:-1][users]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(keep)])
        place = np.arange(offsets[-1]) + np.repeat(start - offsets[:-1], keep)
        return Sequences(Bag(values[place], offsets), sequences.num_items)

    train = without_last(2)
    validation = Holdout(train, values[end[users] - 2].astype(np.int64))
    return train, validation, Holdout(without_last(1), values[end[users] - 1].astype(np.int64))


def windows(sequences: Sequences, max_length: int, generator: torch.Generator) -> NDArray[np.int64]:
    """(num_windows, 2) first place and length of the pieces that sequences are cut into; each has at least 2 items.

    A piece holds at most one item more than `max_length`: all but the last are read, all but the first are predicted.
    Each item but a user's first is predicted once. Long sequences are cut at different places in each epoch, counted
    from the end: what lies at which position must not be learned.
    """
    lengths = sequences.lengths
    last = torch.randint(1, max_length + 1, (len(sequences),), generator=generator).numpy()
    last = np.where(lengths <= max_length + 1, max_length, last)
    place = np.arange(len(sequences.items.values))
    user = np.repeat(np.arange(len(sequences)), lengths)
    predicted = place > sequences.items.offsets[user]
    place, user = place[predicted], user[predicted]
    from_end = sequences.items.offsets[user + 1] - 1 - place
    piece = (from_end + max_length - last[user]) // max_length
    starts = np.flatnonzero(np.diff(user, prepend=-1) | np.diff(piece, prepend=-1))
    sizes = np.diff(starts, append=len(place))
    return np.stack([place[starts] - 1, sizes + 1], axis=1)


def batches(
    sequences: Sequences, *, max_length: int, batch_positions: int, generator: torch.Generator
) -> list[tuple[Tensor, Tensor]]:
    """One epoch of (N, L) inputs and (N, L) targets, PAD where there is none, in random order.

    Windows in a batch are of like length, so that hardly any padding is computed; N * L is at most `batch_positions`,
    unless one window alone is longer.
    """
    pieces = windows(sequences, max_length, generator)
    pieces = pieces[torch.randperm(len(pieces), generator=generator).numpy()]
    pieces = pieces[np.argsort(-pieces[:, 1], kind="stable")]
    cuts, start = [], 0
    while start < len(pieces):
        rows = max(1, batch_positions // int(pieces[start, 1] - 1))
        cuts.append(pieces[start : start + rows])
        start += rows
    order = torch.randperm(len(cuts), generator=generator).tolist()
    return [_padded(sequences, cuts[place]) for place in order]


def _padded(sequences: Sequences, pieces: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Inputs and targets of (N, 2) pieces, the longest of which comes first."""
    position = np.arange(pieces[0, 1])
    place = np.minimum(pieces[:, :1] + position, len(sequences.items.values) - 1)
    items = np.where(position < pieces[:, 1:], sequences.items.values[place], PAD)
    targets = torch.from_numpy(items[:, 1:].astype(np.int64))
    return torch.from_numpy(items[:, :-1].astype(np.int64)).where(targets != PAD, PAD), targets


def latest(sequences: Sequences, rows: NDArray[np.int64], max_length: int) -> NDArray[np.int64]:
    """(len(rows), L) latest items, oldest first, PAD after."""
    end, length = sequences.items.offsets[rows + 1], np.minimum(sequences.lengths[rows], max_length)
    position = np.arange(max(1, int(length.max())))
    place = np.minimum((end - length)[:, None] + position, len(sequences.items.values) - 1)
    return np.where(position < length[:, None], sequences.items.values[place], PAD).astype(np.int64)
