"""The model package: a directory with all that a server needs to score rows, and nothing that can run code on loading.

    package/
      manifest.json        sha256 of each file below; its digest is the package's
      model.json           what was trained, on what, and how (`ModelInfo`)
      encoder.json         from features to inputs
      weights.safetensors  of the network, which is built from the registry
      calibration.json     from score to probability (clicks and interactions)
      position.json        what positions add to scores, where the log has them
      outcome.json         scale of the second outcome, for models with two tasks
      metrics.json         of training and validation, with the learning curve
      program.pt2          the network as a torch.export program, for runtimes without Evergreen (optional)
      MODEL_CARD.md        for people

Loading reads JSON and safetensors. It never opens program.pt2: torch.export.load unpickles what an archive asks it to
(torch 2.15, `weights_only=False` in torch/export/pt2_archive/_package.py), and the network runs as fast (see
`models/export.py`).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import AwareDatetime
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from evergreen.contracts.artifact import JsonModel, atomic_directory, canonical_json, sha256_file
from evergreen.contracts.errors import ArtifactError, TrainingError
from evergreen.contracts.mapping import LogKind
from evergreen.contracts.training_set import Feature
from evergreen.models.base import RankingModel, predict_second_outcome, score_rows
from evergreen.models.calibration import Calibration
from evergreen.models.encoding import Encoder
from evergreen.models.inputs import EncodedRows
from evergreen.models.multi_task import OutcomeScale
from evergreen.models.position import PositionEffects
from evergreen.models.registry import build_model, model_config

FORMAT_VERSION = 2


class ModelInfo(JsonModel):
    """What a model says of itself."""

    format_version: int = FORMAT_VERSION
    name: str
    """Of the registry."""
    kind: LogKind
    mapping_name: str
    snapshot_id: str
    feature_service: str
    as_of: AwareDatetime
    """The moment up to which the training set knows the world."""
    features: tuple[Feature, ...]
    """Columns that a table to score must have."""
    hyperparameters: dict[str, Any]
    """Of the model, defaults filled in."""
    training: dict[str, Any]
    """The training configuration."""
    train_rows: int
    label_mean: float
    """Of the training rows."""
    num_parameters: int
    rating_minimum: float | None = None
    rating_maximum: float | None = None


class PackageManifest(JsonModel):
    """sha256 of each file of the package, by name."""

    files: dict[str, str]

    @property
    def digest(self) -> str:
        """sha256 of the canonical manifest: names the package."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json"))).hexdigest()


