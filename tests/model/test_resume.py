"""A run that is killed goes on from its checkpoint and writes the package that it would have written."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.training_set import TrainingSet
from evergreen.models.package import ModelPackage
from evergreen.training.trainer import TrainingConfig, train_model

CONFIG = TrainingConfig(model="deepfm", max_epochs=8, patience=1000, negative_rate=0.5, export_program=False)

RUN = """
import sys
from pathlib import Path
from evergreen.contracts.training_set import TrainingSet
from evergreen.training.trainer import TrainingConfig, train_model

data, out, config, checkpoint = sys.argv[1:]
train_model(TrainingSet.load(Path(data)), Path(out), config=TrainingConfig.model_validate_json(config),
            checkpoint=Path(checkpoint), checkpoint_seconds=0.0)
"""


def start(training_set: TrainingSet, out: Path, checkpoint: Path) -> subprocess.Popen[bytes]:
    arguments = [str(training_set.path), str(out), CONFIG.model_dump_json(), str(checkpoint)]
    return subprocess.Popen([sys.executable, "-c", RUN, *arguments], stderr=subprocess.PIPE)


def wait_for(checkpoint: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not checkpoint.exists():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture(scope="module")
def uninterrupted(linear_set: TrainingSet, tmp_path_factory: pytest.TempPathFactory) -> ModelPackage:
    return train_model(linear_set, tmp_path_factory.mktemp("whole") / "package", config=CONFIG)


def test_killed_run_writes_the_same_package_when_started_again(
    linear_set: TrainingSet, uninterrupted: ModelPackage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, checkpoint = tmp_path / "package", tmp_path / "run.ckpt"
    process = start(linear_set, out, checkpoint)
    wait_for(checkpoint, process)
    process.kill()
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()
    assert not out.exists()

    with caplog.at_level("INFO", logger="evergreen"):
        package = train_model(linear_set, out, config=CONFIG, checkpoint=checkpoint)
    assert "going on from step" in caplog.text
    assert package.digest == uninterrupted.digest
    assert not checkpoint.exists()


def test_uninterrupted_run_with_a_checkpoint_writes_the_same_package_and_tidies_up(
    linear_set: TrainingSet, uninterrupted: ModelPackage, tmp_path: Path
) -> None:
    package = train_model(
        linear_set, tmp_path / "package", config=CONFIG, checkpoint=tmp_path / "run.ckpt", checkpoint_seconds=0.0
    )
    assert package.digest == uninterrupted.digest
    assert [path.name for path in tmp_path.iterdir()] == ["package"]


@pytest.fixture(scope="module")
def left_behind(linear_set: TrainingSet, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The checkpoint of a run that was killed."""
    folder = tmp_path_factory.mktemp("killed")
    process = start(linear_set, folder / "package", folder / "run.ckpt")
    wait_for(folder / "run.ckpt", process)
    process.kill()
    process.communicate()
    return (folder / "run.ckpt").read_bytes()


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"learning_rate": 0.01}, {"hyperparameters": {"hidden": [8]}}], ids=str
)
def test_checkpoint_of_other_settings_is_refused_and_kept(
    change: dict[str, object], left_behind: bytes, linear_set: TrainingSet, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "run.ckpt"
    checkpoint.write_bytes(left_behind)
    with pytest.raises(ArtifactError, match=r"run\.ckpt: this checkpoint is of another run"):
        train_model(linear_set, tmp_path / "package", config=CONFIG.model_copy(update=change), checkpoint=checkpoint)
    assert checkpoint.read_bytes() == left_behind
    assert not (tmp_path / "package").exists()


def test_checkpoint_of_other_rows_is_refused(left_behind: bytes, rating_set: TrainingSet, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.ckpt"
    checkpoint.write_bytes(left_behind)
    with pytest.raises(ArtifactError, match="of another run"):
        train_model(rating_set, tmp_path / "package", config=CONFIG, checkpoint=checkpoint)


def test_damaged_checkpoint_is_refused_with_the_way_out(
    left_behind: bytes, linear_set: TrainingSet, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "run.ckpt"
    checkpoint.write_bytes(left_behind[: len(left_behind) // 2])
    with pytest.raises(ArtifactError, match=r"run\.ckpt: not a checkpoint .*remove it to train from the start"):
        train_model(linear_set, tmp_path / "package", config=CONFIG, checkpoint=checkpoint)
