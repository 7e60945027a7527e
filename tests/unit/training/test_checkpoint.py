"""A checkpoint gives back what was saved, is replaced whole, and says why it is not taken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from evergreen.contracts.errors import ArtifactError
from evergreen.training.checkpoint import Checkpoint, CurvePoint, Progress

TENSORS = {"weights/a": torch.arange(6.0).reshape(2, 3), "optimizer/0/0/step": torch.tensor(7.0)}


def progress(run: str = "r", step: int = 4) -> Progress:
    curve = (
        CurvePoint(step=0, epoch=0.0, train_loss=None, validation_loss=0.1 + 0.2),
        CurvePoint(step=step, epoch=1 / 3, train_loss=0.7, validation_loss=0.6),
    )
    return Progress(run=run, step=step, learning_rate_factor=0.5, waited=1, curve=curve)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return Checkpoint(tmp_path / "new" / "folder" / "run.ckpt", "r")


def test_what_was_saved_comes_back_exactly(checkpoint: Checkpoint) -> None:
    checkpoint.save(progress(), TENSORS)
    loaded = checkpoint.load()
    assert loaded is not None
    assert loaded[0] == progress()
    assert loaded[1].keys() == TENSORS.keys()
    assert all(torch.equal(loaded[1][name], tensor) for name, tensor in TENSORS.items())


def test_tensors_that_are_views_are_saved_too(checkpoint: Checkpoint) -> None:
    checkpoint.save(progress(), {"weights/a": TENSORS["weights/a"].t()})
    loaded = checkpoint.load()
    assert loaded is not None
    assert torch.equal(loaded[1]["weights/a"], TENSORS["weights/a"].t())


def test_without_a_file_there_is_nothing_to_go_on_from(checkpoint: Checkpoint) -> None:
    assert checkpoint.load() is None
    checkpoint.remove()  # and nothing to remove


def test_a_later_state_replaces_the_earlier_and_leaves_no_other_file(checkpoint: Checkpoint) -> None:
    checkpoint.save(progress(step=4), TENSORS)
    checkpoint.save(progress(step=8), TENSORS)
    loaded = checkpoint.load()
    assert loaded is not None
    assert loaded[0].step == 8
    assert list(checkpoint.path.parent.iterdir()) == [checkpoint.path]
    checkpoint.remove()
    assert checkpoint.load() is None


def test_a_kill_while_saving_leaves_the_earlier_state(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(progress(step=4), TENSORS)

    def killed(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(progress(step=8), TENSORS)
    loaded = checkpoint.load()
    assert loaded is not None
    assert loaded[0].step == 4


def test_checkpoint_of_another_run_is_refused_and_kept(checkpoint: Checkpoint) -> None:
    checkpoint.save(progress(run="another"), TENSORS)
    with pytest.raises(ArtifactError, match=r"run\.ckpt: this checkpoint is of another run.*name another file"):
        checkpoint.load()
    assert checkpoint.path.exists()


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "no progress", "other progress", "folder"])
def test_a_damaged_file_is_refused_with_the_way_out(damage: str, checkpoint: Checkpoint) -> None:
    checkpoint.save(progress(), TENSORS)
    path, data = checkpoint.path, checkpoint.path.read_bytes()
    if damage in ("empty", "cut", "text"):
        path.write_bytes({"empty": b"", "cut": data[:-5], "text": b"my thesis, chapter 1"}[damage])
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        save_file(TENSORS, path, metadata=None if damage == "no progress" else {"progress": '{"run": "r"}'})
    with pytest.raises(ArtifactError, match=r"run\.ckpt: not a checkpoint .*remove it to train from the start"):
        checkpoint.load()
