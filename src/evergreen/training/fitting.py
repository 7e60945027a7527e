"""The training loop: mini-batches over encoded rows, early stopping on validation, the best weights kept.

Every draw (the order of rows, negatives, dropped ids, dropout) is a function of the seed and of the epoch or step, so a
run that was killed goes on from its checkpoint to the same weights, and processes that share a batch agree.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evergreen.contracts.errors import TrainingError
from evergreen.contracts.mapping import LogKind
from evergreen.models.base import RankingModel
from evergreen.models.inputs import InputSpec, ModelInputs
from evergreen.models.position import PositionEffect
from evergreen.training.checkpoint import Checkpoint, CurvePoint, Progress
from evergreen.training.config import TrainingConfig
from evergreen.training.distributed import Workers
from evergreen.training.imbalance import sample_negatives
from evergreen.training.optimizers import Optimizers
from evergreen.training.task import Examples, TrainingTask

logger = logging.getLogger(__name__)

_ID_FIELDS = ("user_id", "item_id")
_MIN_BATCH = 16
_DIVERGED = 10.0
"""A validation loss this many times that of the start will not come back."""

# What a draw is for; makes the draws of one epoch or step independent of each other.
_ORDER, _NEGATIVES, _IDS, _DROPOUT = range(4)


@dataclass(frozen=True)
class Fit:
    """What training leaves behind, beside the weights."""

    curve: tuple[CurvePoint, ...]
    """The first point, step 0, is the model as it was given."""
    best: CurvePoint
    """The point whose weights were kept."""
    position: PositionEffect | None


def fit_by_gradient(
    model: RankingModel,
    train: Examples,
    validation: Examples,
    config: TrainingConfig,
    *,
    kind: LogKind,
    workers: Workers | None = None,
    checkpoint: Checkpoint | None = None,
    keep_start: bool = False,
) -> Fit:
    """Train until validation stops getting better; leaves the best weights in the model, on the CPU.

    Args:
        model: with its output set to the base rate, or warm.
        train: rows to learn from.
        validation: rows that decide when to stop.
        config: how.
        kind: of the log; decides the loss.
        workers: processes that train together; each calls this with the same arguments.
        checkpoint: where to go on from, and where to save; None: a killed run starts over.
        keep_start: whether the weights as given are kept when no step beats them. A warm start is a model; a base rate
            is not.

    Raises:
        TrainingError: the loss is not finite, or grows without end.
        ArtifactError: the checkpoint is of another run.
    """
    run = _Run(model, train, validation, config, kind, workers or Workers(), checkpoint, keep_start)
    try:
        return run.fit()
    finally:
        model.cpu()


class _Run:
    """One call of `fit_by_gradient`."""

    def __init__(
        self,
        model: RankingModel,
        train: Examples,
        validation: Examples,
        config: TrainingConfig,
        kind: LogKind,
        workers: Workers,
        checkpoint: Checkpoint | None,
        keep_start: bool,
    ) -> None:
        self._config, self._workers, self._checkpoint = config, workers, checkpoint
        self._first_candidate = 0 if keep_start else 1
        self._train = train
        self._device = torch_device(config)
        self._task = TrainingTask(model, config, kind, train).to(self._device)
        self._shift_bias(-self._task.correction)
        self._optimizers = Optimizers(self._task, config)
        self._optimizers.drop_gradients()
        self._id_dropout = 0.0 if self._task.own_loss is not None else config.id_dropout
        thinned = kind is not LogKind.RATINGS and config.negative_rate < 1
        self._num_rows = len(self._negatives(0)) if thinned else len(train)
        self._thinned = thinned
        self._batch_size = min(
            config.batch_size, max(_MIN_BATCH, math.ceil(self._num_rows / config.min_steps_per_epoch))
        )
        self._steps_per_epoch = math.ceil(self._num_rows / self._batch_size)
        self._interval = max(1, self._steps_per_epoch // config.evaluations_per_epoch)
        watched = thin(validation, config.max_validation_rows)
        self._ranked = watched if config.monitor == "auc" and kind is not LogKind.RATINGS else None
        self._watched = watched.take(np.arange(len(watched))[workers.share(len(watched))])
        self._autocast = torch.autocast(
            self._device.type,
            dtype=torch.bfloat16,
            enabled=config.precision == "bfloat16" or (config.precision == "auto" and self._device.type == "cuda"),
        )
        self._saved = time.perf_counter()

    def fit(self) -> Fit:
        """Train from the start or from the checkpoint."""
        state = self._checkpoint.load() if self._checkpoint is not None else None
        best: dict[str, Tensor] = {}
        if state is None:
            curve = [self._point(0, train_loss=None)]
            done, waited, factor = 0, 0, 1.0
            if self._first_candidate == 0:
                self._keep_weights(best)
        else:
            progress, tensors = state
            self._task.load_state_dict(_group(tensors, "weights"))
            self._optimizers.restore(_group(tensors, "optimizer"))
            best = {name: tensor.to(self._device) for name, tensor in _group(tensors, "best").items()}
            curve = list(progress.curve)
            done, waited, factor = progress.step, progress.waited, progress.learning_rate_factor
            logger.info("%s: going on from step %d of the checkpoint", self._config.model, done)
        self._optimizers.scale_learning_rates(factor)
        best_value = min(map(_watched_value, curve[self._first_candidate :]), default=math.inf)
        summed, started, first = torch.zeros((), device=self._device), time.perf_counter(), done
        for step, batch in self._batches(done):
            if waited >= self._config.patience:
                break
            summed += self._step(step, batch)
            if step % self._interval:
                continue
            train_loss = self._workers.sum_values(float(summed), device=self._device)[0] / self._interval
            summed.zero_()
            point = self._point(step, train_loss=train_loss)
            curve.append(point)
            value = _watched_value(point)
            self._check(point, curve[0])
            rows = (step - first) * self._num_rows / self._steps_per_epoch
            rate = rows / (time.perf_counter() - started)
            logger.info(
                "%s epoch %.2f: loss %.5f, validation %.5f, %s samples/s",
                self._config.model, point.epoch, train_loss, point.validation_loss, f"{rate:,.0f}",
            )  # fmt: skip
            if value < best_value - self._config.min_improvement * abs(best_value):
                waited = 0
            else:
                waited += 1
                factor *= self._config.plateau_factor
                self._optimizers.scale_learning_rates(factor)
            if value < best_value:
                best_value = value
                self._keep_weights(best)
            self._save(
                Progress(run="", step=step, learning_rate_factor=factor, waited=waited, curve=tuple(curve)), best
            )
        self._task.load_state_dict(best)
        self._shift_bias(self._task.correction)
        best_point = min(curve[self._first_candidate :], key=_watched_value)
        return Fit(tuple(curve), best_point, self._task.position)

    def _step(self, step: int, batch: NDArray[np.int64]) -> Tensor:
        """Take one step; returns this process's part of the batch's mean loss."""
        config, workers = self._config, self._workers
        dropped = self._dropped_ids(step, len(batch))
        share = workers.share(len(batch))
        part: float = (share.stop - share.start) / len(batch)
        if part == 0:  # a batch of fewer rows than processes: one row without weight, as a mean of no rows is nan
            share = slice(0, 1)
        rows = batch[share]
        inputs = self._train.rows.inputs(rows)
        if dropped is not None:
            _drop_ids(self._train.rows.spec, inputs, dropped[share], _rng(config.seed, _IDS, step, workers.rank + 1))
        self._task.train()
        torch.manual_seed(_seed(config.seed, _DROPOUT, step, workers.rank))
        with self._autocast:
            value, minimised = self._task.loss(inputs.to(self._device), self._train.targets(rows, self._device))
        (minimised * part).backward()  # type: ignore[no-untyped-call]
        workers.sum_gradients(self._optimizers.parameters)
        self._optimizers.step()
        return value.detach() * part

    def _point(self, step: int, *, train_loss: float | None) -> CurvePoint:
        ranked_auc = None
        if self._ranked is not None:
            # Every process measures it; they have to agree on when to stop, to the last bit.
            mean = self._task.auc(self._ranked) / self._workers.count
            (ranked_auc,) = self._workers.sum_values(mean, device=self._device)
        return CurvePoint(
            step=step,
            epoch=step / self._steps_per_epoch,
            train_loss=train_loss,
            validation_loss=self._validate(),
            validation_auc=ranked_auc,
        )

    def _validate(self) -> float:
        """Mean loss of the validation rows that are watched."""
        total, count = self._workers.sum_values(
            *self._task.evaluate(self._watched, batch_size=self._batch_size), device=self._device
        )
        return total / count if count else math.nan

    def _check(self, point: CurvePoint, start: CurvePoint) -> None:
        config = self._config
        finite = math.isfinite(point.train_loss or 0.0) and math.isfinite(point.validation_loss)
        if finite and abs(point.validation_loss) <= _DIVERGED * max(abs(start.validation_loss), 1e-6):
            return
        raise TrainingError(
            f"model {config.model} diverges: the loss is {point.train_loss} in training and {point.validation_loss} on "
            f"validation at step {point.step}, from {start.validation_loss:.5g}: lower learning_rate "
            f"({config.learning_rate}) and embedding_learning_rate ({config.embedding_learning_rate}), or look for "
            "extreme values in the labels"
        )

    def _batches(self, done: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Steps after `done`, from 1, and the rows of each."""
        for epoch in range(done // self._steps_per_epoch, self._config.max_epochs):
            rows = self._negatives(epoch) if self._thinned else np.arange(self._num_rows)
            rows = _rng(self._config.seed, _ORDER, epoch).permutation(rows)
            first = epoch * self._steps_per_epoch
            # Alike to within one row: a last batch of what is left over may be one row, which has no batch statistics.
            cuts = np.arange(self._steps_per_epoch + 1) * self._num_rows // self._steps_per_epoch
            for place in range(max(0, done - first), self._steps_per_epoch):
                yield first + place + 1, rows[cuts[place] : cuts[place + 1]]

    def _negatives(self, epoch: int) -> NDArray[np.int64]:
        """Rows of an epoch when negatives are thinned: others in each."""
        seed = _seed(self._config.seed, _NEGATIVES, epoch)
        return sample_negatives(self._train.labels, self._config.negative_rate, seed=seed)

    def _dropped_ids(self, step: int, num_rows: int) -> NDArray[np.bool_] | None:
        """(num_rows, C) which ids of a batch are read as unseen."""
        fields = self._train.rows.spec.categorical
        is_id = np.array([field.name in _ID_FIELDS for field in fields], dtype=np.bool_)
        if self._id_dropout == 0 or not is_id.any():
            return None
        dropped = np.zeros((num_rows, len(fields)), dtype=np.bool_)
        shape = (num_rows, int(is_id.sum()))
        dropped[:, is_id] = _rng(self._config.seed, _IDS, step).random(shape, dtype=np.float32) < self._id_dropout
        return dropped

    def _shift_bias(self, shift: float) -> None:
        """Between log-odds of all rows and of those that training sees, where negatives are fewer or weigh less."""
        with torch.no_grad():
            self._task.model.bias.add_(shift)

    def _keep_weights(self, best: dict[str, Tensor]) -> None:
        """Copy the weights of now; over the ones kept before, because new memory costs more than the copy."""
        for name, value in self._task.state_dict().items():
            if name in best:
                best[name].copy_(value)
            else:
                best[name] = value.detach().clone()

    def _save(self, progress: Progress, best: dict[str, Tensor]) -> None:
        if self._checkpoint is None or not self._workers.is_first:
            return
        if time.perf_counter() - self._saved < self._checkpoint.interval_seconds:
            return
        tensors = {f"weights/{name}": value for name, value in self._task.state_dict().items()}
        tensors |= {f"best/{name}": value for name, value in best.items()}
        tensors |= {f"optimizer/{name}": value for name, value in self._optimizers.state().items()}
        self._checkpoint.save(progress.model_copy(update={"run": self._checkpoint.run}), tensors)
        self._saved = time.perf_counter()


def _watched_value(point: CurvePoint) -> float:
    """What early stopping brings down."""
    return point.validation_loss if point.validation_auc is None else -point.validation_auc


def torch_device(config: TrainingConfig) -> torch.device:
    """The device of a configuration.

    Raises:
        TrainingError: a GPU is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise TrainingError('device="cuda": torch finds no GPU; use device="auto" or install torch for CUDA')
    return torch.device("cuda" if available and config.device != "cpu" else "cpu")


def thin(examples: Examples, max_rows: int) -> Examples:
    """Every n-th row, such that at most `max_rows` are left."""
    step = math.ceil(len(examples) / max_rows)
    return examples if step <= 1 else examples.take(np.arange(0, len(examples), step))


def _drop_ids(spec: InputSpec, inputs: ModelInputs, dropped: NDArray[np.bool_], rng: np.random.Generator) -> None:
    """Read ids as unseen, in place: any of the rows that unseen values share."""
    for place, field in enumerate(spec.categorical):
        rows = torch.from_numpy(np.flatnonzero(dropped[:, place]))
        if len(rows) == 0:
            continue
        columns = [place]
        if place in spec.second_rows:
            columns.append(len(spec.categorical) + spec.second_rows.index(place))
        for column in columns:
            unseen = field.unseen + rng.integers(field.num_shared, size=len(rows))
            inputs.categorical[rows, column] = torch.from_numpy(unseen)


def _seed(*parts: int) -> int:
    """A seed that is independent for each combination of non-negative numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _rng(*parts: int) -> np.random.Generator:
    return np.random.default_rng(parts)


def _group(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Tensors whose name begins with the prefix, without it."""
    start = f"{prefix}/"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
