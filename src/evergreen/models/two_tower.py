"""Two towers for retrieval: a vector of the user and one of the item, whose dot product is the score.

Source: Yi et al. 2019, Sampling-bias-corrected neural modeling for large corpus item recommendations (normalised
vectors, temperature, the batch's items as candidates, the logQ correction); Covington et al. 2016, Deep neural networks
for YouTube recommendations (the user as the sum of what he chose). Deviates: how often items occur is counted over all
training rows since the item came, rather than estimated in a stream; rows without a click lend their items as
candidates (Yang et al. 2020, Mixed negative sampling); where an item is several candidates of a batch, the correction
counts them.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from evergreen.contracts.errors import TrainingError
from evergreen.contracts.training_set import Side
from evergreen.models.base import ModelConfig, RankingModel
from evergreen.models.encoding import ITEM_FIELD
from evergreen.models.inputs import PAD, EncodedRows, InputSpec, ModelInputs
from evergreen.models.layers import SharedTable

_ID_FIELDS = ("user_id", ITEM_FIELD)


class TwoTowerConfig(ModelConfig):
    """Hyper-parameters of the two towers."""

    embedding_dim: int = Field(default=32, ge=1, le=1024)
    """Of a field."""
    init_std: float = Field(default=0.1, gt=0)
    history_exponent: float = Field(default=0.5, ge=0, le=1)
    """A bag's sum is divided by its number of values to this power; 1 is the mean."""
    hidden: tuple[int, ...] = (128,)
    """Widths of each tower's hidden layers."""
    output_dim: int = Field(default=32, ge=1, le=1024)
    """Of the vectors that an index holds."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    id_dropout: float = Field(default=0.3, ge=0, lt=1)
    """Chance that a user or item id is read as unseen in training. Here rather than in the trainer, because the loss
    must know which item it was."""
    temperature: float = Field(default=0.1, gt=0)
    """Cosines are divided by it: how far apart the scores of the best and the worst item can be."""
    correct_sampling: bool = True
    """Whether the loss allows for how often an item is a candidate. Without, scores say how often an item is chosen
    relative to that: popular items are punished for being popular."""
    candidates: Literal["clicked", "not_clicked", "all"] = "not_clicked"
    """Whose items of a batch a chosen item is held against: of the rows with a click, as in the paper, of those
    without, or both. With few clicks a batch, the first are hardly any; where negatives are drawn from the catalogue of
    the moment, the second show what a list is chosen from."""


class TwoTower(RankingModel):
    """Score = bias + user vector . item vector. Features of both at once (`Side.PAIR`) are not read.

    Trained to tell which item a user chose, so scores order items well but are no log-odds before calibration; the bias
    has no part in it and keeps the base rate. Ratings are learned by squared error, as by all models.

    Raises:
        TrainingError: the user or the item has no feature, or the rows have no item_id.
    """

    Config: ClassVar[type[ModelConfig]] = TwoTowerConfig

    shared_rows: Tensor
    item_keys: Tensor
    log_frequency: Tensor
    log_average: Tensor

    def __init__(self, config: TwoTowerConfig, spec: InputSpec) -> None:
        super().__init__(spec)
        self.config = config
        self._id_places = [place for place, field in enumerate(spec.categorical) if field.name in _ID_FIELDS]
        self._item_place = next((p for p in self._id_places if spec.categorical[p].name == ITEM_FIELD), None)
        if self._item_place is None:
            raise TrainingError("model two_tower: no feature is called item_id: there is nothing to retrieve")
        items = spec.categorical[self._item_place]
        shared = [row for row in spec.untrained_rows if items.start <= row < items.start + items.num_rows]
        self._second_place = {place: len(spec.categorical) + i for i, place in enumerate(spec.second_rows)}
        self.table = SharedTable(spec, config.embedding_dim, init_std=config.init_std)
        self.user_tower = _Tower(spec, Side.USER, config)
        self.item_tower = _Tower(spec, Side.ITEM, config)
        # What only training needs is not persistent, or every package would carry it.
        self.register_buffer("shared_rows", torch.tensor(shared, dtype=torch.int64), persistent=False)
        self.register_buffer("item_keys", torch.empty(0, dtype=torch.int64), persistent=False)
        self.register_buffer("log_frequency", torch.empty(0), persistent=False)
        self.register_buffer("log_average", torch.zeros(()), persistent=False)

    def user_vectors(self, inputs: ModelInputs) -> Tensor:
        """(N, output_dim) vectors of the rows' users, each of length temperature^-1/2; item columns are not read."""
        return self._vectors(self.user_tower, inputs)

    def item_vectors(self, inputs: ModelInputs) -> Tensor:
        """(N, output_dim) vectors of the rows' items, each of length temperature^-1/2; user columns are not read."""
        return self._vectors(self.item_tower, inputs)

    def _vectors(self, tower: _Tower, inputs: ModelInputs) -> Tensor:
        vectors: Tensor = tower(self.table, inputs)
        return vectors / math.sqrt(self.config.temperature)

    def response(self, categorical: Tensor, numeric: Tensor, bags: Tensor) -> Tensor:
        """(N,) dot products of user and item vectors."""
        inputs = ModelInputs(categorical, numeric, bags)
        return (self.user_vectors(inputs) * self.item_vectors(inputs)).sum(dim=1)

    def prepare(self, train: EncodedRows, labels: NDArray[np.float32]) -> None:
        """Measure how often each item is a candidate, since it came: new items are not punished for being new.

        Args:
            train: all training rows in time order: an item counts from the row that it first stands in.
            labels: (num_rows,) 1 for rows with a click.
        """
        keys = self._keys(torch.from_numpy(train.categorical.astype(np.int64))).numpy()
        items, first, place = np.unique(keys, return_index=True, return_inverse=True)
        candidates = self._is_candidate(torch.from_numpy(labels > 0)).numpy()
        counts = np.bincount(place[candidates], minlength=len(items))
        known = items >= 0
        frequency, average = _frequency(counts[known], (1 - first / len(keys))[known] * candidates.sum())
        device = self.bias.device
        self.item_keys = torch.from_numpy(items[known]).to(device)
        self.log_frequency = torch.from_numpy(np.log(frequency).astype(np.float32)).to(device)
        self.log_average = torch.tensor(math.log(average), device=device)

    def _is_candidate(self, clicked: Tensor) -> Tensor:
        """(N,) whether the item of a row is a candidate for other rows."""
        if self.config.candidates == "all":
            return torch.ones_like(clicked)
        return clicked if self.config.candidates == "clicked" else ~clicked

    def training_loss(self, inputs: ModelInputs, labels: Tensor) -> Tensor:
        """Mean over the rows with a click of -log of the probability that theirs is the item chosen.

        Args:
            inputs: a batch, with the ids as they are: `id_dropout` is applied here.
            labels: (N,) 1 for rows with a click.

        Returns:
            A scalar; 0, with gradients of 0, for a batch without a click.
        """
        clicked = labels > 0
        chosen = torch.nonzero(clicked).squeeze(1)
        if len(chosen) == 0:  # through both towers, so that every batch has gradients for the same parameters
            return 0.0 * self.response(*(tensor[:1] for tensor in inputs)).sum()
        columns = torch.nonzero(self._is_candidate(clicked)).squeeze(1)
        keys = self._keys(inputs.categorical)
        rows = inputs._replace(categorical=self._drop_ids(inputs.categorical))
        users, own = self.user_vectors(_take(rows, chosen)), self.item_vectors(_take(rows, chosen))
        candidates = self.item_vectors(_take(rows, columns))
        with torch.autocast(users.device.type, enabled=False):  # differences of logits need more than bfloat16
            own_scores = (users.float() * own.float()).sum(dim=1)
            scores = users.float() @ candidates.float().T
        return sampled_softmax(own_scores, scores, chosen=chosen, columns=columns, keys=keys, log_q=self._log_q(keys))

    def _keys(self, categorical: Tensor) -> Tensor:
        """(N,) what tells items apart: their table rows, or -1 for items that share one row with all rare ones."""
        assert self._item_place is not None
        rows = categorical[:, self._item_place]
        second = torch.full_like(rows, PAD)
        if self._item_place in self._second_place:
            second = categorical[:, self._second_place[self._item_place]]
        unknown = torch.isin(rows, self.shared_rows) & (second == PAD)
        return torch.where(unknown, -1, rows * self.spec.num_embeddings + second)

    def _log_q(self, keys: Tensor) -> Tensor:
        """(N,) log of how often a candidate is the item of each key; an item without a row counts as average."""
        if not self.config.correct_sampling or len(self.item_keys) == 0:
            return torch.zeros(len(keys), device=keys.device)
        place = torch.searchsorted(self.item_keys, keys).clamp(max=len(self.item_keys) - 1)
        return torch.where(self.item_keys[place] == keys, self.log_frequency[place], self.log_average)

    def _drop_ids(self, categorical: Tensor) -> Tensor:
        """Read a share of user and item ids as unseen, when training."""
        if not self.training or self.config.id_dropout == 0:
            return categorical
        categorical = categorical.clone()
        for place in self._id_places:
            dropped = torch.rand(len(categorical), device=categorical.device) < self.config.id_dropout
            categorical[dropped, place] = self.spec.categorical[place].unseen
            if place in self._second_place:
                categorical[dropped, self._second_place[place]] = PAD
        return categorical


