"""From a training set to a model package."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from evergreen.contracts.artifact import canonical_json
from evergreen.contracts.errors import TrainingError
from evergreen.contracts.mapping import LogKind
from evergreen.contracts.training_set import TrainingSet
from evergreen.metrics.binary import auc, expected_calibration_error, log_loss, normalized_entropy
from evergreen.metrics.regression import rmse
from evergreen.models.base import (
    ClosedForm,
    ModelConfig,
    RankingModel,
    TwoTasks,
    predict_second_outcome,
    score_rows,
)
from evergreen.models.calibration import Calibration, calibration_report, fit_isotonic, fit_platt
from evergreen.models.encoding import ITEM_FIELD, Encoder, open_parquet
from evergreen.models.inputs import EncodedRows
from evergreen.models.layers import SharedTable, check_table_memory
from evergreen.models.multi_task import OutcomeScale
from evergreen.models.package import ModelInfo, ModelPackage, write_package
from evergreen.models.position import UNKNOWN, PositionEffects, examination_weights
from evergreen.models.registry import build_model, model_config
from evergreen.training.checkpoint import Checkpoint
from evergreen.training.config import TrainingConfig
from evergreen.training.distributed import Workers, workers
from evergreen.training.fitting import fit_by_gradient, thin, torch_device
from evergreen.training.model_card import model_card
from evergreen.training.task import Examples
from evergreen.training.warm_start import check_warm_start, take_weights

__all__ = ["Train", "TrainingConfig", "train_model"]

logger = logging.getLogger(__name__)

_READ_ROWS = 131_072
_METRIC_ROWS = 50_000
_MIN_OUTCOMES = 100
"""Known outcomes below which there is no second task to learn."""


class Train(Protocol):
    """Trains one model; `train_model` where it is called."""

    def __call__(  # noqa: D102
        self, training_set: TrainingSet, out: Path, /, *, config: TrainingConfig, warm_start: ModelPackage | None = None
    ) -> ModelPackage: ...


def train_model(
    training_set: TrainingSet,
    out: Path,
    *,
    config: TrainingConfig,
    warm_start: ModelPackage | None = None,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 30.0,
) -> ModelPackage:
    """Train one model with early stopping on the validation split, calibrate it there, and write its package.

    Under `torchrun` all processes call this alike; they share every batch, and the first writes the package.

    Args:
        training_set: the splits; test rows are not read.
        out: where the package goes; written whole or not at all.
        config: which model, and how.
        warm_start: a package of the same model, whose weights are the start. Its encoder is extended by new values.
        checkpoint: a file to go on from after a kill, with the same result; removed at the end. All processes of a run
            must see it.
        checkpoint_seconds: at least as long between two saves: a large table takes seconds to write.

    Raises:
        TrainingError: there is no such model or hyper-parameter, a split is empty or has one class only, no feature has
            a value, the loss diverges, a table does not fit into memory, or the model cannot start from `warm_start`.
        ArtifactError: the checkpoint is of another run, or `warm_start` reads other features.
    """
    hyperparameters = model_config(config.model, config.hyperparameters)
    if warm_start is not None:
        check_warm_start(warm_start, config.model, hyperparameters, config.encoder)
    labels = {split: _labels(training_set, split) for split in ("train", "validation")}
    with _torch_threads(config.num_threads):
        team = workers(torch_device(config))
        encoder, train_rows = _encode_training_rows(training_set, config, warm_start)
        validation_rows = _encode(encoder, training_set, "validation", len(labels["validation"]))
        logger.info(
            "%s: %d training rows, %d validation rows, %d numbers, %d fields, table of %d rows",
            config.model, len(train_rows), len(validation_rows), encoder.spec.numeric_width,
            len(encoder.spec.categorical), encoder.spec.num_embeddings,
        )  # fmt: skip
        model = _fresh_model(config, hyperparameters, encoder, labels["train"], training_set.kind)
        train, validation, outcome = _examples(
            training_set, model, config, {"train": train_rows, "validation": validation_rows}, labels
        )
        if warm_start is not None:
            take_weights(model, encoder, warm_start)
        saved = None
        if checkpoint is not None:
            saved = Checkpoint(checkpoint, _run_digest(training_set, config, warm_start, team), checkpoint_seconds)
        is_warm = warm_start is not None
        history, position = _fit(model, train, validation, config, training_set.kind, team, saved, is_warm=is_warm)
        if team.is_first:
            _write(
                out,
                training_set,
                config,
                hyperparameters,
                encoder,
                model,
                train,
                validation,
                position,
                outcome,
                history,
            )
            if saved is not None:
                saved.remove()
        team.wait()
    return ModelPackage.load(out)


def _write(
    out: Path,
    training_set: TrainingSet,
    config: TrainingConfig,
    hyperparameters: ModelConfig,
    encoder: Encoder,
    model: RankingModel,
    train: Examples,
    validation: Examples,
    position: PositionEffects | None,
    outcome: OutcomeScale | None,
    history: dict[str, Any],
) -> None:
    """Calibrate on validation rows, measure, and write the package."""
    scores = _scores_where_shown(model, validation, position)
    calibration = None
    metrics = dict(history)
    if training_set.kind is not LogKind.RATINGS:
        fit_calibration = fit_isotonic if config.calibration == "isotonic" else fit_platt
        calibration = fit_calibration(scores, validation.labels)
        report = calibration_report(scores, validation.labels, calibration)
        metrics |= {f"validation_{name}": value for name, value in report.items() if math.isfinite(value)}
    info = _model_info(training_set, config, hyperparameters, model, train.labels)
    sample = thin(train, _METRIC_ROWS)
    metrics |= _metrics("train", _scores_where_shown(model, sample, position), sample.labels, calibration, info)
    metrics |= _metrics("validation", scores, validation.labels, calibration, info)
    if outcome is not None:
        metrics |= _outcome_metrics(config.second_task, model, validation)
    write_package(
        out,
        info=info,
        encoder=encoder,
        model=model,
        calibration=calibration,
        position=position,
        outcome=outcome,
        metrics=metrics,
        card=model_card(info, training_set.manifest, metrics, calibration, position),
        export_program=config.export_program,
    )


@contextmanager
def _torch_threads(num_threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _labels(training_set: TrainingSet, split: str) -> NDArray[np.float32]:
    """(num_rows,) labels of a split that can be learned from."""
    labels: NDArray[np.float32] = training_set.read(split, ["label"])["label"].to_numpy().astype(np.float32, copy=True)
    place = f"{training_set.path}: the {split} split"
    if len(labels) == 0:
        raise TrainingError(f"{place} is empty: take a longer log, or change [split] in the mapping")
    if not np.isfinite(labels).all():
        row = int(np.flatnonzero(~np.isfinite(labels))[0])
        raise TrainingError(f"{place} has label {labels[row]} at row {row}: build the training set again")
    if training_set.kind is not LogKind.RATINGS and labels.min() == labels.max():
        raise TrainingError(
            f"{place} has {len(labels)} rows and all have label {labels[0]:g}; a model needs rows with and without a "
            "click: take a longer log, or enlarge the split in the mapping's [split]"
        )
    return labels


def _encode_training_rows(
    training_set: TrainingSet, config: TrainingConfig, warm_start: ModelPackage | None
) -> tuple[Encoder, EncodedRows]:
    """Fit an encoder, or extend that of the model to start from, and encode the rows: a column in memory at a time."""
    features = training_set.manifest.features
    with open_parquet(training_set.file("train"), features) as file:

        def read(name: str) -> pa.ChunkedArray:
            return file.read([name])[name]

        if warm_start is not None:
            return warm_start.encoder.extended_transform(read, features=features)
        return Encoder.fit_transform(read, features, config.encoder)


def _encode(encoder: Encoder, training_set: TrainingSet, split: str, num_rows: int) -> EncodedRows:
    """Encode a split in a stream, so that only encoded rows are held whole."""
    columns = [feature.name for feature in encoder.features]
    with open_parquet(training_set.file(split), encoder.features) as file:
        return encoder.transform_batches(file.iter_batches(batch_size=_READ_ROWS, columns=columns), num_rows=num_rows)


def _examples(
    training_set: TrainingSet,
    model: RankingModel,
    config: TrainingConfig,
    rows: Mapping[str, EncodedRows],
    labels: Mapping[str, NDArray[np.float32]],
) -> tuple[Examples, Examples, OutcomeScale | None]:
    """Training and validation rows with all that is learned from beside the features; the second outcome's scale."""
    examples = {split: Examples(rows[split], labels[split]) for split in rows}
    if training_set.kind is LogKind.IMPRESSIONS and config.position != "ignore":
        positions = {split: _positions(training_set, split) for split in rows}
        if positions["train"].max(initial=0) > 0:
            if config.position == "effect":
                examples = {split: replace(examples[split], positions=positions[split]) for split in rows}
            else:
                weights = _examination_weights(training_set, rows["train"], positions["train"], labels["train"])
                examples["train"] = replace(examples["train"], weights=weights)
    outcome = None
    if isinstance(model, TwoTasks):
        raw = {split: _numbers(training_set, split, config.second_task) for split in rows}
        if np.isfinite(raw["train"]).sum() >= _MIN_OUTCOMES:
            outcome = OutcomeScale.fit(raw["train"], log=config.second_task == "dwell_seconds")
            examples = {split: replace(examples[split], outcomes=outcome.standardise(raw[split])) for split in rows}
        else:
            logger.warning(
                "%s: %s is known of fewer than %d training rows: it learns one task alone",
                config.model, config.second_task, _MIN_OUTCOMES,
            )  # fmt: skip
    return examples["train"], examples["validation"], outcome


