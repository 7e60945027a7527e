"""What an evaluation may be told, and what it needs of a model."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Protocol, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from evergreen.contracts.artifact import JsonModel
from evergreen.contracts.mapping import LogKind


class EvaluationConfig(BaseModel):
    """Settings of an evaluation. The defaults take about a minute on two cores for a log of half a million rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = 0
    num_replicates: int = Field(default=200, ge=20, le=10_000)
    """Draws of the bootstrap."""
    max_queries: int = Field(default=500, ge=1)
    """Interactions only: how many queries are ranked against the whole catalogue."""
    cutoffs: tuple[int, ...] = (5, 10, 20)
    """k of ndcg@k and recall@k."""
    primary_cutoff: int = 10
    chunk_rows: int = Field(default=200_000, ge=1)
    """Rows that are joined and scored at a time; bounds memory."""
    latency_budget_ms: float = Field(default=50.0, gt=0)
    """A model whose p99 is above it does not become champion."""
    latency_rows: int = Field(default=500, ge=1)
    latency_repetitions: int = Field(default=100, ge=10)
    calibration_bins: int = Field(default=10, ge=2)
    min_slice_rows: int = Field(default=100, ge=2)
    """Below it a slice of rows gets no metric."""
    min_slice_positives: int = Field(default=10, ge=1)
    min_slice_queries: int = Field(default=20, ge=2)
    max_periods: int = Field(default=62, ge=1)
    """Slices by time go back this many days (or weeks, or months) from the last; older rows are one slice."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.primary_cutoff not in self.cutoffs:
            raise ValueError(f"primary_cutoff={self.primary_cutoff}: must be one of cutoffs {list(self.cutoffs)}")
        if not all(k >= 1 for k in self.cutoffs):
            raise ValueError(f"cutoffs={list(self.cutoffs)}: every cutoff must be at least 1")
        return self


class GateConfig(JsonModel):
    """What a challenger must hold to take the place of what serves."""

    min_positives: int = Field(default=100, ge=1)
    """Of the test rows, and of those that were served; below it an interval of normalized entropy says too little."""
    max_click_rate_ratio: float = Field(default=1.25, gt=1)
    """By which factor predicted clicks may lie above or below what was observed, beyond the interval. Auctions and
    blends of several models read probabilities, so a better order with wrong numbers is no better model."""
    latency_budget_ms: float = Field(default=50.0, gt=0)
    """p99 of scoring 500 candidates."""
    must_beat: bool = True
    """Whether being as good is not enough. A model that is no better costs a release and brings nothing."""
    max_skew: float = Field(default=0.005, ge=0)
    """Share of its metric that a challenger may lose more than what serves, from the features that it was trained on to
    those that are served, beyond the interval; or as much as it is better by even so. A store that is a day behind
    costs both alike."""
    trusted_features: tuple[str, ...] = ()
    """Features that no server has logged yet, and of which a person knows that they are served as they are trained:
    they are taken from the training rows. Others count as unknown, since one that is made with the future looks like a
    new and good one."""
    max_served_rows: int = Field(default=200_000, ge=1)
    """The newest of the test rows that were served; bounds memory."""
    seed: int = 0


class ModelFacts(Protocol):
    """What a model says of itself; `evergreen.models.package.ModelInfo` does."""

    @property
    def name(self) -> str:
        """Name of the kind of model, as in the registry."""
        ...

    @property
    def kind(self) -> LogKind:
        """The kind of log it was trained on."""
        ...

    @property
    def snapshot_id(self) -> str:
        """The snapshot it was trained on."""
        ...

    @property
    def as_of(self) -> datetime:
        """The moment up to which that knows the world."""
        ...


class RowEncoder(Protocol):
    """From features to what a model reads; `evergreen.models.encoding.Encoder` is one."""

    @property
    def digest(self) -> str:
        """Encoders of one digest give equal rows."""
        ...

    def transform(self, table: pa.Table) -> Any:
        """Encode (num_rows,) rows."""
        ...

    def transform_pairs(self, users: pa.Table, candidates: pa.Table, user_of: NDArray[np.int64]) -> Any:
        """Encode (num_rows,) candidates, each with the features of its user."""
        ...


class Scorer(Protocol):
    """What an evaluation needs of a model; `evergreen.models.package.ModelPackage` has it."""

    @property
    def info(self) -> ModelFacts:
        """What it says of itself."""
        ...

    @property
    def version(self) -> str:
        """Name and digest, e.g. "deepfm-1a2b3c4d5e6f"."""
        ...

    @property
    def encoder(self) -> RowEncoder:
        """What it was trained with."""
        ...

    def scores_of_encoded(self, rows: Any) -> NDArray[np.floating[Any]]:
        """(num_rows,) raw scores of rows that `encoder` made, higher is better."""
        ...

    def predict_encoded(self, rows: Any, positions: NDArray[np.int32] | None = None) -> NDArray[np.floating[Any]]:
        """(num_rows,) calibrated probability where each row was shown (0: unknown position), or rating."""
        ...

    def predict(self, table: pa.Table) -> NDArray[np.floating[Any]]:
        """(num_rows,) calibrated probability, or rating."""
        ...
