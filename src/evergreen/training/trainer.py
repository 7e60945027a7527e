"""From a training set to a model package."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from evergreen.contracts.errors import TrainingError
from evergreen.contracts.mapping import LogKind
from evergreen.contracts.training_set import TrainingSet
from evergreen.metrics.binary import auc, expected_calibration_error, log_loss, normalized_entropy
from evergreen.metrics.regression import rmse
from evergreen.models.base import ClosedForm, ModelConfig, RankingModel, score_rows
from evergreen.models.calibration import Calibration, fit_platt
from evergreen.models.encoding import Encoder
from evergreen.models.inputs import EncodedRows
from evergreen.models.package import ModelInfo, ModelPackage, write_package
from evergreen.models.registry import build_model, model_config
from evergreen.training.config import TrainingConfig
from evergreen.training.fitting import Examples, click_loss, fit_by_gradient, rating_loss, thin
from evergreen.training.model_card import model_card

__all__ = ["TrainingConfig", "train_model"]

logger = logging.getLogger(__name__)

_READ_ROWS = 131_072
_METRIC_ROWS = 50_000


def train_model(training_set: TrainingSet, out: Path, *, config: TrainingConfig) -> ModelPackage:
    """Train one model with early stopping on the validation split, calibrate it there, and write its package.

    Args:
        training_set: the splits; test rows are not read.
        out: where the package goes; written whole or not at all.
        config: which model, and how.

    Raises:
        TrainingError: there is no such model or hyper-parameter, a split is empty or has one class only, no feature has
            a value, or the loss diverges.
    """
    hyperparameters = model_config(config.model, config.hyperparameters)
    labels = {split: _labels(training_set, split) for split in ("train", "validation")}
    with _torch_threads(config.num_threads):
        encoder = Encoder.fit_columns(
            lambda name: training_set.read("train", [name])[name], training_set.manifest.features, config.encoder
        )
        train, validation = (
            Examples(_encode(encoder, training_set, split, len(label)), label) for split, label in labels.items()
        )
        logger.info(
            "%s: %d training rows, %d validation rows, %d numbers, %d fields, table of %d rows",
            config.model, len(train), len(validation), encoder.spec.numeric_width, len(encoder.spec.categorical),
            encoder.spec.num_embeddings,
        )  # fmt: skip
        model = _fresh_model(config, hyperparameters, encoder, train.labels, training_set.kind)
        history = _fit(model, train, validation, config, training_set.kind)
        scores = score_rows(model, validation.rows)
        calibration = None if training_set.kind is LogKind.RATINGS else fit_platt(scores, validation.labels)
        info = _model_info(training_set, config, hyperparameters, model, train.labels)
        sample = thin(train, _METRIC_ROWS)
        metrics = history | _metrics("train", score_rows(model, sample.rows), sample.labels, calibration, info)
        metrics |= _metrics("validation", scores, validation.labels, calibration, info)
        return write_package(
            out,
            info=info,
            encoder=encoder,
            model=model,
            calibration=calibration,
            metrics=metrics,
            card=model_card(info, training_set.manifest, metrics, calibration),
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


def _encode(encoder: Encoder, training_set: TrainingSet, split: str, num_rows: int) -> EncodedRows:
    """Encode a split in a stream, so that only encoded rows are held whole."""
    columns = [feature.name for feature in encoder.features]
    with pq.ParquetFile(training_set.file(split)) as file:
        return encoder.transform_batches(file.iter_batches(batch_size=_READ_ROWS, columns=columns), num_rows=num_rows)


def _fresh_model(
    config: TrainingConfig, hyperparameters: ModelConfig, encoder: Encoder, labels: NDArray[np.float32], kind: LogKind
) -> RankingModel:
    """A model that answers with the base rate."""
    torch.manual_seed(config.seed)  # weights here, dropout later
    model = build_model(config.model, hyperparameters, encoder.spec)
    mean, std = float(labels.mean(dtype=np.float64)), float(labels.std(dtype=np.float64))
    if kind is LogKind.RATINGS:
        model.set_output(bias=mean, scale=std or 1.0)
    else:
        model.set_output(bias=math.log(mean / (1 - mean)), scale=1.0)
    return model


def _fit(
    model: RankingModel, train: Examples, validation: Examples, config: TrainingConfig, kind: LogKind
) -> dict[str, Any]:
    """Fit the weights; returns what metrics.json tells of it."""
    if isinstance(model, ClosedForm):
        tried = model.fit(train.rows, train.labels, validation.rows, validation.labels, kind=kind)
        return {"tried": tried, "chosen": min(tried, key=tried.__getitem__) if tried else None}
    loss = rating_loss if kind is LogKind.RATINGS else click_loss
    curve = fit_by_gradient(model, train, validation, config, loss=loss)
    best = min(curve[1:], key=lambda point: point.validation_loss)
    if best.validation_loss >= curve[0].validation_loss:
        logger.warning(
            "%s: no step beat the base rate on validation rows (%.5f against %.5f): the features say little here",
            config.model, best.validation_loss, curve[0].validation_loss,
        )  # fmt: skip
    return {"curve": [asdict(point) for point in curve], "best_step": best.step, "best_epoch": best.epoch}


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
    scores: NDArray[np.float32],
    labels: NDArray[np.float32],
    calibration: Calibration | None,
    info: ModelInfo,
) -> dict[str, Any]:
    """Figures of a split; validation rows chose the weights and the calibration."""
    y, score = labels.astype(np.float64), scores.astype(np.float64)
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