def _numbers(training_set: TrainingSet, split: str, column: str) -> NDArray[np.float32]:
    """(num_rows,) of a row field, nan where unknown."""
    values = training_set.read(split, [column])[column].to_numpy()
    numbers: NDArray[np.float32] = values.astype(np.float32)
    return numbers


def _positions(training_set: TrainingSet, split: str) -> NDArray[np.int32]:
    """(num_rows,) from 1; 0 where unknown."""
    positions = _numbers(training_set, split, "position")
    return np.maximum(np.nan_to_num(positions, nan=UNKNOWN), UNKNOWN).astype(np.int32)


def _examination_weights(
    training_set: TrainingSet, rows: EncodedRows, positions: NDArray[np.int32], labels: NDArray[np.float32]
) -> NDArray[np.float32]:
    place = [number for number, field in enumerate(rows.spec.categorical) if field.name == ITEM_FIELD]
    found = examination_weights(
        positions,
        labels,
        propensities=_numbers(training_set, "train", "propensity"),
        items=rows.categorical[:, place[0]] if place else None,
    )
    logger.info(
        "clicks weigh 1 / P(examined) of their position: %.0f of %.0f effective clicks, P(examined) by position %s",
        found.effective_clicks, labels.sum(), ", ".join(f"{p:.2f}" for p in found.examination[1:]),
    )  # fmt: skip
    return found.weights