class _Tower(nn.Module):
    """A network over the fields, bags and numbers of one side; its outputs have length 1."""

    own: Tensor
    own_bags: Tensor
    fields: Tensor
    numbers: Tensor

    def __init__(self, spec: InputSpec, side: Side, config: TwoTowerConfig) -> None:
        super().__init__()
        bags = [place for place, bag in enumerate(spec.bags) if bag.side is side]
        fields = [place for place, field in enumerate(spec.categorical) if field.side is side]
        fields += [len(spec.categorical) + place for place in bags]
        columns = [(place, column) for place, column in enumerate(spec.numeric) if column.side is side]
        numbers = [place for place, _ in columns]
        numbers += [column.missing for _, column in columns if column.missing is not None]
        if not fields and not numbers:
            raise TrainingError(
                f"model two_tower: no feature describes the {side.value} alone: add one, or take a model that reads "
                "both sides at once, e.g. deepfm"
            )
        self._has_bags = bool(bags)
        self._exponent = config.history_exponent
        # The other side's rows are read as padding: looked up for nothing, they would cost the optimizer a step each.
        own = [field.side is side for field in spec.categorical]
        own += [own[place] for place in spec.second_rows]
        own_bags = [bag.side is side for bag in spec.bags for _ in range(bag.width)]
        self.register_buffer("own", torch.tensor(own, dtype=torch.bool), persistent=False)
        self.register_buffer("own_bags", torch.tensor(own_bags, dtype=torch.bool), persistent=False)
        self.register_buffer("fields", torch.tensor(fields, dtype=torch.int64), persistent=False)
        self.register_buffer("numbers", torch.tensor(numbers, dtype=torch.int64), persistent=False)
        layers: list[nn.Module] = []
        num_inputs = len(fields) * config.embedding_dim + len(numbers)
        for width in config.hidden:
            layers += [nn.Linear(num_inputs, width), nn.ReLU(), nn.Dropout(config.dropout)]
            num_inputs = width
        self.network = nn.Sequential(*layers, nn.Linear(num_inputs, config.output_dim))

    def network_inputs(self, table: SharedTable, inputs: ModelInputs) -> Tensor:
        """(N, num_inputs) vectors of fields and bags, then numbers in the order of `numbers`."""
        vectors = table.lookup(torch.where(self.own, inputs.categorical, PAD))
        if self._has_bags:
            pooled = table.pool(torch.where(self.own_bags, inputs.bags, PAD), exponent=self._exponent)
            vectors = torch.cat([vectors, pooled], dim=1)
        chosen = vectors.index_select(1, self.fields).flatten(1)
        return torch.cat([chosen, inputs.numeric.index_select(1, self.numbers)], dim=1)

    def forward(self, table: SharedTable, inputs: ModelInputs) -> Tensor:
        """(N, output_dim) vectors of length 1."""
        x = self.network(self.network_inputs(table, inputs))
        return functional.normalize(x, dim=1)


