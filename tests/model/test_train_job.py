"""Training handed to Kubeflow Trainer: what a TrainJob asks for is run, and its end decides what the step does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml
from kubernetes import client  # type: ignore[import-untyped]

from evergreen.cli.train import training_config
from evergreen.contracts.errors import EvergreenError, TrainingError
from evergreen.contracts.training_set import TrainingSet
from evergreen.models.encoder_config import EncoderConfig, FieldLimits
from evergreen.models.package import ModelPackage
from evergreen.training import train_job
from evergreen.training.config import TrainingConfig
from evergreen.training.retrain import Way, retrain
from evergreen.training.train_job import NUM_NODES, TrainJobConfig, TrainJobs, chosen_trainer
from evergreen.training.trainer import train_model
from pipelines import kubernetes
from tests.kube_api import KubeApi, kube_api

ROOT = Path(__file__).resolve().parents[2]
RUNTIME = ROOT / "manifests/components/distributed-training/training-runtime.yaml"
CONFIG = TrainingConfig(
    model="deepfm",
    max_epochs=2,
    export_program=False,
    device="cpu",
    hyperparameters={"hidden": [8], "dropout": 0.0},
    learning_rate=3e-3,
    seed=3,
)


@pytest.fixture
def api() -> Iterator[KubeApi]:
    with kube_api() as server:
        yield server


@pytest.fixture
def settings(tmp_path: Path) -> TrainJobConfig:
    (tmp_path / "data").mkdir()
    return TrainJobConfig(num_nodes=2, folder=tmp_path / "data", start_seconds=0.2, poll_seconds=0.02)


@pytest.fixture
def jobs(api: KubeApi) -> TrainJobs:
    return TrainJobs("evergreen", client.ApiClient(client.Configuration(host=api.url)))


def runtime_command() -> list[str]:
    """Of the container that a TrainJob's arguments are given to."""
    [job] = yaml.safe_load(RUNTIME.read_text())["spec"]["template"]["spec"]["replicatedJobs"]
    [container] = job["template"]["spec"]["template"]["spec"]["containers"]
    assert "args" not in container
    command: list[str] = container["command"]
    return command


