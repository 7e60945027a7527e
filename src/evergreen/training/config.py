"""How a model is trained."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from evergreen.contracts.artifact import JsonModel
from evergreen.models.encoding import EncoderConfig


class TrainingConfig(JsonModel):
    """One training run. Equal configurations on equal rows give equal bytes on the same machine."""

    model: str = "deepfm"
    """A name of `evergreen.models.registry.MODEL_NAMES`."""
    seed: int = 0
    """Of initial weights, batch order and dropout."""
    hyperparameters: dict[str, Any] = Field(default_factory=dict)
    """Of the model; its own defaults where left out."""
    encoder: EncoderConfig = EncoderConfig()

    batch_size: int = Field(default=2048, ge=1)
    """Upper bound; a small training set is cut into at least `min_steps_per_epoch` batches."""
    min_steps_per_epoch: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    """Adam's, for all but tables."""
    embedding_learning_rate: float = Field(default=0.1, gt=0)
    """Adagrad's, for the table of embeddings: Adam moves a row seen once as far as one seen a thousand times."""
    bin_learning_rate: float = Field(default=0.05, gt=0)
    """Adagrad's, for the weights of the bins of numbers."""
    initial_accumulator: float = Field(default=1e-5, ge=0)
    """Adagrad's. At 0 the first step of every row is a full one, whatever the gradient; with rare clicks, noise."""
    id_dropout: float = Field(default=0.3, ge=0, lt=1)
    """Chance that a user or item id is read as unseen: a model leans on more than ids, and unseen rows learn."""
    max_epochs: int = Field(default=8, ge=1)
    evaluations_per_epoch: int = Field(default=4, ge=1)
    """Click models overfit within an epoch, so validation does not wait for its end."""
    patience: int = Field(default=6, ge=1)
    """Evaluations in a row without an improvement after which training stops."""
    min_improvement: float = Field(default=5e-4, ge=0)
    """Share of the loss that counts as an improvement. The best weights are kept, however little they are better."""
    max_validation_rows: int = Field(default=200_000, ge=1)
    """Rows that early stopping looks at, spread evenly over the split."""
    num_threads: int = Field(default=1, ge=1)
    """Of torch; more than one may change the last bits of the weights."""
    export_program: bool = True
    """Whether the package also holds the model as a torch.export program (2 to 3 s of a core)."""
