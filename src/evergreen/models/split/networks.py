"""Which cut fits a model: by its very class, because a subclass may answer otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from evergreen.contracts.training_set import Side
from evergreen.models.base import RankingModel
from evergreen.models.dcn_v2 import DCNv2
from evergreen.models.deepfm import DeepFM
from evergreen.models.dlrm import DLRM
from evergreen.models.factorization_machine import FactorizationMachine
from evergreen.models.logistic_regression import LogisticRegression
from evergreen.models.multi_task import MultiTaskDeepFM
from evergreen.models.popularity import Popularity
from evergreen.models.split.dcn_v2 import SplitDCNv2
from evergreen.models.split.dlrm import SplitDLRM
from evergreen.models.split.factorization import SplitFactorizationMachine, SplitSum
from evergreen.models.split.halves import FoldedLayers, Halves, PlainModel, SplitModel
from evergreen.models.split.transformer import SplitTransformer
from evergreen.models.split.two_tower import SplitTwoTower
from evergreen.models.transformer import Transformer
from evergreen.models.two_tower import TwoTower


def _split_popularity(model: Popularity, halves: Halves) -> SplitModel:
    return SplitSum(lambda inputs: model.response(*inputs), pair_weight=model.weights[halves.numbers(Side.PAIR)])


def _split_logistic_regression(model: LogisticRegression, halves: Halves) -> SplitModel:
    return SplitSum(lambda inputs: model.category_terms(inputs.categorical, inputs.bags), first_order=model.first_order)


def _split_deepfm(model: DeepFM, halves: Halves) -> SplitModel:
    return SplitFactorizationMachine(model, halves, FoldedLayers(model.deep))


_SPLITS: dict[type[RankingModel], Callable[[Any, Halves], SplitModel]] = {
    Popularity: _split_popularity,
    LogisticRegression: _split_logistic_regression,
    FactorizationMachine: SplitFactorizationMachine,
    DeepFM: _split_deepfm,
    MultiTaskDeepFM: _split_deepfm,
    TwoTower: SplitTwoTower,
    DLRM: SplitDLRM,
    DCNv2: SplitDCNv2,
    Transformer: SplitTransformer,
}


def split_model(model: RankingModel, halves: Halves) -> SplitModel:
    """Cut a model into halves; one of which no cut is known, or whose settings allow none, is computed for each pair.

    Whole for each pair: a DLRM without numbers or with a single vector, a DCN-v2 with full matrices (`rank=None`).
    """
    split = _SPLITS.get(type(model))
    if split is None:
        return PlainModel(model, halves)
    if isinstance(model, DLRM) and (model.bottom is None or model.top is None):
        return PlainModel(model, halves)
    if isinstance(model, DCNv2) and not SplitDCNv2.fits(model):
        return PlainModel(model, halves)
    return split(model, halves)