def _run_digest(
    training_set: TrainingSet, config: TrainingConfig, warm_start: ModelPackage | None, team: Workers
) -> str:
    """Names a run: what is trained, how, on what rows and from where."""
    run = {
        "training_set": training_set.manifest.model_dump(mode="json"),
        "config": config.model_dump(mode="json"),
        "warm_start": warm_start.digest if warm_start is not None else None,
        "processes": team.count,
    }
    return hashlib.sha256(canonical_json(run)).hexdigest()


def _fresh_model(
    config: TrainingConfig, hyperparameters: ModelConfig, encoder: Encoder, labels: NDArray[np.float32], kind: LogKind
) -> RankingModel:
    """A model that answers with the base rate."""
    torch.manual_seed(config.seed)  # weights here, dropout later
    model = build_model(config.model, hyperparameters, encoder.spec)
    # Beside each table: the best weights so far, and Adam's two moments.
    copies = 3 if config.table_optimizer == "adam" else 1
    for table in (module for module in model.modules() if isinstance(module, SharedTable)):
        check_table_memory(*table.weight.shape, copies=copies)
    mean, std = float(labels.mean(dtype=np.float64)), float(labels.std(dtype=np.float64))
    if kind is LogKind.RATINGS:
        model.set_output(bias=mean, scale=std or 1.0)
    else:
        model.set_output(bias=math.log(mean / (1 - mean)), scale=1.0)
    return model