def sampled_softmax(
    own_scores: Tensor, scores: Tensor, *, chosen: Tensor, columns: Tensor, keys: Tensor, log_q: Tensor
) -> Tensor:
    """Mean of -log P(a row's item is the one chosen | its item and the candidates).

    Candidates are drawn with frequency q, whoever the user is. By Bayes' rule, of all these items the one that occurs c
    times was the one chosen with a probability in proportion to c * exp(score) / q. At the minimum a score is the log
    of how often the user chooses the item, plus what depends on the user alone.

    Args:
        own_scores: (P,) of rows with a click, for their own item.
        scores: (P, K) of the same rows, for the candidates.
        chosen: (P,) places of those rows in the batch.
        columns: (K,) places of the candidates in the batch.
        keys: (N,) which item each row of the batch holds; -1 for one that is like no other.
        log_q: (N,) log of how often a candidate is the item of each row.
    """
    itself = chosen.unsqueeze(1) == columns
    same = (keys[chosen].unsqueeze(1) == keys[columns]) & (keys[columns] >= 0)
    times = 1 + (same & ~itself).sum(dim=1)
    own = own_scores - log_q[chosen] + times.log()
    others = (scores - log_q[columns]).masked_fill(same | itself, -torch.inf)
    return functional.cross_entropy(torch.cat([own.unsqueeze(1), others], dim=1), torch.zeros_like(chosen))


def _take(rows: ModelInputs, places: Tensor) -> ModelInputs:
    return ModelInputs(*(tensor[places] for tensor in rows))


def _frequency(counts: NDArray[np.int64], chances: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """How often a candidate is each item since it came, and the average of it.

    Args:
        counts: (num_items,) how often each item was a candidate.
        chances: (num_items,) how many candidates there were since the item came.

    Returns:
        (num_items,) counts over chances, where one more count at the average rate keeps items that have just come from
        looking as frequent, or as rare, as luck has it.
    """
    average = max(1.0, float(counts.sum())) / max(1.0, float(chances.sum()))
    return (counts + 1) / (chances + 1 / average), average
