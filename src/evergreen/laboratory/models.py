"""Models of a replayed log, trained when they are asked for and kept: policies that agree share them, and so do runs.

models/<digest of all that makes the model>/
  training.json    ModelRecord
  package/         the model package
  references/      what monitors compare windows with, once a policy that reads reports has released the model
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
from pydantic import AwareDatetime

from evergreen.contracts.artifact import JsonModel, atomic_directory, canonical_json
from evergreen.contracts.decision import Window
from evergreen.contracts.loop_state import LoopState
from evergreen.contracts.training_set import TrainingSet
from evergreen.laboratory.backtest_results import BacktestConfig
from evergreen.laboratory.replayed_log import ReplayedLog
from evergreen.metrics.statistic import FloatArray
from evergreen.models.package import ModelPackage
from evergreen.monitoring.watch import keep_reference
from evergreen.training.config import TrainingConfig
from evergreen.training.trainer import train_model

logger = logging.getLogger(__name__)


class ModelRecord(JsonModel):
    """What made a model, and what it cost."""

    snapshot_id: str
    start: AwareDatetime
    as_of: AwareDatetime
    leave_out: tuple[Window, ...]
    validation_seconds: float
    test_seconds: float
    training: TrainingConfig
    log_seed: int
    cpu_seconds: float | None = None
    """Of the training alone; None: not trained yet."""

    @property
    def digest(self) -> str:
        """Names the model by what made it."""
        made_of = self.model_dump(mode="json", exclude={"cpu_seconds"})
        return hashlib.sha256(canonical_json(made_of)).hexdigest()[:16]


@dataclass(frozen=True)
class TrainedModel:
    """A model of the log."""

    package: ModelPackage
    record: ModelRecord
    cpu_seconds: float

    @property
    def version(self) -> str:
        """Of the package."""
        return self.package.version


class Models:
    """All models of a replayed log."""

    def __init__(
        self,
        log: ReplayedLog,
        config: BacktestConfig,
        path: Path,
        *,
        first: datetime,
        scratch: Path,
        on_progress: Callable[[str], None],
    ) -> None:
        """Look at what is there already.

        Args:
            log: to learn from.
            config: how.
            path: folder of the models.
            first: begin of the log.
            scratch: folder for training sets, to be removed afterwards.
            on_progress: told of each training.
        """
        self._log, self._config, self._path, self._first = log, config, path, first
        self._scratch, self._tell = scratch, on_progress
        self._known: dict[str, TrainedModel] = {}

    def at(self, as_of: datetime, leave_out: Sequence[Window] = ()) -> TrainedModel:
        """The model of a moment: learned from the window before it, its labels as far as they were final.

        Args:
            as_of: the moment.
            leave_out: times in which the data was broken.

        Raises:
            TrainingError: there is too little to learn from.
        """
        record = self._record(as_of, leave_out)
        if record.digest in self._known:
            return self._known[record.digest]
        folder = self._path / record.digest
        if not folder.exists():
            rows = self._training_set(record)
            started = time.process_time()
            with atomic_directory(folder) as made:
                train_model(rows, made / "package", config=record.training)
                record = record.model_copy(update={"cpu_seconds": time.process_time() - started})
                record.write(made / "training.json")
            self._tell(f"trained as of {as_of:%Y-%m-%d} on {rows.manifest.splits['train'].rows:,} rows")
        record = ModelRecord.read(folder / "training.json")
        trained = TrainedModel(ModelPackage.load(folder / "package"), record, record.cpu_seconds or 0.0)
        self._known[record.digest] = trained
        return trained

    def reference(self, trained: TrainedModel) -> LoopState:
        """A folder that holds what the monitors compare windows of the model with."""
        state = LoopState(self._path / trained.record.digest)
        if not state.reference(trained.version).is_file():
            keep_reference(state, self._training_set(trained.record), trained.package, seed=self._config.seed)
        return state

    def _record(self, as_of: datetime, leave_out: Sequence[Window]) -> ModelRecord:
        start = max(as_of - self._config.window, self._first)
        broken = {(w.start, w.end): w for w in leave_out if w.start < as_of and w.end > start}
        return ModelRecord(
            snapshot_id=self._log.snapshot.id,
            start=start,
            as_of=as_of,
            leave_out=tuple(window for _, window in sorted(broken.items())),
            validation_seconds=self._config.validation.total_seconds(),
            test_seconds=self._config.test.total_seconds(),
            training=TrainingConfig(model=self._config.model, seed=self._config.seed, export_program=False),
            log_seed=self._config.seed,
        )

    def _training_set(self, record: ModelRecord) -> TrainingSet:
        out = self._scratch / record.digest
        if out.exists():
            return TrainingSet.load(out)
        return self._log.training_set(
            out,
            start=record.start,
            as_of=record.as_of,
            validation=self._config.validation,
            test=self._config.test,
            leave_out=[(window.start, window.end) for window in record.leave_out],
        )


@dataclass(frozen=True)
class Scores:
    """What a model says of rows, (num_rows,) each: probabilities of a click, or ratings."""

    served: FloatArray
    """For the average position, as a server answers."""
    shown: FloatArray
    """Where each row was shown, as quality is measured."""


def score(package: ModelPackage, rows: pa.Table) -> Scores:
    """Score rows with features."""
    encoded = package.encoder.transform(rows)
    positions = rows["position"].fill_null(0).to_numpy().astype(np.int32)
    scores = package.scores_of_encoded(encoded)
    served = package.calibrate(scores)
    if package.position is None:
        return Scores(served, served)
    return Scores(served, package.calibrate(scores + package.position.at(positions)))