def _fit(
    model: RankingModel,
    train: Examples,
    validation: Examples,
    config: TrainingConfig,
    kind: LogKind,
    team: Workers,
    checkpoint: Checkpoint | None,
    *,
    is_warm: bool,
) -> tuple[dict[str, Any], PositionEffects | None]:
    """Fit the weights; returns what metrics.json tells of it, and what positions add to scores."""
    if isinstance(model, ClosedForm):
        tried = model.fit(train.rows, train.labels, validation.rows, validation.labels, kind=kind)
        return {"tried": tried, "chosen": min(tried, key=tried.__getitem__) if tried else None}, None
    fit = fit_by_gradient(
        model, train, validation, config, kind=kind, workers=team, checkpoint=checkpoint, keep_start=is_warm
    )
    best = fit.best
    if best.validation_loss >= fit.curve[0].validation_loss:
        logger.warning(
            "%s: no step beat the start on validation rows (%.5f against %.5f): %s",
            config.model, min(point.validation_loss for point in fit.curve[1:]), fit.curve[0].validation_loss,
            "the weights to start from are kept" if is_warm else "the features say little here",
        )  # fmt: skip
    position = None
    if fit.position is not None and train.positions is not None:
        position = fit.position.centred(train.positions)
        with torch.no_grad():
            model.bias.add_(fit.position.constant(train.positions))
    history = {
        "curve": [point.model_dump() for point in fit.curve],
        "best_step": best.step,
        "best_epoch": best.epoch,
    }
    return history, position


def _scores_where_shown(
    model: RankingModel, examples: Examples, position: PositionEffects | None
) -> NDArray[np.float64]:
    """(num_rows,) scores of rows at the positions where they were shown: what their labels can be compared with."""
    scores: NDArray[np.float64] = score_rows(model, examples.rows).astype(np.float64)
    if position is not None and examples.positions is not None:
        scores = scores + position.at(examples.positions)
    return scores


def _outcome_metrics(name: str, model: RankingModel, validation: Examples) -> dict[str, Any]:
    """Error of the second outcome on validation rows where it is known, in standard deviations of the training rows."""
    assert validation.outcomes is not None
    known = np.flatnonzero(np.isfinite(validation.outcomes))
    if len(known) == 0:
        return {}
    actual = validation.outcomes[known].astype(np.float64)
    predicted = predict_second_outcome(model, validation.rows.take(known)).astype(np.float64)
    return {
        f"validation_{name}_rmse": rmse(actual, predicted),
        f"validation_{name}_rmse_of_mean": rmse(actual, np.zeros(len(actual))),
        f"validation_{name}_rows": len(known),
    }


def _model_info(
    training_set: TrainingSet,
    config: TrainingConfig,
    hyperparameters: ModelConfig,
    model: RankingModel,
    labels: NDArray[np.float32],
) -> ModelInfo:
    manifest = training_set.manifest
    rating = manifest.mapping.rating if manifest.mapping.kind is LogKind.RATINGS else None
    return ModelInfo(
        name=config.model,
        kind=manifest.mapping.kind,
        mapping_name=manifest.mapping.name,
        snapshot_id=manifest.snapshot_id,
        feature_service=manifest.feature_service,
        as_of=manifest.as_of,
        features=manifest.features,
        hyperparameters=hyperparameters.model_dump(mode="json"),
        training=config.model_dump(mode="json"),
        train_rows=len(labels),
        label_mean=float(labels.mean(dtype=np.float64)),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        rating_minimum=rating.minimum if rating else None,
        rating_maximum=rating.maximum if rating else None,
    )


def _metrics(
    split: str,
    scores: NDArray[np.float64],
    labels: NDArray[np.float32],
    calibration: Calibration | None,
    info: ModelInfo,
) -> dict[str, Any]:
    """Figures of a split; validation rows chose the weights and the calibration."""
    y, score = labels.astype(np.float64), scores
    if calibration is None:
        values = {
            "rmse": rmse(y, np.clip(score, info.rating_minimum, info.rating_maximum)),
            "rmse_of_mean": rmse(y, np.full(len(y), info.label_mean)),
        }
    else:
        p = calibration.apply(score)
        values = {
            "log_loss": log_loss(y, p),
            "normalized_entropy": normalized_entropy(y, p),
            "auc": auc(y, score),
            "calibration_error": expected_calibration_error(y, p),
        }
    return {f"{split}_{name}": value if math.isfinite(value) else None for name, value in values.items()}
