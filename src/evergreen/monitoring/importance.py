"""Which columns does the model care about? Drift of a column that no prediction depends on is none of our business.

Permutation importance with the labels left out: a column's values are shuffled over rows, and the loss is what that
would cost if the model's own probabilities were true,

    importance(column) = mean over rows of KL(prediction || prediction with the column shuffled)

which is the expected increase of log loss (of ratings: the mean squared change). For a calibrated model it is what
permutation importance estimates, without the noise of clicks that come for 1 row in 50: that noise would take
100 times the rows. It asks the network as it is, so it serves all models alike, which gradients do not: of an
embedding there is no slope, and coefficients only the linear model has.

Features that tell the same share their importance, as each stands in for the other; so do their weights in the gate.

Source: Breiman 2001; Fisher, Rudin and Dominici 2019 (model reliance).
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from evergreen.contracts.artifact import JsonModel
from evergreen.contracts.errors import ArtifactError
from evergreen.metrics.binary import PROBABILITY_FLOOR
from evergreen.models.inputs import EncodedRows
from evergreen.models.package import ModelPackage

logger = logging.getLogger(__name__)


class Importance(JsonModel):
    """How much the predictions of a model depend on each feature."""

    model_version: str
    rows: int = Field(ge=2)
    seed: int
    losses: dict[str, float]
    """By feature: expected increase of log loss in nats, or of the squared error of a rating, when it is shuffled."""

    @property
    def weights(self) -> dict[str, float]:
        """Shares of the sum, adding up to 1; all alike for a model that reads nothing."""
        total = sum(self.losses.values())
        return {name: loss / total if total > 0 else 1 / len(self.losses) for name, loss in self.losses.items()}


def permutation_importance(
    package: ModelPackage, table: pa.Table, *, max_rows: int = 5_000, seed: int = 0
) -> Importance:
    """Measure every feature of a model.

    Args:
        package: the model.
        table: (num_rows) with the columns of `package.info.features`; rows that it was not trained on.
        max_rows: drawn from them by seed. Time is that of scoring so many rows once a feature.
        seed: of the draw and of the shuffling.

    Raises:
        ArtifactError: fewer than 2 rows, or a column is absent.
    """
    if table.num_rows < 2:
        raise ArtifactError(f"{table.num_rows} rows: importance is measured by shuffling, which takes at least 2")
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(table.num_rows)[:max_rows])
    rows = package.encoder.transform(table.take(pa.array(chosen)))
    predictions = package.predict_encoded(rows)
    losses = {}
    for feature in package.info.features:
        shuffled = _shuffle(rows, feature.name, rng.permutation(len(rows)))
        losses[feature.name] = _loss(predictions, package.predict_encoded(shuffled), package.calibration is not None)
    return Importance(model_version=package.version, rows=len(rows), seed=seed, losses=losses)


def cached_importance(
    path: Path, package: ModelPackage, table: pa.Table, *, max_rows: int = 5_000, seed: int = 0
) -> Importance:
    """Like `permutation_importance`, kept in a file beside the run: a package never changes.

    Args:
        path: of the file; written when it is absent, or is of another model.
        package: as there.
        table: as there.
        max_rows: as there.
        seed: as there.
    """
    if path.is_file():
        known = Importance.read(path)
        if (known.model_version, known.seed) == (package.version, seed):
            return known
        logger.info("%s is of %s: measuring %s anew", path, known.model_version, package.version)
    importance = permutation_importance(package, table, max_rows=max_rows, seed=seed)
    importance.write(path)
    return importance


def _shuffle(rows: EncodedRows, feature: str, order: NDArray[np.int64]) -> EncodedRows:
    """The same rows with one feature taken from other rows, everything that encodes it together."""
    spec = rows.spec
    categories = [place for place, column in enumerate(spec.categorical) if column.name == feature]
    categories += [len(spec.categorical) + x for x, place in enumerate(spec.second_rows) if place in categories]
    numbers = [place for place, column in enumerate(spec.numeric) if column.name == feature]
    numbers += [missing for place in numbers if (missing := spec.numeric[place].missing) is not None]
    categorical, numeric = rows.categorical, rows.numeric
    if categories:
        categorical = categorical.copy()
        categorical[:, categories] = categorical[:, categories][order]
    if numbers:
        numeric = numeric.copy()
        numeric[:, numbers] = numeric[:, numbers][order]
    bags = tuple(
        bag.take(order) if column.name == feature else bag for bag, column in zip(rows.bags, spec.bags, strict=True)
    )
    return replace(rows, categorical=categorical, numeric=numeric, bags=bags)


def _loss(before: NDArray[np.float64], after: NDArray[np.float64], is_probability: bool) -> float:
    if not is_probability:
        return float(np.mean((after - before) ** 2))
    p, q = (np.clip(x, PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR) for x in (before, after))
    return float(np.mean(p * np.log(p / q) + (1 - p) * (np.log1p(-p) - np.log1p(-q))))