def processes(job: Mapping[str, Any]) -> tuple[int, str]:
    """Runs a TrainJob with a process for each node; Trainer would tell torchrun by PET_… variables."""
    torchrun, *command = runtime_command()
    assert torchrun == "torchrun"
    trainer = job["spec"]["trainer"]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={trainer['numNodes']}",
    ]
    done = subprocess.run(
        [*launcher, "--no-python", str(Path(sys.executable).parent / command[1]), *command[2:], *trainer["args"]],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_command_line_gives_back_the_configuration(tmp_path: Path) -> None:
    for config in (
        CONFIG,
        TrainingConfig(),
        TrainingConfig(
            model="popularity",
            num_threads=1,
            encoder=EncoderConfig(num_bins=4, fields={"item_id": FieldLimits(min_count=1)}),
        ),
    ):
        arguments = train_job._arguments(tmp_path, config, is_warm=False)
        settings = [argument.partition("=")[2] for argument in arguments if argument.startswith("--set=")]
        assert training_config(None, settings, {}) == config


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo: processes cannot talk on a CPU")
def test_nodes_train_the_model_that_one_process_would(
    linear_set: TrainingSet, api: KubeApi, jobs: TrainJobs, settings: TrainJobConfig, tmp_path: Path
) -> None:
    api.run_node = processes
    package = jobs.train(linear_set, tmp_path / "package", config=CONFIG, settings=settings)
    alone = train_model(linear_set, tmp_path / "alone", config=CONFIG)
    name = "validation_normalized_entropy"
    assert package.metrics[name] == pytest.approx(alone.metrics[name], rel=1e-3)
    assert package.info.training == alone.info.training
    [created, deleted] = api.changes
    assert created.replace("POST", "DELETE") == deleted and created.startswith("POST train-deepfm-")
    assert not list((settings.folder / "trainings").iterdir())  # nothing is left on the volume


def test_every_way_of_a_retraining_goes_to_the_nodes(
    linear_set: TrainingSet, api: KubeApi, jobs: TrainJobs, settings: TrainJobConfig, tmp_path: Path
) -> None:
    quick = CONFIG.model_copy(update={"model": "logistic_regression", "hyperparameters": {}, "max_epochs": 1})
    incumbent = train_model(linear_set, tmp_path / "incumbent", config=quick)
    asked = []

    def here(job: dict[str, Any]) -> tuple[int, str]:
        options = dict(
            argument.split("=", 1) for argument in job["spec"]["trainer"]["args"][1:] if "--set" not in argument
        )
        asked.append(options)
        warm = ModelPackage.load(Path(options["--warm-start"])) if "--warm-start" in options else None
        rows = TrainingSet.load(Path(job["spec"]["trainer"]["args"][0]))
        train_model(rows, Path(options["--out"]), config=quick, warm_start=warm)
        return 0, ""

    api.run_node = here
    done = retrain(linear_set, tmp_path / "package", config=quick, incumbent=incumbent, train=jobs.trainer(settings))
    assert [candidate.way for candidate in done.candidates] == [Way.SCRATCH, Way.WARM_START]
    assert all(candidate.value is not None for candidate in done.candidates)
    assert ["--warm-start" in options for options in asked] == [False, True]


def test_step_that_is_repeated_goes_on_with_the_job_of_its_first_try(
    linear_set: TrainingSet, api: KubeApi, jobs: TrainJobs, settings: TrainJobConfig, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=r"0 of 2 nodes run after 0 s"):  # no node comes, and the step is killed
        jobs.train(linear_set, tmp_path / "package", config=CONFIG, settings=settings)
    [name] = api.train_jobs
    folder = settings.folder / "trainings" / name
    train_model(linear_set, folder / "package", config=CONFIG.model_copy(update={"max_epochs": 1}))
    api.train_jobs[name]["status"] = {"conditions": [{"type": "Complete", "status": "True"}]}
    package = jobs.train(linear_set, tmp_path / "package", config=CONFIG, settings=settings)
    assert package.path == tmp_path / "package"
    assert api.changes == [f"POST {name}", f"DELETE {name}"]


def test_job_that_failed_is_told_with_its_log_and_replaced_by_the_next_try(
    linear_set: TrainingSet, api: KubeApi, jobs: TrainJobs, settings: TrainJobConfig, tmp_path: Path
) -> None:
    api.run_node = lambda job: (1, "NCCL error: a cable is loose")
    with pytest.raises(TrainingError, match=r"(?s)evergreen: TrainJob train-deepfm-\w+ failed.*a cable is loose"):
        jobs.train(linear_set, tmp_path / "package", config=CONFIG, settings=settings)
    assert not (tmp_path / "package").exists()
    [name] = api.train_jobs  # it stays to be looked at
    with pytest.raises(TrainingError, match="failed"):
        jobs.train(linear_set, tmp_path / "package", config=CONFIG, settings=settings)
    assert api.changes == [f"POST {name}", f"DELETE {name}", f"POST {name}"]


def test_job_of_other_rows_or_settings_is_another_one(linear_set: TrainingSet, settings: TrainJobConfig) -> None:
    def name(config: TrainingConfig, nodes: int = 2) -> str:
        return train_job._job_name(linear_set, config, None, TrainJobConfig(num_nodes=nodes))

    names = {name(CONFIG), name(CONFIG.model_copy(update={"seed": 4})), name(CONFIG, nodes=3)}
    assert len(names) == 3 and name(CONFIG) in names
    longest = max(
        len(name(CONFIG.model_copy(update={"model": model}))) for model in ("logistic_regression", "two_tower")
    )
    assert longest < 50  # pods are named after it, and a name has 63 characters


def test_what_a_role_does_not_allow_is_told(
    linear_set: TrainingSet, api: KubeApi, jobs: TrainJobs, settings: TrainJobConfig, tmp_path: Path
) -> None:
    api.forbidden = {"/trainjobs"}
    with pytest.raises(EvergreenError, match=r"cannot create TrainJob .* HTTP 403"):
        jobs.train(linear_set, tmp_path / "package", config=CONFIG, settings=settings)


def test_step_trains_by_itself_unless_it_was_compiled_for_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (kubernetes.NUM_NODES, Path(kubernetes.DATA)) == (NUM_NODES, TrainJobConfig(num_nodes=1).folder)
    monkeypatch.delenv(NUM_NODES, raising=False)
    assert chosen_trainer() is train_model
    monkeypatch.setenv(NUM_NODES, "two")
    with pytest.raises(TrainingError, match="EVERGREEN_TRAINER_NODES=two"):
        chosen_trainer()
    monkeypatch.setenv(NUM_NODES, "2")
    if not Path(kubernetes.DATA).is_dir():
        with pytest.raises(TrainingError, match="--trainer-nodes 2"):
            chosen_trainer()
