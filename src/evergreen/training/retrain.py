"""Retraining: of the ways to a fresh model the one that validates best.

What served was trained on a world that may be another one by now. So up to three candidates are trained on one training
set, and compared on its validation rows, the newest but the test rows: a model from scratch on all rows; where it is
known since when the world is another one, a model from scratch on the rows since then, for older ones would teach what
is no longer true; and what serves, trained further on the newest rows, which keeps what it has learned.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from operator import itemgetter
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from evergreen.contracts.artifact import atomic_directory
from evergreen.contracts.errors import ArtifactError, TrainingError
from evergreen.contracts.mapping import LogKind
from evergreen.contracts.training_set import TrainingSet
from evergreen.models.package import ModelPackage
from evergreen.training.config import TrainingConfig
from evergreen.training.trainer import Train, train_model

logger = logging.getLogger(__name__)

MIN_GAIN = 0.01
"""Share by which another way must validate better than the usual one. Validation rows are what the incumbent chose to
show, and few. So what knows more rows knows more of the items that were not shown there; and where the world has
changed, what was learned from the old one is wrong about them, however little of it the validation rows show."""


class Way(StrEnum):
    """How a fresh model came to be."""

    SCRATCH = "scratch"
    SINCE_CHANGE = "since the change"
    WARM_START = "warm start"


@dataclass(frozen=True)
class Candidate:
    """A way that was tried."""

    way: Way
    train_rows: int
    value: float | None
    """Normalized entropy (ratings: rmse) on the validation rows, lower is better; None: it could not be trained."""
    reason: str = ""
    """Why it could not."""


@dataclass(frozen=True)
class Retrained:
    """The best of the candidates."""

    package: ModelPackage
    way: Way
    candidates: tuple[Candidate, ...]


def retrain(
    training_set: TrainingSet,
    out: Path,
    *,
    config: TrainingConfig,
    incumbent: ModelPackage | None = None,
    changed_at: datetime | None = None,
    train: Train = train_model,
) -> Retrained:
    """Train a model in every way that there is, and keep the one that validates best.

    Args:
        training_set: all rows that may be learned from.
        out: where the package goes; written whole or not at all.
        config: which model, and how.
        incumbent: what serves; a start where it is a model of the same name that reads the same features.
        changed_at: since when the world is another one; None: nothing is known of a change.
        train: trains one model: here, or on other machines.

    Raises:
        TrainingError: not even a model from scratch can be trained.
    """
    start, end = (training_set.manifest.splits["train"].start, training_set.manifest.splits["train"].end)
    with atomic_directory(Path(out)) as scratch:
        folder = scratch.parent / f"{scratch.name}-ways"
        try:
            tried = [_try(Way.SCRATCH, training_set, folder, config, train)]
            newest = training_set
            if changed_at is not None and start < changed_at < end:
                try:
                    newest = rows_since(training_set, changed_at, folder / "rows")
                except ArtifactError as error:  # what was broken since then is left out, and that may be all
                    tried.append((Candidate(Way.SINCE_CHANGE, 0, None, str(error)), None))
                else:
                    tried.append(_try(Way.SINCE_CHANGE, newest, folder, config, train))
            if incumbent is not None and incumbent.info.name == config.model:
                tried.append(_try(Way.WARM_START, newest, folder, config, train, incumbent))
            trained = [(candidate, package) for candidate, package in tried if package is not None]
            if not trained:
                raise TrainingError(tried[0][0].reason)
            best, package = _best(trained, _usual(changed_at, incumbent))
            shutil.copytree(package.path, scratch, dirs_exist_ok=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    words = ", ".join(f"{c.way} {c.value:.4f}" if c.value is not None else f"{c.way}: {c.reason}" for c, _ in tried)
    logger.info("%s validates best: %s", best.way, words)
    return Retrained(ModelPackage.load(Path(out)), best.way, tuple(candidate for candidate, _ in tried))


def _usual(changed_at: datetime | None, incumbent: ModelPackage | None) -> tuple[Way, ...]:
    """The ways that need not prove themselves; the first that could be gone counts.

    After a change that is the rows since then; and once what serves has learned from such rows, to go on from there:
    with every release other items are shown, and what the newest rows no longer tell is in its weights.
    """
    if changed_at is None:
        return (Way.SCRATCH,)
    if incumbent is not None and incumbent.info.as_of > changed_at:
        return (Way.WARM_START, Way.SINCE_CHANGE, Way.SCRATCH)
    return (Way.SINCE_CHANGE, Way.SCRATCH)


def _best(trained: Sequence[tuple[Candidate, ModelPackage]], usual: Sequence[Way]) -> tuple[Candidate, ModelPackage]:
    """The usual way, unless another one is better by more than chance would explain."""
    known = {candidate.way: (candidate.value, pair) for pair in trained if (candidate := pair[0]).value is not None}
    if not known:
        return trained[0]
    best = min(known.values(), key=itemgetter(0))
    first = next((known[way] for way in usual if way in known), best)
    return best[1] if best[0] < first[0] * (1 - MIN_GAIN) else first[1]


def rows_since(training_set: TrainingSet, start: datetime, out: Path) -> TrainingSet:
    """A training set without the training rows before a moment; the other splits are the same.

    Args:
        training_set: all rows.
        start: of the rows that stay.
        out: directory to write.

    Raises:
        ArtifactError: no training row is left.
    """
    rows = training_set.read("train")
    rows = rows.filter(pc.greater_equal(rows["event_timestamp"], start))
    if not rows.num_rows:
        raise ArtifactError(f"{training_set.path}: no training row from {start} on")
    manifest = training_set.manifest
    info = manifest.splits["train"].model_copy(
        update={
            "start": start,
            "rows": rows.num_rows,
            "positives": rows.num_rows if training_set.kind is LogKind.RATINGS else int(pc.sum(rows["label"]).as_py()),
            "label_mean": pc.mean(rows["label"]).as_py(),
        }
    )
    with atomic_directory(out) as scratch:
        pq.write_table(rows, scratch / training_set.file("train").name, compression="zstd")
        for split in ("validation", "test"):
            shutil.copyfile(training_set.file(split), scratch / training_set.file(split).name)
        manifest.model_copy(update={"splits": {**manifest.splits, "train": info}}).write(scratch / TrainingSet.MANIFEST)
    return TrainingSet.load(out)


def _try(
    way: Way,
    training_set: TrainingSet,
    folder: Path,
    config: TrainingConfig,
    train: Train,
    incumbent: ModelPackage | None = None,
) -> tuple[Candidate, ModelPackage | None]:
    rows = training_set.manifest.splits["train"].rows
    try:
        package = train(training_set, folder / way.name.lower(), config=config, warm_start=incumbent)
    except (TrainingError, ArtifactError) as error:
        # The next way may still work: a short time has no click, and a model that reads other features is no start.
        return Candidate(way, rows, None, str(error)), None
    metric = "validation_rmse" if training_set.kind is LogKind.RATINGS else "validation_normalized_entropy"
    return Candidate(way, rows, package.metrics[metric]), package
