"""How a model is trained."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from evergreen.contracts.artifact import JsonModel
from evergreen.models.encoding import EncoderConfig


class TrainingConfig(JsonModel):
    """One training run. Equal configurations on equal rows give equal bytes on the same machine."""

    model: str = "deepfm"
    """A name of `evergreen.models.registry.MODEL_NAMES`."""
    seed: int = Field(default=0, ge=0)
    """Of initial weights, batch order and dropout."""
    hyperparameters: dict[str, Any] = Field(default_factory=dict)
    """Of the model; its own defaults where left out."""
    encoder: EncoderConfig = EncoderConfig()

    negative_rate: float = Field(default=1.0, gt=0, le=1)
    """Share of the training rows without a click that is kept. Scores are corrected exactly afterwards."""
    positive_weight: float = Field(default=1.0, gt=0)
    """Weight of the rows with a click in the loss. Scores are corrected exactly afterwards."""
    click_loss: Literal["cross_entropy", "focal"] = "cross_entropy"
    focal_gamma: float = Field(default=2.0, ge=0)
    """Of the focal loss (Lin et al. 2017): how little rows count that are predicted well."""
    calibration: Literal["platt", "isotonic"] = "platt"
    """Fitted on validation rows. Isotonic regression wants some thousand clicks there."""
    position: Literal["effect", "inverse_propensity", "ignore"] = "effect"
    """What to make of the position that an impression was shown at. `effect`: a term of the position is learned beside
    the model and held constant when serving; `inverse_propensity`: rows weigh 1 / the probability that they were
    looked at."""
    second_task: Literal["rating", "dwell_seconds"] = "dwell_seconds"
    """The outcome that models with two tasks learn beside the click."""
    second_task_weight: float = Field(default=0.1, ge=0)

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
    table_optimizer: Literal["row_wise_adagrad", "adam"] = "row_wise_adagrad"
    """Of the table of embeddings. Adam moves, and decays, every row at every step: for small tables."""
    embedding_l2: float = Field(default=0.0, ge=0)
    """Weight decay of the table: of the rows that a batch touches, or with Adam of all."""
    monitor: Literal["loss", "auc"] = "loss"
    """What early stopping looks at on validation rows. A loss may rise from overconfidence, which calibration mends,
    while the order still gets better."""
    plateau_factor: float = Field(default=1.0, gt=0, le=1)
    """All learning rates are multiplied by it when an evaluation brings no improvement; 1: never."""
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
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: a GPU where there is one."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the network's products. `auto`: bfloat16 on a GPU, float32 on a CPU. Weights and losses are float32."""
    num_threads: int = Field(default=1, ge=1)
    """Of torch; more than one may change the last bits of the weights."""
    export_program: bool = True
    """Whether the package also holds the model as a torch.export program (2 to 3 s of a core)."""
