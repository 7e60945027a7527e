"""The recurring runs as Kubeflow Pipelines gets them, over a real connection."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import kfp
import pytest
import yaml
from click.testing import CliRunner

from pipelines import recurring
from pipelines.recurring import MONITORING, TRAINING, Recurring, keep, with_parameters
from tests.kfp_server import KfpServer, kfp_server

IMAGE = "registry/evergreen-pipeline-python:abc"
LOG = "s3://bucket/log"


@pytest.fixture
def server() -> Iterator[KfpServer]:
    with kfp_server() as made:
        yield made


def run(server: KfpServer, *options: str) -> dict[str, dict[str, Any]]:
    """The Job's command; the recurring runs that are there after it, by name."""
    arguments = ["--host", server.url, "--image", IMAGE, "--parameter", f"log_uri={LOG}", *options]
    result = CliRunner().invoke(recurring.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return {one["display_name"]: one for one in server.recurring_runs}


def test_monitor_runs_hourly_and_training_weekly_one_at_a_time(server: KfpServer) -> None:
    runs = run(server)
    crons = {name: one["trigger"]["cron_schedule"]["cron"] for name, one in runs.items()}
    assert crons == {"evergreen-monitoring": "0 5 * * * *", "evergreen-training": "0 35 3 * * 0"}
    for one in runs.values():
        assert (str(one["max_concurrency"]), one["no_catchup"], one["mode"]) == ("1", True, "ENABLE")
        parameters = one["runtime_config"]["parameters"]
        assert parameters["log_uri"] == LOG and parameters["feature_batch_hours"] == 1.0
        assert "as_of" not in parameters  # a run asks the clock
    assert runs["evergreen-monitoring"]["runtime_config"]["parameters"]["window_hours"] == 1.0


def test_runs_hold_the_whole_pipeline_with_its_image_and_secrets(server: KfpServer) -> None:
    spec = run(server)["evergreen-monitoring"]["pipeline_spec"]
    images = {one["container"]["image"] for one in spec["pipeline_spec"]["deploymentSpec"]["executors"].values()}
    assert images == {IMAGE}
    assert "evergreen-s3" in yaml.safe_dump(spec["platform_spec"])


def test_repetition_changes_nothing(server: KfpServer) -> None:
    before = run(server)
    assert run(server) == before


@pytest.mark.parametrize(
    "changed", [("--monitor-cron", "0 20 * * * *"), ("--parameter", "training_days=7"), ("--image", "another:1")]
)
def test_what_is_declared_otherwise_is_replaced_and_the_rest_stays(server: KfpServer, changed: tuple[str, str]) -> None:
    before, after = run(server), run(server, *changed)
    assert after.keys() == before.keys() and len(server.recurring_runs) == 2
    assert after["evergreen-monitoring"] != before["evergreen-monitoring"]
    if "--image" not in changed:
        assert after["evergreen-training"] == before["evergreen-training"]


def test_runs_train_where_the_config_map_says(server: KfpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def training_pod() -> tuple[dict[str, Any], list[str]]:
        spec = run(server)["evergreen-training"]["pipeline_spec"]
        container = spec["pipeline_spec"]["deploymentSpec"]["executors"]["exec-train-model"]["container"]
        pod = spec["platform_spec"]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-train-model"]
        return container, [claim["constant"] for claim in pod.get("pvcMount", [])]

    monkeypatch.setenv("TRAIN_ON_GPU", "false")
    monkeypatch.setenv("TRAINER_NODES", "0")
    container, claims = training_pod()
    assert "accelerator" not in container["resources"] and claims == []
    monkeypatch.setenv("TRAIN_ON_GPU", "true")
    assert "accelerator" in training_pod()[0]["resources"]
    monkeypatch.setenv("TRAINER_NODES", "2")
    container, claims = training_pod()
    assert "accelerator" not in container["resources"] and claims == ["evergreen-data"]


def test_double_is_removed_and_runs_of_others_are_left_alone(server: KfpServer) -> None:
    runs = run(server)
    server.add_recurring_run(runs["evergreen-training"])  # as two Jobs at once would leave it
    other = server.add_recurring_run(runs["evergreen-training"] | {"display_name": "somebody's"})
    run(server)
    assert sorted(one["display_name"] for one in server.recurring_runs) == [
        "evergreen-monitoring",
        "evergreen-training",
        "somebody's",
    ]
    assert other in server.recurring_runs


def test_interrupted_replacement_is_finished_by_the_next_try(server: KfpServer) -> None:
    run(server)
    server.recurring_runs = [one for one in server.recurring_runs if one["display_name"] == "evergreen-training"]
    client = kfp.Client(host=server.url)
    declared = with_parameters([MONITORING, TRAINING], {"log_uri": LOG})
    done = keep(client, declared, image=IMAGE, experiment="evergreen")
    assert done == {"evergreen-monitoring": "created", "evergreen-training": "unchanged"}


def test_parameters_go_where_they_are_known_and_have_their_types() -> None:
    monitoring, training = with_parameters(
        [MONITORING, TRAINING], {"log_uri": LOG, "clicks": "s3://bucket/clicks", "seed": "7", "models": '["deepfm"]'}
    )
    assert monitoring.parameters["clicks"] == "s3://bucket/clicks" and "clicks" not in training.parameters
    for one in (monitoring, training):
        assert one.parameters["seed"] == 7 and one.parameters["models"] == ["deepfm"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"data": LOG}, "data=s3://bucket/log: no such parameter; known: "),
        ({"seed": "seven"}, "seed=seven: must be JSON of type Integer"),
    ],
)
def test_parameter_that_no_pipeline_takes_is_refused(given: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        with_parameters([Recurring("t", TRAINING.pipeline, TRAINING.cron)], given)


def test_log_must_be_named() -> None:
    result = CliRunner().invoke(recurring.main, ["--host", "http://h", "--image", IMAGE])
    assert result.exit_code == 2 and "log_uri" in result.output
