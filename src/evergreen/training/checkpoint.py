"""What a killed training run goes on from: one safetensors file, replaced as a whole, with its progress in the header.

Nothing random is kept: every draw of the loop is a function of the seed and the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from evergreen.contracts.artifact import JsonModel
from evergreen.contracts.errors import ArtifactError


class CurvePoint(JsonModel):
    """One evaluation: mean training loss since the one before, and validation loss."""

    step: int
    epoch: float
    train_loss: float | None
    """None before the first step."""
    validation_loss: float
    validation_auc: float | None = None
    """Where early stopping looks at it."""


class Progress(JsonModel):
    """How far a run has come; at an evaluation, so that no sum is half done."""

    run: str
    """Digest of what is trained, how and on what: a checkpoint of another run is refused."""
    step: int
    learning_rate_factor: float
    waited: int
    """Evaluations since the last improvement."""
    curve: tuple[CurvePoint, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A file that holds the last state of a run, or none yet."""

    path: Path
    run: str
    interval_seconds: float = 30.0
    """At least as long between two saves: a large table takes seconds to write."""

    def save(self, progress: Progress, tensors: Mapping[str, Tensor]) -> None:
        """Replace the state; a kill at any moment leaves either the old one or the new one."""
        cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        scratch = self.path.with_name(f".{self.path.name}.partial")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(save(cpu, metadata={"progress": progress.model_dump_json()}))
        scratch.replace(self.path)

    def load(self) -> tuple[Progress, dict[str, Tensor]] | None:
        """The saved state, or None when there is none.

        Raises:
            ArtifactError: it belongs to another run, or is no checkpoint.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                progress = Progress.model_validate_json(file.metadata()["progress"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        except (SafetensorError, OSError) as error:
            raise ArtifactError(
                f"{self.path}: not a checkpoint ({error}): remove it to train from the start"
            ) from error
        except (KeyError, TypeError, ValidationError) as error:
            raise ArtifactError(
                f"{self.path}: not a checkpoint (no progress that this Evergreen can read): "
                "remove it to train from the start"
            ) from error
        if progress.run != self.run:
            raise ArtifactError(
                f"{self.path}: this checkpoint is of another run (other rows, model or settings): name another file, "
                "or remove it to train from the start"
            )
        return progress, tensors

    def remove(self) -> None:
        """The run is over: its checkpoint has no more use."""
        self.path.unlink(missing_ok=True)
