"""Two processes of `torchrun` train as one does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from evergreen.contracts.training_set import TrainingSet
from evergreen.models.package import ModelPackage
from evergreen.training.trainer import TrainingConfig, train_model

pytestmark = pytest.mark.skipif(
    not dist.is_gloo_available(), reason="this torch has no gloo: processes cannot talk on a CPU"
)

COMMON = {"max_epochs": 1, "patience": 1000, "id_dropout": 0.3, "export_program": False, "device": "cpu"}
RUNS = {
    "deepfm": {"model": "deepfm", "hyperparameters": {"dropout": 0.0, "hidden": [16]}},
    "deepfm, thinned": {"model": "deepfm", "hyperparameters": {"dropout": 0.0, "hidden": [16]}, "negative_rate": 0.3},
    "logistic_regression": {"model": "logistic_regression"},
    "batches of odd size": {"model": "logistic_regression", "batch_size": 333, "min_steps_per_epoch": 1},
    "popularity": {"model": "popularity"},
}

SCRIPT = """
import json, sys
from pathlib import Path
from evergreen.contracts.training_set import TrainingSet
from evergreen.training.trainer import TrainingConfig, train_model

data, out, runs = sys.argv[1:]
for number, config in enumerate(json.loads(runs)):
    package = train_model(TrainingSet.load(Path(data)), Path(out) / str(number), config=TrainingConfig(**config))
    sys.stdout.write(package.digest + "\\n")  # in one piece, as both write to the same pipe
"""


def torchrun(*arguments: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def together(linear_set: TrainingSet, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelPackage]:
    """By run, the package that two processes wrote."""
    folder = tmp_path_factory.mktemp("torchrun")
    (folder / "worker.py").write_text(SCRIPT)
    configs = json.dumps([COMMON | run for run in RUNS.values()])
    output = torchrun(str(folder / "worker.py"), str(linear_set.path), str(folder / "out"), configs)
    packages = {name: ModelPackage.load(folder / "out" / str(number)) for number, name in enumerate(RUNS)}
    # Each process prints what it returns: all have the same package.
    assert sorted(output.split()) == sorted([package.digest for package in packages.values()] * 2)
    return packages


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_arrive_at_the_weights_and_the_curve_of_one(
    run: str, together: dict[str, ModelPackage], linear_set: TrainingSet, tmp_path: Path
) -> None:
    alone = train_model(linear_set, tmp_path / "alone", config=TrainingConfig(**COMMON, **RUNS[run]))
    weights = load_file(alone.path / ModelPackage.WEIGHTS)
    for name, value in load_file(together[run].path / ModelPackage.WEIGHTS).items():
        torch.testing.assert_close(value, weights[name], atol=1e-5, rtol=1e-5, msg=lambda text, name=name: name + text)
    curves = [package.metrics.get("curve", []) for package in (together[run], alone)]
    assert bool(curves[1]) == (run != "popularity")
    for point, expected in zip(*curves, strict=True):
        known = {name: value for name, value in expected.items() if value is not None}
        assert {name: point[name] for name in known} == pytest.approx(known, rel=1e-5)


def test_command_runs_under_torchrun_and_only_the_first_process_speaks(linear_set: TrainingSet, tmp_path: Path) -> None:
    evergreen = str(Path(sys.executable).parent / "evergreen")
    settings = ["--model", "logistic_regression", "--set", "max_epochs=1", "--set", "export_program=false"]
    output = torchrun("--no-python", evergreen, "train", str(linear_set.path), "--out", str(tmp_path / "p"), *settings)
    package = ModelPackage.load(tmp_path / "p")
    assert output.count(package.version) == 1
    assert output.count(f"package: {tmp_path / 'p'}") == 1