@dataclass(frozen=True)
class ModelPackage:
    """A model package, loaded. Safe to share between threads: scoring changes nothing."""

    path: Path
    info: ModelInfo
    digest: str
    encoder: Encoder
    model: RankingModel
    calibration: Calibration | None
    """None for ratings."""
    position: PositionEffects | None
    """None where the model learned nothing of positions."""
    outcome: OutcomeScale | None
    """None for a model with one task."""
    metrics: dict[str, Any]

    MANIFEST = "manifest.json"
    MODEL = "model.json"
    ENCODER = "encoder.json"
    WEIGHTS = "weights.safetensors"
    CALIBRATION = "calibration.json"
    POSITION = "position.json"
    OUTCOME = "outcome.json"
    METRICS = "metrics.json"
    PROGRAM = "program.pt2"
    CARD = "MODEL_CARD.md"

    @property
    def version(self) -> str:
        """Name and digest, e.g. "deepfm-1a2b3c4d5e6f"."""
        return f"{self.info.name}-{self.digest[:12]}"

    @classmethod
    def load(cls, path: Path, *, digest: str | None = None) -> ModelPackage:
        """Open a package, after comparing the digest of every file.

        Args:
            path: the package's directory.
            digest: the package's digest as known from elsewhere (a release), if it is to be held to that.

        Raises:
            ArtifactError: not a package, another format, a file is missing, altered or does not fit the others.
        """
        path = Path(path)
        manifest = PackageManifest.read(path / cls.MANIFEST)
        if digest is not None and manifest.digest != digest:
            raise ArtifactError(f"{path}: its digest is {manifest.digest}, expected {digest}: this is another package")
        for name, expected in sorted(manifest.files.items()):
            if not (path / name).is_file():
                raise ArtifactError(f"{path}: {name} is missing: copy the whole package, or train again")
            if sha256_file(path / name) != expected:
                raise ArtifactError(f"{path}: {name} was altered after the package was made: train again")
        if absent := {cls.MODEL, cls.ENCODER, cls.WEIGHTS, cls.METRICS} - manifest.files.keys():
            raise ArtifactError(f"{path}: manifest.json does not list {', '.join(sorted(absent))}: not a model package")
        info = ModelInfo.read(path / cls.MODEL)
        if info.format_version != FORMAT_VERSION:
            raise ArtifactError(
                f"{path}: package format {info.format_version}, this Evergreen reads {FORMAT_VERSION}: train again"
            )
        encoder = Encoder.read(path / cls.ENCODER)
        calibrated = info.kind is not LogKind.RATINGS
        return cls(
            path=path,
            info=info,
            digest=manifest.digest,
            encoder=encoder,
            model=_load_network(path / cls.WEIGHTS, info, encoder),
            calibration=Calibration.read(path / cls.CALIBRATION) if calibrated else None,
            position=PositionEffects.read(path / cls.POSITION) if cls.POSITION in manifest.files else None,
            outcome=OutcomeScale.read(path / cls.OUTCOME) if cls.OUTCOME in manifest.files else None,
            metrics=json.loads((path / cls.METRICS).read_bytes()),
        )

    def scores(self, table: pa.Table) -> NDArray[np.float32]:
        """(num_rows,) logits, or ratings before clipping.

        Args:
            table: has the columns of `info.features`, others are ignored; nulls and unseen values are allowed anywhere.

        Raises:
            ArtifactError: a column is absent or has a type that does not fit; names it.
        """
        return self.scores_of_encoded(self.encoder.transform(table))

    def scores_of_encoded(self, rows: EncodedRows) -> NDArray[np.float32]:
        """(num_rows,) like `scores`, of rows that `encoder` made."""
        return score_rows(self.model, rows)

    def predict(self, table: pa.Table) -> NDArray[np.float64]:
        """(num_rows,) calibrated probability in [0, 1], or rating within its range; `table` as in `scores`."""
        return self.calibrate(self.scores(table))

    def predict_encoded(self, rows: EncodedRows, positions: NDArray[np.integer] | None = None) -> NDArray[np.float64]:
        """(num_rows,) like `predict`, of rows that `encoder` made.

        Args:
            rows: encoded.
            positions: (num_rows,) where each row was shown, 0 where unknown, to compare predictions with logged
                clicks. None: the average position, which is what serving predicts for.
        """
        scores = self.scores_of_encoded(rows)
        if positions is not None and self.position is not None:
            return self.calibrate(scores + self.position.at(positions))
        return self.calibrate(scores)

    def predict_outcome(self, rows: EncodedRows) -> NDArray[np.float64]:
        """(num_rows,) second outcome, in the unit of the log; only for models with two tasks (see `outcome`)."""
        if self.outcome is None:
            raise ArtifactError(f"{self.path}: model {self.info.name} has learned no second outcome")
        return self.outcome.restore(predict_second_outcome(self.model, rows))

    def calibrate(self, scores: NDArray[np.floating]) -> NDArray[np.float64]:
        """(n,) what scores predict: a probability in [0, 1], or a rating within its range."""
        if self.calibration is not None:
            return self.calibration.apply(scores)
        return np.clip(scores.astype(np.float64), self.info.rating_minimum, self.info.rating_maximum)


def write_package(
    out: Path,
    *,
    info: ModelInfo,
    encoder: Encoder,
    model: RankingModel,
    calibration: Calibration | None,
    position: PositionEffects | None,
    outcome: OutcomeScale | None,
    metrics: dict[str, Any],
    card: str,
    export_program: bool,
) -> ModelPackage:
    """Write a package, whole or not at all, and load it again.

    Args:
        out: directory to make.
        info: goes to model.json.
        encoder: fitted.
        model: trained.
        calibration: for clicks and interactions.
        position: effects of positions, if learned.
        outcome: scale of the second outcome, if learned.
        metrics: goes to metrics.json.
        card: Markdown of the model card.
        export_program: whether to add program.pt2.
    """
    with atomic_directory(out) as scratch:
        info.write(scratch / ModelPackage.MODEL)
        encoder.write(scratch / ModelPackage.ENCODER)
        weights = {name: value.contiguous() for name, value in model.state_dict().items()}
        (scratch / ModelPackage.WEIGHTS).write_bytes(save(weights))  # save_file makes it readable by its owner alone
        parts = {
            ModelPackage.CALIBRATION: calibration,
            ModelPackage.POSITION: position,
            ModelPackage.OUTCOME: outcome,
        }
        for name, part in parts.items():
            if part is not None:
                part.write(scratch / name)
        text = json.dumps(metrics, indent=2, sort_keys=True, allow_nan=False)
        (scratch / ModelPackage.METRICS).write_text(text + "\n")
        (scratch / ModelPackage.CARD).write_text(card)
        if export_program:
            from evergreen.models.export import export_program as write_program  # seconds to import, training only

            write_program(model, scratch / ModelPackage.PROGRAM)
        files = {file.name: sha256_file(file) for file in sorted(scratch.iterdir())}
        PackageManifest(files=files).write(scratch / ModelPackage.MANIFEST)
    return ModelPackage.load(out)


def _load_network(path: Path, info: ModelInfo, encoder: Encoder) -> RankingModel:
    try:
        model = build_model(info.name, model_config(info.name, info.hyperparameters), encoder.spec)
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise ArtifactError(f"{path}: the weights do not fit model {info.name} with this encoder: {error}") from error
    except TrainingError as error:
        raise ArtifactError(f"{path.parent}: made by another version of Evergreen? {error}") from error
    return model.eval()
